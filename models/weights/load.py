"""Read pretrained backbones: know the published layouts, load every tensor or refuse.

A probe on half-loaded weights gives a number that looks like a result. So every tensor of the
backbone must be found, and what the file holds beyond it must be a head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.mocov3_vit import sincos_positions
from models.weights.naming import find_naming, in_our_names


class Layout(NamedTuple):
    """Say where a kind of file keeps its networks: under which entry, and with which prefix.

    `target` is the entry and prefix of the averaged network, if the file has one. `words` are what
    the original calls the two networks.
    """

    name: str
    container: str | None
    prefix: str
    target: tuple[str, str] | None = None
    words: tuple[str, str] = ("online", "target")


class Network(NamedTuple):
    """One network of a file, heads included, and what else the file holds."""

    state: dict[str, Tensor]  # in our names
    layout: str
    taken: str  # online, target, student or teacher
    others: tuple[str, ...]

    def __str__(self) -> str:
        """Return what the log says: the layout, and which of several networks was taken."""
        if not self.others:
            return f"layout: {self.layout}"
        also = ", ".join(f"{name} (--which {name})" for name in self.others)
        return f"layout: {self.layout}; took {self.taken}, the file also holds: {also}"


WHICH = {"online": 0, "student": 0, "target": 1, "teacher": 1}  # a network's place in a layout

# The first layout that fits is taken, so the specific ones stand first. "module." (DDP) is stripped
# before.
LAYOUTS = (
    Layout("synco pretraining", "framework", "online.backbone.", ("framework", "target.backbone.")),
    Layout("synco fine-tuning", "framework", "backbone."),
    Layout("moco", "state_dict", "encoder_q.", ("state_dict", "encoder_k.")),
    Layout("moco-v3", "state_dict", "base_encoder.", ("state_dict", "momentum_encoder.")),
    Layout("moby / synco-v2", "model", "encoder.", ("model", "encoder_k.")),
    Layout("student and teacher", "student", "", ("teacher", ""), ("student", "teacher")),
    Layout("state_dict", "state_dict", ""),
    Layout("model", "model", "", ("model_ema", "")),
    Layout("plain", None, ""),
)

_HEADS = (
    *("fc.", "head.", "heads.", "head_dist.", "classifier.", "projector.", "predictor.", "pooler."),
    *(
        "rot_head.",
        "contrastive_head.",
        "convTrans.",
        "rot_w",
        "contrastive_w",
        "recons_w",
        "pre_logits",
    ),
)
# follow from the architecture
_DERIVED = ("num_batches_tracked", "relative_position_index", "attn_mask")
# MoCo v3's ViT-S has 12 heads, DeiT's 6, and the tensors have the same shapes
_AMBIGUOUS_WIDTH = 384


@dataclass(frozen=True)
class LoadReport:
    """Account for every key of a load that was accepted."""

    source: str
    matched: int
    missing: tuple[str, ...]  # only num_batches_tracked
    unexpected: tuple[str, ...]  # heads and derived buffers, not loaded
    resized: tuple[str, ...] = ()  # tables of positions, interpolated to this model's size

    def __str__(self) -> str:
        """Return one line for the log."""
        heads = sorted({key.split(".")[0] for key in self.unexpected})
        left = f", left out {len(self.unexpected)} ({', '.join(heads)})" if heads else ""
        sizes = f", resized {_some(list(self.resized))}" if self.resized else ""
        return f"loaded {self.matched} tensors of the backbone from {self.source}{left}{sizes}"


def find_network(
    checkpoint: Mapping[str, object], which: str = "", source: str = "this file"
) -> Network:
    """Return one network of a loaded checkpoint in our names, heads included.

    `which` is a key of `WHICH`; empty: the network that the original evaluates. `source` is the
    file's name, for messages. Raises `ValueError` if there is no such network.
    """
    for layout in LAYOUTS:
        held = _networks(checkpoint, layout)
        if not held:
            continue
        taken = layout.words[WHICH[which]] if which else _evaluated(checkpoint, held)
        if taken not in held:
            raise ValueError(
                f"--which {which}: {source} of the layout {layout.name} keeps no {which} network; "
                f"use {' or '.join(held)}"
            )
        state, naming = in_our_names(held[taken])
        name = f"{layout.name}, {naming}" if naming else layout.name
        return Network(state, name, taken, tuple(word for word in held if word != taken))
    framework = checkpoint.get("framework")
    if isinstance(framework, Mapping) and "weights.0" in framework:
        raise ValueError(
            "no backbone found: a probe keeps its linear heads only; give the pretraining checkpoint"
        )
    raise ValueError(
        f"no backbone found: the file has the entries {sorted(map(str, checkpoint))[:8]};"
        f" known layouts: {', '.join(layout.name for layout in LAYOUTS)}"
    )


def _networks(checkpoint: Mapping[str, object], layout: Layout) -> dict[str, dict[str, Tensor]]:
    """Return the networks that a file holds if the layout fits, by the layout's words."""
    online = _entries(checkpoint, layout.container, layout.prefix)
    target = _entries(checkpoint, *layout.target) if layout.target else {}
    found = dict(zip(layout.words, (online, target), strict=True))
    return {word: state for word, state in found.items() if state}


def _evaluated(checkpoint: Mapping[str, object], held: Mapping[str, dict[str, Tensor]]) -> str:
    """Return the network that the original evaluates: DINO and iBOT the teacher, all others the online.

    SiT's files have a student and a teacher too. A head that reconstructs images tells them apart.
    """
    if "teacher" in held and not any(
        "recons" in key for key in tensors_of(checkpoint.get("student"))
    ):
        return "teacher"
    return next(iter(held))


def backbone_state(
    checkpoint: Mapping[str, object], which: str = ""
) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a network (see `find_network`) and the layout's name."""
    network = find_network(checkpoint, which)
    return network.state, network.layout


def load_network(
    backbone: nn.Module, checkpoint: Mapping[str, object], source: str, which: str = ""
) -> str:
    """Load a network of a checkpoint into the backbone; return what was loaded, for the log."""
    network = find_network(checkpoint, which, source)
    return f"{load_backbone(backbone, network.state, source)} ({network})"


def check_norm_eps(checkpoint: Mapping[str, object], norm_eps: float, source: str) -> None:
    """Raise ValueError if a file was imported with another MODEL.BACKBONE.NORM_EPS, which no tensor shows."""
    imported = checkpoint.get("imported")
    theirs = imported.get("norm_eps", norm_eps) if isinstance(imported, Mapping) else norm_eps
    if theirs != norm_eps:
        raise ValueError(
            f"MODEL.BACKBONE.NORM_EPS: {norm_eps}, but {source} was imported with {theirs}; "
            f"add --opts MODEL.BACKBONE.NORM_EPS {theirs}"
        )


def tensors_of(holder: object) -> dict[str, Tensor]:
    """Return the tensors and arrays of a mapping, without DDP's ``module.``; empty for anything else."""
    if not isinstance(holder, Mapping):
        return {}
    return {
        str(key).removeprefix("module."): torch.from_numpy(value)
        if isinstance(value, np.ndarray)
        else value
        for key, value in holder.items()
        if isinstance(value, Tensor)
        or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")
    }


def _entries(
    checkpoint: Mapping[str, object], container: str | None, prefix: str
) -> dict[str, Tensor]:
    """Return what stands under a prefix, itself stripped; ``backbone.`` wrappers count as prefixes."""
    tensors = tensors_of(checkpoint if container is None else checkpoint.get(container))
    if prefix and find_naming(tensors):
        return {}  # torchvision's and Hugging Face's ViTs call their blocks "encoder" too
    if not prefix and any(key.startswith("backbone.") for key in tensors):
        prefix = "backbone."
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy `state` into the backbone and account for every key; ValueError, nothing changed, on a poor match.

    `source` is the file's name, for messages. Only num_batches_tracked may be missing, only heads
    and buffers that follow from the architecture may be left over. Tables of positions of another
    image size are interpolated (bicubic, class tokens kept), and the report says so.
    """
    own = backbone.state_dict()
    state, resized = _resized(state, own, backbone)
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    matched = {key: state[key] for key in own.keys() & state.keys()}
    lost = [key for key in missing if not key.endswith("num_batches_tracked")]
    foreign = [
        key for key in unexpected if not key.startswith(_HEADS) and not key.endswith(_DERIVED)
    ]
    misfits = [key for key, tensor in matched.items() if not _fits(tensor, own[key])]
    if lost or foreign or misfits:
        raise ValueError(_refusal(own, state, source, lost, foreign, sorted(misfits)))
    _refuse_other_heads(backbone, matched, own, source)
    if broken := [
        key for key, tensor in sorted(matched.items()) if not torch.isfinite(tensor).all()
    ]:
        raise ValueError(
            f"{source}: {len(broken)} tensors are not finite ({_some(broken)}); use another checkpoint"
        )
    backbone.load_state_dict(matched, strict=False)  # every key is accounted for above
    return LoadReport(source, len(matched), tuple(missing), tuple(unexpected), resized)


def _resized(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], backbone: nn.Module
) -> tuple[Mapping[str, Tensor], tuple[str, ...]]:
    """Interpolate ViT's table of positions and Swin's relative ones where only their size differs."""
    result, notes = dict(state), []
    for key, tensor in state.items():
        if key not in own or tensor.shape == own[key].shape or not tensor.is_floating_point():
            continue
        if key == "pos_embed" and tensor.ndim == 3:
            rows, cols = cast(Any, backbone).patch_embed.grid_size
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
            f"{source} is MoCo v3's ViT-S with 12 heads (its positions are fixed sines), the backbone has 6;"
            " set MODEL.BACKBONE.NAME vit_small"
        )
    if ours and not theirs and heads == 12:
        raise ValueError(
            f"{source} is a ViT-S with learned positions, so DeiT's with 6 heads; the backbone has 12;"
            " set MODEL.BACKBONE.NAME deit_small"
        )


def is_sincos(positions: Tensor) -> bool:
    """Tell whether positions (1, tokens + h*h, F) are MoCo v3's fixed ones, or fine-tuned from them."""
    side = math.isqrt(positions.shape[1])
    patches = positions[0, -side * side :].float().flatten()
    fixed = sincos_positions(side, side, positions.shape[-1])[0, 1:].flatten()
    return bool(F.cosine_similarity(patches, fixed, dim=0) > 0.9)


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
    """Say what does not match, in numbers and examples, and the likely reason."""
    shapes = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in misfits]
    fitting = len(own.keys() & state.keys()) - len(misfits)
    parts = [f"{source} does not fit the backbone: {fitting} of {len(own)} tensors match"]
    for label, keys in (("missing", lost), ("unexpected", foreign), ("wrong shape", shapes)):
        if keys:
            parts.append(f"{len(keys)} {label} ({_some(keys)})")
    return "; ".join(parts) + f". {_likely_reason(own, state, lost)}"


def _likely_reason(own: Mapping[str, Tensor], state: Mapping[str, Tensor], lost: list[str]) -> str:
    if state and all(key.startswith(_HEADS) for key in state):
        return "The file holds a head only; give the pretraining checkpoint."
    if not own.keys() & state.keys():
        for key in lost:
            if prefix := next((k.removesuffix(key) for k in state if k.endswith("." + key)), None):
                return f"Its keys carry the prefix {prefix!r}; strip it or add the layout to weights.py."
        return "No key matches: another architecture, or another naming; check MODEL.BACKBONE against the file."
    return "Likely another architecture, depth, width or image size; check MODEL.BACKBONE against the file."


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")
