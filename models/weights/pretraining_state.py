"""Bring whole pretraining states of the published codes over: both networks, heads, queues."""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.weights.find import all_paths
from models.weights.naming import to_our_names

Rename = Callable[[str], str]


def framework_state(
    checkpoint: Mapping[str, object], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return a published checkpoint as the state dict of the framework whose state dict is `own`.

    Knows MoCo v1/v2, SynCo, MoCo v3, BatchFormer, MoBY, SynCo-v2 and its BYOL. Raises `ValueError`
    listing what is missing, left over or of another shape.
    """
    paths = all_paths(checkpoint)
    # the names of the query encoder tell whose code wrote the file
    if tensors := _beside("encoder_q", paths):
        found = _encoders(tensors, {"encoder_q.": "online.", "encoder_k.": "target."}, _moco_head)
    elif tensors := _beside("base_encoder", paths):
        pairs = {"base_encoder.": "online.", "momentum_encoder.": "target."}
        found = _encoders(tensors, pairs, _mocov3_head(tensors))
        found.update({key: t for key, t in tensors.items() if key.startswith("predictor.")})
    elif tensors := _beside("encoder", paths):
        found = _encoders(tensors, {"encoder.": "online.", "encoder_k.": "target."}, lambda key: "")
        found.update(_moby_heads(tensors))
    else:
        raise ValueError(
            "holds no whole pretraining state of a known code; import its backbone instead"
        )
    found.update(_queues(tensors, own))
    for key, tensor in own.items():
        if key.endswith("num_batches_tracked"):  # absent before torch 0.4.1
            found.setdefault(key, tensor)
    _refuse_poor_match(found, own)
    return found


def _beside(encoder: str, paths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an encoder and of all that lies next to it, behind any wrappers."""
    # the words before the encoder's name in its first path are the wrappers
    for path in paths:
        words = path.split(".")
        if encoder in words:
            place = "".join(f"{word}." for word in words[: words.index(encoder)])
            return {p.removeprefix(place): t for p, t in paths.items() if p.startswith(place)}
    return {}


def _encoders(
    tensors: Mapping[str, Tensor], sides: Mapping[str, str], head_name: Rename
) -> dict[str, Tensor]:
    """Rename encoders to ours; `head_name(key)` is our name of a head's tensor, or ""."""
    result = {}
    for prefix, side in sides.items():
        state = {
            key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)
        }
        backbone = {key: tensor for key, tensor in state.items() if not head_name(key)}
        for key, tensor in to_our_names(backbone)[0].items():
            result[f"{side}backbone.{key}"] = tensor
        result.update(
            {side + head_name(key): tensor for key, tensor in state.items() if head_name(key)}
        )
    return result


def _moco_head(key: str) -> str:
    if match := re.fullmatch(r"fc\.(\d\.)?(weight|bias)", key):
        return f"projector.{match[1] or '0.'}{match[2]}"
    return ""


def _mocov3_head(tensors: Mapping[str, Tensor]) -> Rename:
    """Return the renaming of MoCo v3's projector."""
    # BatchFormer is the first layer of their projector. Ours is a separate module.
    shift = 1 if any(".0.encoder_layers." in key for key in tensors) else 0

    def rename(key: str) -> str:
        if match := re.fullmatch(r"(?:fc|head)\.0\.encoder_layers\.(.+)", key):
            return f"batchformer.layers.0.{match[1]}"
        if match := re.fullmatch(r"(?:fc|head)\.(\d+)\.(.+)", key):
            return f"projector.{int(match[1]) - shift}.{match[2]}"
        return ""

    return rename


def _moby_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename MoBY's MLPs."""
    result = {}
    for theirs, ours in (
        ("projector.", "online.projector."),
        ("projector_k.", "target.projector."),
        ("predictor.", "predictor."),
    ):
        state = {
            key.removeprefix(theirs): t for key, t in tensors.items() if key.startswith(theirs)
        }
        num_hidden = sum(
            tensor.ndim == 2 for key, tensor in state.items() if key.startswith("linear_hidden.")
        )
        for key, tensor in state.items():
            if match := re.fullmatch(r"linear_hidden\.(\d+)\.(.+)", key):
                # Their hidden layers (linear, norm, ReLU) come after an identity.
                result[f"{ours}{int(match[1]) - 1}.{match[2]}"] = tensor
            elif match := re.fullmatch(r"linear_out\.(.+)", key):
                # a hidden layer is three modules in ours: linear, norm, ReLU
                result[f"{ours}{3 * num_hidden}.{match[1]}"] = tensor
    return result


def _queues(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the queues as rows of keys (K, D), and their positions."""
    result: dict[str, Tensor] = {}
    for name in ("queue", "queue1", "queue2"):
        if name in tensors and f"{name}.keys" in own:
            keys, shape = tensors[name], own[f"{name}.keys"].shape
            # MoCo keeps columns of keys, (D, K), SynCo rows.
            result[f"{name}.keys"] = keys if keys.shape == shape else keys.T.contiguous()
            result[f"{name}._extra_state"] = torch.tensor(int(tensors["queue_ptr"]))
    return result


def _refuse_poor_match(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    # tables that follow from the sizes; timm builds its own
    derived = ("relative_position_index", "attn_mask")
    missing = sorted(own.keys() - found.keys())
    left = sorted(key for key in found.keys() - own.keys() if not key.endswith(derived))
    shapes = [
        f"{key} {tuple(found[key].shape)} for {tuple(own[key].shape)}"
        for key in sorted(own.keys() & found.keys())
        if found[key].shape != own[key].shape
    ]
    parts = [
        f"{len(keys)} {label} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for label, keys in (("missing", missing), ("left over", left), ("of another shape", shapes))
        if keys
    ]
    if parts:
        raise ValueError(
            f"does not fit the framework: {'; '.join(parts)}; "
            "check MODEL in --cfg, or leave out --full"
        )
