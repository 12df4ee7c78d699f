"""UPerNet, FCN and linear heads: sizes, equality with transformers' heads, losses against loops."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segmentation.heads import FCN, LinearGrid, LinearHead, UPerNet, pixel_loss

WIDTHS = {
    "swin_tiny": (96, 192, 384, 768),
    "swin_base": (128, 256, 512, 1024),
    "resnet50": (256, 512, 1024, 2048),
    "vit_small": (384,) * 4,
    "vit_base": (768,) * 4,
}
SMALL = (8, 12, 16, 20)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def small_maps(batch: int = 2) -> list[Tensor]:
    """Odd sizes: no map is twice the next."""
    sizes = ((33, 45), (17, 23), (9, 12), (5, 6))
    return [torch.randn(batch, width, *size) for width, size in zip(SMALL, sizes, strict=True)]


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("swin_tiny", 31_497_366),
        ("swin_base", 33_315_990),
        ("resnet50", 40_590_486),
        ("vit_small", 29_187_222),
        ("vit_base", 32_332_950),
    ],
)
def test_upernet_has_the_published_size(backbone: str, expected: int) -> None:
    assert size_of(on_meta(lambda: UPerNet(WIDTHS[backbone], 150))) == expected


@pytest.mark.parametrize(
    ("width", "expected"), [(384, 923_798), (512, 1_218_710), (768, 1_808_534), (1024, 2_398_358)]
)
def test_the_auxiliary_head_has_the_published_size(width: int, expected: int) -> None:
    head = on_meta(lambda: FCN(width, 150, width=256, num_convs=1, concat=False))
    assert size_of(head) == expected


def test_fcn_has_the_published_size() -> None:
    assert size_of(on_meta(lambda: FCN(2048, 21))) == 23_606_805


def test_parameters_have_the_names_of_mmsegmentation() -> None:
    names = set(UPerNet(SMALL, 3, width=4).state_dict())
    layers = [f"psp_modules.{n}.1" for n in range(4)] + ["bottleneck", "fpn_bottleneck"]
    layers += [f"{kind}_convs.{n}" for kind in ("lateral", "fpn") for n in range(3)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{layer}.conv.weight" for layer in layers}
    expected |= {f"{layer}.bn.{part}" for layer in layers for part in norm}
    assert names == expected | {"conv_seg.weight", "conv_seg.bias"}
    fcn = {name.rsplit(".", 1)[0] for name in FCN(8, 3, width=4).state_dict()}
    convs = {f"{layer}.{part}" for layer in ("convs.0", "convs.1") for part in ("conv", "bn")}
    assert fcn == convs | {"conv_cat.conv", "conv_cat.bn", "conv_seg"}


def shuffle_norms(module: nn.Module) -> None:
    """Fresh statistics would be the identity, which hides a norm that is left out."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
            nn.init.uniform_(part.weight, 0.5, 2.0)
            nn.init.normal_(part.bias)


def in_their_names(head: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): tensor
        for name, tensor in head.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["upernet", "auxiliary", "fcn"])
def test_heads_equal_those_of_transformers(kind: str) -> None:
    theirs_of = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import UperNetConfig

    torch.manual_seed(0)
    config = UperNetConfig(hidden_size=16, num_labels=5, auxiliary_channels=6)
    if kind == "upernet":
        ours: nn.Module = UPerNet(SMALL, 5, width=16)
        theirs = theirs_of.UperNetHead(config, in_channels=list(SMALL))
    elif kind == "auxiliary":
        ours = FCN(SMALL[2], 5, width=6, num_convs=1, concat=False, stage=2)
        config.auxiliary_in_channels = None
        theirs = theirs_of.UperNetFCNHead(config, in_channels=list(SMALL))
    else:
        ours = FCN(SMALL[3], 5, width=6, dilation=2)
        config.auxiliary_in_channels = None
        config.auxiliary_num_convs, config.auxiliary_concat_input = 2, True
        theirs = theirs_of.UperNetFCNHead(config, in_channels=list(SMALL), in_index=3, dilation=2)
    shuffle_norms(ours)
    nn.init.normal_(ours.conv_seg.weight)
    theirs.load_state_dict(in_their_names(ours))
    maps = small_maps()
    torch.testing.assert_close(ours.eval()(maps), theirs.eval()(maps), rtol=1e-6, atol=1e-6)


def test_a_linear_head_is_a_norm_and_a_matrix() -> None:
    torch.manual_seed(0)
    head = LinearHead((8, 12), 3)
    shuffle_norms(head)
    assert size_of(head) == 2 * 20 + 3 * 20 + 3
    maps = small_maps()[:2]
    joined = torch.cat([maps[0], nn.functional.interpolate(maps[1], (33, 45), mode="bilinear")], 1)
    expected = head.conv_seg(head.bn.eval()(joined))
    torch.testing.assert_close(head.eval()(maps), expected)


def test_the_heads_of_a_grid_start_alike_and_follow_each_other() -> None:
    grid = LinearGrid(LinearHead(SMALL[:1], 3), SMALL[:1], count=3)
    maps = small_maps()[:1]
    logits = grid(maps)
    assert logits.shape == (6, 3, 33, 45)
    assert torch.equal(logits[:2], logits[4:])
    with torch.no_grad():
        grid.heads[1].conv_seg.bias += 1
    torch.testing.assert_close(grid(maps)[2:4], logits[:2] + 1)


@pytest.mark.parametrize(
    "head", [UPerNet(SMALL, 3, width=64), FCN(20, 3, width=64)], ids=["upernet", "fcn"]
)
def test_dropout_takes_whole_channels_and_only_in_training(head: nn.Module) -> None:
    """The class layer becomes a sum over channels of ones: what is missing is a channel."""
    seen = []
    head.dropout.register_forward_hook(lambda *hooked: seen.append((hooked[1][0], hooked[2])))
    torch.manual_seed(0)
    head.train()(small_maps())
    (before, after) = seen.pop()
    kept = (after != 0).flatten(2).any(2)
    lit = (before != 0).flatten(2).any(2)
    assert 0.02 < 1 - float(kept[lit].float().mean()) < 0.25
    whole = torch.where(kept[:, :, None, None], before / 0.9, torch.zeros(()))
    torch.testing.assert_close(after, whole)
    head.eval()(small_maps())
    (before, after) = seen.pop()
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "head", [UPerNet(SMALL, 3, width=8), FCN(20, 3, width=8), LinearHead(SMALL, 3)]
)
def test_gradients_reach_every_parameter_and_convolutions_start_as_published(
    head: nn.Module,
) -> None:
    maps = small_maps()
    labels = torch.randint(0, 3, (2, 60, 60))
    pixel_loss(head.train()(maps), labels).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    for name, part in head.named_modules():
        if isinstance(part, nn.Conv2d) and name != "conv_seg":
            assert part.bias is None
            fan_out = part.out_channels * part.kernel_size[0] ** 2
            std = math.sqrt(2 / fan_out)
            assert 0.75 * std < float(part.weight.detach().std()) < 1.25 * std
    assert float(head.conv_seg.bias.detach().abs().max()) == 0
    assert 0.005 < float(head.conv_seg.weight.detach().std()) < 0.015


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_the_loss_equals_a_loop_over_pixels(over: str) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 4, (2, 6, 7))
    labels[:, :2] = 255
    labels[1, 3, 4] = 255
    large = nn.functional.interpolate(logits, (6, 7), mode="bilinear", align_corners=False)
    total, counted = 0.0, 0
    for n in range(2):
        for y in range(6):
            for x in range(7):
                if labels[n, y, x] != 255:
                    values = large[n, :, y, x].double()
                    total += float(values.logsumexp(0) - values[labels[n, y, x]])
                    counted += 1
    expected = total / (2 * 6 * 7 if over == "all" else counted)
    assert float(pixel_loss(logits, labels, over)) == pytest.approx(expected, rel=1e-5)


def test_the_two_means_differ_by_the_share_of_labelled_pixels() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :3] = 255  # 62.5 % are labelled
    logits = torch.randn(1, 3, 2, 2)
    ratio = pixel_loss(logits, labels, "all") / pixel_loss(logits, labels, "labelled")
    assert float(ratio) == pytest.approx(0.625, rel=1e-5)


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_a_batch_without_labels_has_loss_zero(over: str) -> None:
    labels = torch.full((1, 4, 4), 255)
    assert float(pixel_loss(torch.randn(1, 3, 2, 2), labels, over)) == 0.0


def test_logits_are_float32_under_autocast() -> None:
    """In bf16 logits of one pixel would tie, and the arg-max be the first of them."""
    head = FCN(20, 64, width=16).eval()
    nn.init.normal_(head.conv_seg.weight)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = head(small_maps())
        assert pixel_loss(logits, torch.zeros(2, 10, 12)).dtype == torch.float32
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())


def test_the_loss_of_labelled_pixels_is_that_of_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two processes, of which one has far fewer labels, have the mean loss of one with both."""
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    labels[0, 1:] = 255
    alone = pixel_loss(logits, labels, "labelled")
    total = (labels != 255).sum()
    monkeypatch.setattr("segmentation.heads.world_size", lambda: 2)
    monkeypatch.setattr("segmentation.heads.all_reduce_sum", lambda count: total)
    apart = [pixel_loss(logits[n : n + 1], labels[n : n + 1], "labelled") for n in (0, 1)]
    torch.testing.assert_close(sum(apart) / 2, alone)
