"""Whole segmenters in mmsegmentation's names: heads too, so that files go both ways.

Heads have the same names on both sides. Backbones differ: mmsegmentation >= 1.0 keeps the four
output norms of a Swin in the backbone itself, and the pyramid of a ViT in a separate neck.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.weights.architecture import family
from models.weights.export import State, to_mmdet
from models.weights.find import all_paths, not_needed, some
from models.weights.naming import MMSEG_VIT, to_our_names
from utils.checkpoints.foreign import read_torch

logger = logging.getLogger("synco")

_HEAD = "decode_head."
_HEADS = ("decode_head.", "auxiliary_head.")
# Feature2Pyramid's names of our levels, by the patch that they are for (see `ViTTaps`).
_NECK_16 = {"backbone.levels.0.": "neck.upsample_4x.", "backbone.levels.1.": "neck.upsample_2x.0."}
_NECK_8 = {"backbone.levels.0.": "neck.upsample_2x.0."}


def to_mmseg(state: Mapping[str, Tensor]) -> State:
    """Return a segmenter's state in mmsegmentation's names; ValueError where it has none."""
    if f"{_HEAD}heads.0.conv_seg.weight" in state:
        raise ValueError(
            "this probe has several heads (SEGMENTATION.LRS), mmsegmentation one; train the best "
            "rate alone"
        )
    trunk = _inside(state, "backbone.")
    body = _inside(trunk, "body.") or trunk  # a ResNet's stages lie in the trunk itself
    result = {key: tensor for key, tensor in state.items() if not key.startswith("backbone.")}
    if family(body) == "vit":
        return result | _vit_to_mmseg(state, body)
    # a Swin's names begin with `backbone.` there already
    named = {key.removeprefix("backbone."): tensor for key, tensor in to_mmdet(body).items()}
    for key, tensor in _inside(trunk, "norms.").items():
        named[f"norm{key}"] = tensor
    for part in ("weight", "bias"):
        if f"norm.{part}" in named:  # the pretrained one is the fourth
            named[f"norm3.{part}"] = named.pop(f"norm.{part}")
    return result | {f"backbone.{key}": tensor for key, tensor in named.items()}


def _vit_to_mmseg(state: Mapping[str, Tensor], body: Mapping[str, Tensor]) -> State:
    if "reg_token" in body:
        raise ValueError("mmsegmentation's ViT has one class token, this one more")
    named = {f"backbone.{key}": t for key, t in MMSEG_VIT.to_theirs(body).items()}
    # the first level enlarges twice where the patch is 16, and once where it is 8
    neck = _NECK_16 if "backbone.levels.1.weight" in state else _NECK_8
    return named | _renamed(state, neck)


def segmenter_state(checkpoint: Mapping[str, object], source: str) -> State:
    """Return the whole segmenter of a file, ours or mmsegmentation's, in our names."""
    paths = all_paths(checkpoint)
    head = next((path for path in paths if _HEAD in path), None)
    if head is None:
        raise ValueError(
            f"{source} holds no whole segmenter, no {_HEAD}*: give a checkpoint of segmentation"
        )
    state = _inside(paths, head[: head.index(_HEAD)])
    trunk = _inside(state, "backbone.")
    result = {key: t for key, t in state.items() if not key.startswith(("backbone.", "neck."))}
    ours, namings = to_our_names(trunk)
    if not namings:  # our own file, or a ResNet, which has the same names there
        return result | {f"backbone.{key}": tensor for key, tensor in trunk.items()}
    for key, tensor in ours.items():
        # norm0 to norm2 are our trunk's, the fourth has become the body's own
        place = f"norms.{key[4:]}" if key[:4] == "norm" and key[4].isdigit() else f"body.{key}"
        result[f"backbone.{place}"] = tensor
    neck = _NECK_16 if "neck.upsample_4x.0.weight" in state else _NECK_8
    return result | _renamed(state, {theirs: ours for ours, theirs in neck.items()})


def load_segmenter(segmenter: nn.Module, weights: Path) -> None:
    """Copy a file's whole segmenter into `segmenter`: every tensor, or ValueError."""
    state, own = segmenter_state(read_torch(weights), str(weights)), segmenter.state_dict()
    misfits = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    lost = [k for k in sorted(own.keys() - state.keys()) if not k.endswith("num_batches_tracked")]
    left = sorted(state.keys() - own.keys())
    # buffers such as Swin's relative positions follow from the architecture; a head does not
    foreign = [key for key in left if key.startswith(_HEADS) or not not_needed(key)]
    faults = (("missing", lost), ("unknown", foreign), ("of another shape", misfits))
    if lost or foreign or misfits:
        said = "; ".join(f"{len(keys)} {word} ({some(keys)})" for word, keys in faults if keys)
        raise ValueError(
            f"{weights} is another segmenter: {said}; check MODEL, SEGMENTATION.CROP and the "
            "classes against the file, or leave --whole out to take its backbone only"
        )
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{weights}: not finite: {some(broken)}; use another checkpoint")
    segmenter.load_state_dict({k: t for k, t in state.items() if k in own}, strict=False)
    logger.info("loaded the whole segmenter, %d tensors, from %s", len(own), weights)


def _inside(state: Mapping[str, Tensor], place: str) -> State:
    """Return what lies at a place, without the place in its names."""
    return {key.removeprefix(place): t for key, t in state.items() if key.startswith(place)}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """Return the tensors whose names begin as a key of `names` does, under the new beginning."""
    return {
        new + key.removeprefix(old): tensor
        for old, new in names.items()
        for key, tensor in state.items()
        if key.startswith(old)
    }
