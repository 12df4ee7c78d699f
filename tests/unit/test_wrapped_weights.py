"""Weights load from behind any wrappers, and what the backbone does not need is left out by name."""

import random
import re
from typing import Any

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.weights.find import find_network
from models.weights.load import load_network

State = dict[str, Tensor]

ENTRIES = ("state_dict", "model", "teacher", "student", "ema", "model_ema", "network", "net")
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "network."),
    *("student.", "teacher.", "online.", "_fsdp_wrapped_module."),
)
NOT_NEEDED = (
    *("mask_token", "decoder.weight", "decoder_blocks.0.attn.qkv.weight", "head.weight", "fc.bias"),
    *("prototypes.weight", "projection_head.0.weight", "prediction.weight", "classifier.bias"),
    *("dino_head.mlp.0.weight", "predictor.0.bias", "projector.0.weight", "queue"),
    "layers.0.blocks.0.attn.relative_position_index",
)


def deit() -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2, num_classes=0
    )


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=2,
        embed_dim=8,
        depths=(2, 2, 2, 2),
        num_heads=(1, 1, 2, 2),
        num_classes=0,
    )


def resnet() -> nn.Module:
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=0)


FAMILIES = {"resnet": resnet, "deit": deit, "swin": swin}


def network(family: str) -> nn.Module:
    """Return a small network whose tensors all differ."""
    model = FAMILIES[family]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 100)
    return model


def wrapped(state: State, rng: random.Random) -> dict[str, Any]:
    """Put one to four wrappers around a state, and tensors that no backbone needs between them."""
    value: dict[str, Any] = dict(state)
    for _ in range(rng.randint(1, 4)):
        flat = all(isinstance(part, Tensor) for part in value.values())
        if flat:
            value |= {key: torch.rand(3) for key in rng.sample(NOT_NEEDED, 2) if key not in value}
        if flat and rng.random() < 0.5:
            prefix = rng.choice(PREFIXES)
            value = {prefix + key: tensor for key, tensor in value.items()}
        else:
            value = {rng.choice(ENTRIES): value, "epoch": 3, "optimizer": {"state": {0: 1}}}
    return value


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(40))
def test_any_stack_of_wrappers_loads_equal_tensors_or_names_the_one_that_lacks(
    family: str, seed: int
) -> None:
    published = network(family).state_dict()
    backbone = FAMILIES[family]()
    load_network(backbone, wrapped(published, random.Random(seed)), "a.pth")
    for key, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, published[key]), key
    rng = random.Random(seed)
    lost = rng.choice([key for key in published if not key.endswith("num_batches_tracked")])
    del published[lost]
    with pytest.raises(ValueError, match=rf"^a\.pth does not fit .*1 missing \({re.escape(lost)}"):
        load_network(backbone, wrapped(published, random.Random(seed)), "a.pth")


def test_words_of_compilers_inside_of_names_are_no_part_of_them() -> None:
    published = network("resnet").state_dict()
    odd = {key.replace("layer1.0.", "layer1._orig_mod.0."): t for key, t in published.items()}
    backbone = resnet()
    load_network(backbone, {"model": odd}, "a.pth")
    assert all(torch.equal(t, published[key]) for key, t in backbone.state_dict().items())
    with pytest.raises(ValueError, match=r"two tensors are called conv1\.weight"):
        load_network(backbone, {**published, "_orig_mod.conv1.weight": torch.ones(1)}, "a.pth")


def test_what_is_left_out_is_named_in_one_line() -> None:
    state = network("deit").state_dict()
    decoder = {f"decoder_blocks.0.mlp.fc{i}.weight": torch.ones(2) for i in (1, 2)}
    extra = {"mask_token": torch.ones(2), "head.weight": torch.ones(2), "head.bias": torch.ones(2)}
    said = str(load_network(deit(), {"model": {**state, **decoder, **extra}}, "a.pth"))
    assert said == (
        f"loaded {len(state)} tensors of the backbone from a.pth; left out: "
        "decoder_blocks (2 tensors), head (2 tensors), mask_token (from model)"
    )


def test_heads_outside_of_the_backbones_wrapper_are_named_too() -> None:
    state = {f"backbone.{key}": tensor for key, tensor in network("swin").state_dict().items()}
    heads = {"dino_head.mlp.0.weight": torch.ones(2), "dino_head.last.weight": torch.ones(2)}
    said = str(load_network(swin(), {"teacher": {**state, **heads}}, "a.pth"))
    assert "left out: dino_head (2 tensors) (from teacher.backbone)" in said


@pytest.mark.parametrize("extra", ["blocks.2.norm1.weight", "reg_token", "blocks.0.ls1.gamma"])
def test_a_part_that_changes_features_is_refused_by_name(extra: str) -> None:
    file = {**network("deit").state_dict(), extra: torch.ones(1)}
    with pytest.raises(ValueError, match=r"^a\.pth does not fit the backbone; 1 that") as caught:
        load_network(deit(), file, "a.pth")
    assert f"1 that the backbone does not have ({extra})" in str(caught.value)
    assert "match" not in str(caught.value), "all of them do"


def test_a_file_of_other_names_says_both() -> None:
    file = {"state_dict": {"trunk.stage1.weight": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"none of its 1 tensors .*the file has state_dict\.trunk"):
        load_network(resnet(), file, "a.pth")
    with pytest.raises(ValueError, match=r"^a\.pth holds a head only"):
        load_network(resnet(), {"state_dict": {"fc.weight": torch.ones(1)}}, "a.pth")


def test_two_networks_that_nothing_tells_apart_are_refused_unless_equal() -> None:
    first, second = network("resnet").state_dict(), network("resnet").state_dict()
    with pytest.raises(ValueError, match=r"a\.pth holds several networks, at left\. and right\."):
        load_network(resnet(), {"left": first, "right": second}, "a.pth")
    backbone = resnet()
    load_network(backbone, {"left": first, "right": dict(first)}, "a.pth")
    assert torch.equal(backbone.get_parameter("conv1.weight"), first["conv1.weight"])


@pytest.mark.parametrize(
    "words",
    [
        ("online_encoder", "target_encoder"),
        ("backbone", "backbone_momentum"),
        ("query_encoder", "key_encoder"),
        ("state_dict", "state_dict_ema"),
    ],
)
def test_the_averaged_network_is_known_by_its_words(words: tuple[str, str]) -> None:
    states = [network("resnet").state_dict() for _ in words]
    file = {f"{word}.{k}": t for word, s in zip(words, states, strict=True) for k, t in s.items()}
    for which, state in (("", states[0]), ("online", states[0]), ("target", states[1])):
        found = find_network({"model": file}, which, own=state)
        assert torch.equal(found.state["conv1.weight"], state["conv1.weight"])
        assert len(found.others) == 1


def test_an_entry_that_contains_itself_ends() -> None:
    loop: dict[str, Any] = {"conv1.weight": torch.ones(1)}
    loop |= {"model": loop, "ema": loop}
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_network(resnet(), loop, "a.pth")


def test_names_that_fit_already_are_not_translated() -> None:
    """A model of the family of NFNets has a `stem.conv1` like Detectron2's ResNets."""
    conv = nn.Conv2d(3, 4, 3)
    model = nn.ModuleDict({"stem": nn.ModuleDict({"conv1": conv}), "res2": nn.Sequential(resnet())})
    published = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    assert "res2.0.conv1.weight" in published
    load_network(model, {"state_dict": published}, "a.pth")
    assert torch.equal(conv.weight, published["stem.conv1.weight"])
