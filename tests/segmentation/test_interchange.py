"""Whole segmenters go to mmsegmentation's names and come back, heads and norms included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_segmenters import CONFIGS, KINDS, SMALL, VIT, batch, load
from torch import Tensor, nn

from models.parts.trunks import pretrained_body
from models.weights.export import to_original_swin
from models.weights.segmenter import segmenter_state, to_mmseg
from segmentation.model import Segmenter, build_segmenter
from tools import convert

State = dict[str, Tensor]
# a ResNet with the stem that mmsegmentation has
WAYS = {
    **{kind: KINDS[kind] for kind in ("dilated", "swin", "vit", "linear")},
    "resnet": {"MODEL__BACKBONE__NAME": "resnet18"},
    "vit of patch 8": {**VIT, "MODEL__BACKBONE__PATCH_SIZE": 8},
}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index")


def build(kind: str, weights: Path | None = None, classes: int = 5, **keys: Any) -> Segmenter:
    cfg = load(**{**SMALL, **WAYS[kind], **keys})
    return build_segmenter(cfg, classes, weights, whole=weights is not None)


def shaken(kind: str, **keys: Any) -> Segmenter:
    """No two tensors alike, so that none can take the place of another."""
    torch.manual_seed(7)
    segmenter = build(kind, **keys)
    with torch.no_grad():
        for tensor in segmenter.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return segmenter


def write(path: Path, state: State) -> Path:
    torch.save({"state_dict": state, "meta": {}}, path)
    return path


def same(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("kind", WAYS)
def test_out_and_in_again_is_bit_identical(kind: str, tmp_path: Path) -> None:
    segmenter = shaken(kind)
    theirs = to_mmseg(segmenter.state_dict())
    assert not any(word in key for key in theirs for word in ("body", "levels", "norms."))
    again = build(kind, write(tmp_path / "w.pth", theirs))
    same(segmenter, again)
    images = batch()[0]
    with torch.no_grad():
        assert torch.equal(segmenter.eval()(images), again.eval()(images))


def swin_names(depths: tuple[int, ...]) -> set[str]:
    """Write down mmsegmentation's SwinTransformer, tensor by tensor."""
    parts = ["norm1", "norm2", "attn.w_msa.qkv", "attn.w_msa.proj"]
    parts += ["ffn.layers.0.0", "ffn.layers.1"]
    layers = ["patch_embed.projection", "patch_embed.norm"] + [f"norm{n}" for n in range(4)]
    names = {f"stages.{n}.downsample.reduction.weight" for n in range(3)}
    layers += [f"stages.{n}.downsample.norm" for n in range(3)]
    for stage, depth in enumerate(depths):
        for block in range(depth):
            place = f"stages.{stage}.blocks.{block}"
            layers += [f"{place}.{part}" for part in parts]
            tables = ("relative_position_bias_table", "relative_position_index")
            names |= {f"{place}.attn.w_msa.{table}" for table in tables}
    return names | {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}


@pytest.mark.parametrize(
    ("name", "size", "depths"),
    [("tiny", 59_941_862, (2, 2, 6, 2)), ("small", 81_259_766, (2, 2, 18, 2))],
)
def test_upernet_on_swin_has_the_published_names_and_size(
    name: str, size: int, depths: tuple[int, ...]
) -> None:
    cfg = load(CONFIGS / f"ade20k_upernet_swin_{name}.yaml")
    with torch.device("meta"):
        state = to_mmseg(build_segmenter(cfg, 150, None).state_dict())
    backbone = {key.removeprefix("backbone.") for key in state if key.startswith("backbone.")}
    assert backbone == swin_names(depths)
    heads = {key.split(".")[0] for key in state} - {"backbone"}
    assert heads == {"decode_head", "auxiliary_head"}
    trained = [tensor for key, tensor in state.items() if key.split(".")[-1] not in BUFFERS]
    assert sum(tensor.numel() for tensor in trained) == size
    assert state["decode_head.conv_seg.weight"].shape == (150, 512, 1, 1)
    assert state["backbone.norm3.weight"].shape == (768,)


def in_the_names_of_the_fork(segmenter: Segmenter) -> State:
    """Name as Swin's fork of mmsegmentation 0.11 does: Swin's own names and four norms."""
    state = segmenter.state_dict()
    place = "backbone.body."
    body = {k.removeprefix(place): t for k, t in state.items() if k.startswith(place)}
    named = {f"backbone.{key}": tensor for key, tensor in to_original_swin(body).items()}
    for part in ("weight", "bias"):
        named[f"backbone.norm3.{part}"] = named.pop(f"backbone.norm.{part}")
        for number in range(3):
            norm = state[f"backbone.norms.{number}.{part}"]
            named[f"backbone.norm{number}.{part}"] = norm
    return named | {key: t for key, t in state.items() if "head." in key}


def test_a_file_of_the_fork_is_read(tmp_path: Path) -> None:
    segmenter = shaken("swin")
    same(segmenter, build("swin", write(tmp_path / "w.pth", in_the_names_of_the_fork(segmenter))))


@pytest.mark.parametrize("names", [to_mmseg, None])
def test_a_whole_swin_serves_as_a_backbone(names: Any, tmp_path: Path) -> None:
    segmenter = shaken("swin")
    state = names(segmenter.state_dict()) if names else in_the_names_of_the_fork(segmenter)
    cfg = load(**KINDS["swin"])
    body = pretrained_body(cfg, write(tmp_path / "w.pth", state))
    same(body, segmenter.backbone.body)


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    segmenter = shaken("resnet")
    file = write(tmp_path / "w.pth", to_mmseg(segmenter.state_dict()))
    with pytest.raises(ValueError, match=r"of another shape \(auxiliary_head.conv_seg.bias \(5,\)"):
        build("resnet", file, classes=6)
    with pytest.raises(ValueError, match=r"8 unknown .*auxiliary_head"):
        build("resnet", file, MODEL__SEGMENTER__AUX_WEIGHT=0)
    with pytest.raises(ValueError, match=r"missing \(decode_head.conv_cat"):
        build("resnet", file, MODEL__SEGMENTER__HEAD="fcn")
    lone = {k: t for k, t in to_mmseg(segmenter.state_dict()).items() if "head." not in k}
    with pytest.raises(ValueError, match=r"w\.pth holds no whole segmenter"):
        segmenter_state({"state_dict": lone}, "w.pth")
    grid = {"decode_head.heads.0.conv_seg.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"SEGMENTATION\.LRS"):
        to_mmseg(grid)
    broken = to_mmseg(segmenter.state_dict())
    broken["decode_head.conv_seg.bias"][0] = float("nan")
    with pytest.raises(ValueError, match="not finite: decode_head"):
        build("resnet", write(tmp_path / "nan.pth", broken))


def test_convert_writes_a_segmenter_and_no_backbone_as_one(tmp_path: Path) -> None:
    segmenter = shaken("resnet")
    run = tmp_path / "run.pth"
    torch.save({"framework": segmenter.state_dict()}, run)
    words = ["export", str(run), "--to", "mmseg", "--output", str(tmp_path / "out.pth")]
    convert.export_file(convert.parse_args(words))
    same(segmenter, build("resnet", tmp_path / "out.pth"))
    same(segmenter, build("resnet", run))
    torch.save({"framework": segmenter.backbone.state_dict()}, run)
    with pytest.raises(ValueError, match=r"run\.pth holds no whole segmenter"):
        convert.export_file(convert.parse_args(words))
