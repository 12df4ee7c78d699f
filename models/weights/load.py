"""Load pretrained backbones: every tensor, or none and an error.

A probe on half-loaded weights gives a number that looks like a result. So every tensor of the
backbone must be found, and what the file holds beyond it must be a head or a derived buffer.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models import adapt_input_conv
from torch import Tensor, nn

from models.weights.architecture import is_sincos, of_another
from models.weights.find import Network, find_network, listed, not_needed, some
from utils.checkpoints.foreign import read_torch

# MoCo v3's ViT-S has 12 heads, DeiT's 6, and the tensors have the same shapes
_AMBIGUOUS_WIDTH = 384


@dataclass(frozen=True)
class LoadReport:
    """Account for every key of a load that was accepted."""

    source: str
    matched: int
    missing: tuple[str, ...]  # only num_batches_tracked
    unexpected: tuple[str, ...]  # heads and derived buffers, not loaded
    # tables of positions, interpolated to this model's size; a first convolution of other channels
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return one line for the log."""
        left = f"; left out: {listed(self.unexpected)}" if self.unexpected else ""
        sizes = f"; resized {some(self.resized)}" if self.resized else ""
        return f"loaded {self.matched} tensors of the backbone from {self.source}{left}{sizes}"


class Loaded(NamedTuple):
    """What was loaded, and the network of the file that it is."""

    report: LoadReport
    network: Network

    def __str__(self) -> str:
        """Return one line for the log."""
        return f"{self.report} ({self.network})"


def network_of(file: Path | None, which: str = "") -> str:
    """Return which network of a file of several is taken; of random weights the online one."""
    return find_network(read_torch(file), which).taken if file else "online"


def load_network(
    backbone: nn.Module, checkpoint: Mapping[str, object], source: str, which: str = ""
) -> Loaded:
    """Load a network of a checkpoint (see `find_network`) into the backbone."""
    network = find_network(checkpoint, which, source, backbone.state_dict())
    return Loaded(load_backbone(backbone, network.state, source, network.beside), network)


def check_norm_eps(checkpoint: Mapping[str, object], norm_eps: float, source: str) -> None:
    """Raise ValueError if a file was imported with another MODEL.BACKBONE.NORM_EPS."""
    imported = checkpoint.get("imported")
    theirs = imported.get("norm_eps", norm_eps) if isinstance(imported, Mapping) else norm_eps
    if theirs != norm_eps:
        raise ValueError(
            f"MODEL.BACKBONE.NORM_EPS: {norm_eps}, but {source} was imported with {theirs}; "
            f"add --opts MODEL.BACKBONE.NORM_EPS {theirs}"
        )


def load_backbone(
    backbone: nn.Module, state: Mapping[str, Tensor], source: str, beside: Collection[str] = ()
) -> LoadReport:
    """Copy `state` into the backbone; ValueError, and nothing changed, on a poor match.

    `source` is the file's name, for messages; `beside` names what else the file holds. Only
    `num_batches_tracked` may be missing. Only heads and derived buffers may be left over. Tables
    of positions of another image size are interpolated (bicubic, class tokens kept).
    """
    own = backbone.state_dict()
    state, adapted = _adapted(state, own, source)
    state, resized = _resized(state, own, backbone)
    resized = (*adapted, *resized)
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    matched = {key: state[key] for key in own.keys() & state.keys()}
    lost = [key for key in missing if not key.endswith("num_batches_tracked")]
    foreign = [key for key in unexpected if not not_needed(key)]
    misfits = [key for key in sorted(matched) if not _fits(matched[key], own[key])]
    if lost or foreign or misfits:
        raise ValueError(_refusal(own, state, source, lost, foreign, misfits))
    _refuse_other_heads(backbone, matched, own, source)
    refuse_not_finite(matched, source)
    backbone.load_state_dict(matched, strict=False)  # every key is accounted for above
    left_out = (*unexpected, *sorted(beside))
    return LoadReport(source, len(matched), tuple(missing), left_out, resized)


def refuse_not_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError for NaN or infinity in the weights of the file `source`."""
    # A NaN would only show as chance accuracy, hours later.
    broken = [key for key in sorted(state) if not torch.isfinite(state[key]).all()]
    if broken:
        raise ValueError(
            f"{source}: {len(broken)} tensors are not finite ({some(broken)}); use another "
            "checkpoint"
        )


def _adapted(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Give a first convolution of three channels as many as the backbone has, as timm does.

    One channel gets the sum of three; more repeat the three, scaled so that the response stays.
    Raises `ValueError` for one of any other number.
    """
    key = next((name for name, tensor in own.items() if tensor.ndim == 4), "")
    if key not in state:
        return state, ()
    theirs, ours = state[key].shape, own[key].shape
    # Shapes that differ in more than the channels are of another network.
    if theirs == ours or (theirs[:1], theirs[2:]) != (ours[:1], ours[2:]):
        return state, ()
    if theirs[1] != 3:
        raise ValueError(
            f"{source} takes images of {theirs[1]} channels, the backbone {ours[1]}; set "
            f"DATA.CHANNELS {theirs[1]} (detection and segmentation take 3 only)"
        )
    weight = adapt_input_conv(ours[1], state[key])
    return {**state, key: weight}, (f"{key} (3 to {ours[1]} channels)",)


def _resized(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], backbone: nn.Module
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Interpolate ViT's table of positions and Swin's relative ones if only their size differs."""
    result, notes = dict(state), []
    for key, tensor in state.items():
        if key not in own or tensor.shape == own[key].shape or not tensor.is_floating_point():
            continue
        if key == "pos_embed" and tensor.ndim == 3:
            grid = backbone.get_submodule("patch_embed").grid_size
            rows, cols = cast("tuple[int, int]", grid)
            tokens = own[key].shape[1] - rows * cols
            table, first = tensor[0, tokens:], tensor[0, :tokens]
        elif key.endswith("relative_position_bias_table") and tensor.ndim == 2:
            rows = cols = math.isqrt(len(own[key]))
            table, first = tensor, tensor[:0]
        else:
            continue
        side = math.isqrt(len(table))
        if side < 1 or side * side != len(table) or table.shape[-1] != own[key].shape[-1]:
            continue  # reported as a wrong shape
        result[key] = torch.cat([first, _interpolated(table, side, rows, cols)]).view(
            own[key].shape
        )
        notes.append(f"{key} ({side}x{side} to {rows}x{cols})")
    return result, tuple(notes)


def _interpolated(table: Tensor, side: int, rows: int, cols: int) -> Tensor:
    grid = table.float().T.reshape(1, -1, side, side)
    resized = F.interpolate(grid, (rows, cols), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.to(table.dtype)


def _refuse_other_heads(
    backbone: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str
) -> None:
    """Refuse MoCo v3's ViT-S (12 heads, sin-cos positions) in DeiT's (6, learned), and the reverse.

    The shapes are the same, so only the positions tell; fine-tuned sines still look like sines.
    """
    blocks = getattr(backbone, "blocks", None)
    if "pos_embed" not in state or blocks is None or own["pos_embed"].shape[-1] != _AMBIGUOUS_WIDTH:
        return
    heads = getattr(getattr(blocks[0], "attn", None), "num_heads", 0)
    theirs, ours = (is_sincos(table["pos_embed"]) for table in (state, own))
    if theirs and heads == 6:
        raise ValueError(
            f"{source} is MoCo v3's ViT-S with 12 heads (its positions are fixed sines), "
            "the backbone has 6; set MODEL.BACKBONE.NAME vit_small"
        )
    if ours and not theirs and heads == 12:
        raise ValueError(
            f"{source} is a ViT-S with learned positions, so DeiT's with 6 heads; "
            "the backbone has 12; set MODEL.BACKBONE.NAME deit_small"
        )


def _fits(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def _refusal(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str,
    lost: list[str],
    foreign: list[str],
    misfits: list[str],
) -> str:
    """Say what does not match: the architecture or, where that is the same, single tensors."""
    # a file that merely lacks a few tensors may look like another network
    many = 10 * (len(lost) + len(foreign) + len(misfits)) > len(own)
    if many and (other := of_another(state, own)):
        return f"{source} {other}"
    shapes = [f"{key} {_form(state[key], own[key])}" for key in misfits]
    fitting = len(own.keys() & state.keys()) - len(misfits)
    parts = [f"{source} does not fit the backbone"]
    if lost or misfits:
        parts = [f"{parts[0]}: {fitting} of {len(own)} tensors match"]
        reason = "Likely another architecture, depth, width or image size"
    else:
        reason = "Likely a deeper network, or one with more parts. Delete what is no part of it"
    for label, keys in (
        ("missing", lost),
        ("that the backbone does not have", foreign),
        ("of another shape or type", shapes),
    ):
        if keys:
            parts.append(f"{len(keys)} {label} ({some(keys)})")
    return "; ".join(parts) + f". {reason}; check MODEL.BACKBONE against the file."


def _form(theirs: Tensor, own: Tensor) -> str:
    if theirs.shape == own.shape:
        return f"{theirs.dtype} for {own.dtype}"
    return f"{tuple(theirs.shape)} for {tuple(own.shape)}"
