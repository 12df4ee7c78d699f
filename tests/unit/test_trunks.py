"""Trunks give maps at the strides that they name, from tensors of known number."""

import pytest
import torch
from torch import nn

from models.parts.backbones import build_backbone
from models.parts.resolution import dense_swin
from models.parts.trunks import SwinTrunk, ViTTaps, ViTTokens, build_trunk, resize_positions


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_maps(trunk: nn.Module, height: int, width: int) -> list[torch.Tensor]:
    maps = trunk.eval()(torch.rand(2, 3, height, width))
    expected = [
        [2, channels, -(-height // stride), -(-width // stride)]
        for channels, stride in zip(trunk.widths, trunk.strides, strict=True)
    ]
    assert [list(level.shape) for level in maps] == expected
    return maps


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("swin_tiny", 27_520_698), ("swin_small", 48_838_602), ("swin_base", 86_745_016)],
)
def test_a_swin_with_four_norms_has_the_published_parameters(name: str, parameters: int) -> None:
    assert count(build_trunk(build_backbone(name))) == parameters


def test_a_swin_takes_any_size() -> None:
    trunk = build_trunk(dense_swin(build_backbone("swin_tiny", img_size=448)))
    assert isinstance(trunk, SwinTrunk)
    assert trunk.strides == [4, 8, 16, 32]
    check_maps(trunk, 61, 83)


@pytest.mark.parametrize(
    ("stem", "output_stride", "strides"),
    [
        ("imagenet", 32, [4, 8, 16, 32]),
        ("imagenet", 16, [4, 8, 16, 16]),
        ("imagenet", 8, [4, 8, 8, 8]),
        ("cifar", 32, [1, 2, 4, 8]),
        ("cifar_stride2", 32, [2, 4, 8, 16]),
    ],
)
def test_a_resnet_has_the_strides_that_it_names(
    stem: str, output_stride: int, strides: list[int]
) -> None:
    body = build_backbone("resnet18", stem=stem, output_stride=output_stride)
    trunk = build_trunk(body)
    assert trunk.strides == strides
    check_maps(trunk, 64, 96)
    plain = build_backbone("resnet18", stem=stem)
    plain.load_state_dict(body.state_dict())  # dilation changes no tensor


def test_dilation_is_for_resnets() -> None:
    with pytest.raises(ValueError, match="OUTPUT_STRIDE: 8 is for ResNets, not deit_tiny"):
        build_backbone("deit_tiny", output_stride=8)


@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("name", ["deit_tiny", "vit_small"])
def test_taps_of_a_vit_have_four_strides(name: str, patch: int) -> None:
    body = build_backbone(name, img_size=64, patch_size=patch)
    resize_positions(body, 64, 96)
    trunk = build_trunk(body)
    assert trunk.strides == [4, 8, 16, 32]
    assert trunk.blocks == [3, 5, 7, 11]
    check_maps(trunk, 64, 96)
    trunk.train()(torch.rand(2, 3, 64, 96))[-1].sum().backward()


def test_taps_are_the_outputs_of_their_blocks_without_norm_and_class_token() -> None:
    body = build_backbone("deit_tiny", img_size=32)
    seen: dict[int, torch.Tensor] = {}
    for number, block in enumerate(body.blocks, 1):
        block.register_forward_hook(lambda *a, number=number: seen.update({number: a[2]}))
    maps = check_maps(ViTTaps(body, (2, 5, 7, 12)), 32, 32)
    tokens = seen[7][:, 1:].transpose(1, 2).unflatten(2, (2, 2))  # the level without a layer
    torch.testing.assert_close(maps[2], tokens, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"taps: \[3, 13\]; give four blocks, each from 1 to 12"):
        ViTTaps(body, (3, 13))


def test_tokens_are_the_last_blocks_under_the_final_norm() -> None:
    body = build_backbone("deit_tiny", img_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    maps = ViTTokens(body, 4)(images)
    assert [list(level.shape) for level in maps] == [[2, 192, 2, 2]] * 4
    final = body.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    torch.testing.assert_close(maps[-1], final, rtol=0, atol=0)
    assert not torch.equal(maps[0], maps[-1])
