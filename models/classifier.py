"""Put linear classifiers on a frozen or fine-tuned backbone, and load that backbone or refuse.

A probe on half-loaded weights gives a number that looks like a result. So every tensor of the backbone must
be found, and what the file holds beyond it must be a head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Layout(NamedTuple):
    """Say where a kind of file keeps its backbone: under which entry, and with which prefix."""

    name: str
    container: str | None
    prefix: str


# The first layout that fits is taken, so the specific ones stand first. "module." (DDP) is stripped before.
LAYOUTS = (
    Layout("synco pretraining", "framework", "online.backbone."),
    Layout("moco", "state_dict", "encoder_q."),
    Layout("moco-v3", "state_dict", "base_encoder."),
    Layout("moby / synco-v2", "model", "encoder."),  # not encoder_k.
    Layout("state_dict", "state_dict", ""),
    Layout("model", "model", ""),
    Layout("plain", None, ""),
)

_HEADS = ("fc.", "head.", "head_dist.", "classifier.", "projector.", "predictor.")
_DERIVED = ("num_batches_tracked", "relative_position_index", "attn_mask")  # follow from the architecture


@dataclass(frozen=True)
class LoadReport:
    """Account for every key of a load that was accepted."""

    source: str
    matched: int
    missing: tuple[str, ...]  # only num_batches_tracked
    unexpected: tuple[str, ...]  # heads and derived buffers, not loaded

    def __str__(self) -> str:
        """Return one line for the log."""
        heads = sorted({key.split(".")[0] for key in self.unexpected})
        left = f", left out {len(self.unexpected)} ({', '.join(heads)})" if heads else ""
        return f"loaded {self.matched} tensors of the backbone from {self.source}{left}"


def backbone_state(checkpoint: Mapping[str, object]) -> tuple[dict[str, Tensor], str]:
    """Return the backbone's tensors of a loaded checkpoint, heads included, and the layout's name."""
    for layout in LAYOUTS:
        holder = checkpoint if layout.container is None else checkpoint.get(layout.container)
        if not isinstance(holder, Mapping):
            continue
        tensors = {
            str(key).removeprefix("module."): value
            for key, value in holder.items()
            if isinstance(value, Tensor)
        }
        state = {
            key.removeprefix(layout.prefix): t for key, t in tensors.items() if key.startswith(layout.prefix)
        }
        if state:
            return state, layout.name
    raise ValueError(
        f"no backbone found: the file has the entries {sorted(map(str, checkpoint))[:8]};"
        f" known layouts: {', '.join(layout.name for layout in LAYOUTS)}"
    )


def load_backbone(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> LoadReport:
    """Copy `state` into the backbone and account for every key; ValueError, nothing changed, on a poor match.

    `source` is the file's name, for messages. Only num_batches_tracked may be missing, only heads and buffers
    that follow from the architecture may be left over.
    """
    own = backbone.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    matched = {key: state[key] for key in own.keys() & state.keys()}
    lost = [key for key in missing if not key.endswith("num_batches_tracked")]
    foreign = [key for key in unexpected if not key.startswith(_HEADS) and not key.endswith(_DERIVED)]
    misfits = [key for key, tensor in matched.items() if not _fits(tensor, own[key])]
    if lost or foreign or misfits:
        raise ValueError(_refusal(own, state, source, lost, foreign, sorted(misfits)))
    if broken := [key for key, tensor in sorted(matched.items()) if not torch.isfinite(tensor).all()]:
        raise ValueError(
            f"{source}: {len(broken)} tensors are not finite ({_some(broken)}); use another checkpoint"
        )
    backbone.load_state_dict(matched, strict=False)  # every key is accounted for above
    return LoadReport(source, len(matched), tuple(missing), tuple(unexpected))


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
                return f"Its keys carry the prefix {prefix!r}; strip it or add the layout to classifier.py."
        return (
            "No key matches: another architecture, or another naming; check MODEL.BACKBONE against the file."
        )
    return "Likely another architecture, depth, width or image size; check MODEL.BACKBONE against the file."


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (", ..." if len(keys) > 4 else "")


def freeze(backbone: M, active_drop_path: bool = False) -> M:
    """Freeze a backbone for a probe: no gradients, eval mode.

    ``active_drop_path`` leaves it in train mode but for its batch norms, whose statistics must not move: the
    protocol of MoBY (spec V16).
    """
    backbone.requires_grad_(False).train(active_drop_path)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return backbone


class LinearHeads(nn.Module):
    """Hold a grid of linear classifiers over the same features, so that one pass trains all learning rates.

    All heads start from the same weights: "normal" (std 0.01, MoCo) or "trunc" (std 0.02, MoBY), biases 0.
    """

    def __init__(self, num_features: int, num_classes: int, num_heads: int, init: str = "normal") -> None:
        """Draw the common start; ValueError if `init` is unknown."""
        super().__init__()
        weight = torch.empty(num_classes, num_features)
        if init == "normal":
            nn.init.normal_(weight, std=0.01)
        elif init == "trunc":
            nn.init.trunc_normal_(weight, std=0.02)
        else:
            raise ValueError(f"LinearHeads: init {init!r} is unknown; use 'normal' or 'trunc'")
        self.weights = nn.ParameterList(nn.Parameter(weight.clone()) for _ in range(num_heads))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_classes)) for _ in range(num_heads))

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (G, N, C) of features (N, F), as one product of matrices."""
        logits = F.linear(features, torch.cat(list(self.weights)), torch.cat(list(self.biases)))
        return logits.unflatten(1, (len(self.weights), -1)).transpose(0, 1)

    def after_step(self, progress: object) -> None:
        """Do nothing: no target follows a probe's step."""

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return weight and bias of each head, for a parameter group with its own learning rate."""
        return list(zip(self.weights, self.biases, strict=True))

    @torch.no_grad()
    def head(self, index: int) -> nn.Linear:
        """Return a copy of one head as an ordinary linear layer."""
        weight, bias = self.weights[index], self.biases[index]
        linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        return linear


def grid_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy (G,) of each head's logits (G, N, C) for labels (N,).

    With smoothing s: (1 - s) * NLL + s * mean over classes of -log p. The sum of the result gives every head
    the gradient it would have alone.
    """
    log_p = logits.float().log_softmax(dim=-1)
    nll = -log_p.gather(-1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return ((1.0 - smoothing) * nll - smoothing * log_p.mean(dim=-1)).mean(dim=-1)
