"""Put linear classifiers on a frozen or fine-tuned backbone."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from models.parts.backbones import Backbone

M = TypeVar("M", bound=nn.Module)


def freeze(backbone: M, active_drop_path: bool = False) -> M:
    """Freeze a backbone for a probe: no gradients, eval mode.

    With `active_drop_path` it stays in train mode, but for its batch norms.
    """
    # MoBY's protocol: drop path stays active, and a module has only one switch for all
    backbone.requires_grad_(False).train(active_drop_path)
    for module in backbone.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # train mode would also move their running statistics
            module.eval()
    return backbone


def _start(weight: Tensor, init: str) -> Tensor:
    """Draw a classifier's first weights in place."""
    if init == "normal":
        return nn.init.normal_(weight, std=0.01)
    if init == "trunc":
        return nn.init.trunc_normal_(weight, std=0.02)
    raise ValueError(f"HEAD_INIT: {init!r} is unknown; use 'normal' or 'trunc'")


class LinearHeads(nn.Module):
    """Hold a grid of linear classifiers on the same features; one pass over the data trains all.

    All heads start from the same weights: "normal" (std 0.01, MoCo) or "trunc" (std 0.02, MoBY),
    biases 0.
    """

    def __init__(
        self, num_features: int, num_classes: int, num_heads: int, init: str = "normal"
    ) -> None:
        """Draw the common start; ValueError if `init` is unknown."""
        super().__init__()
        # one start for all, so that heads differ by their rates only
        weight = _start(torch.empty(num_classes, num_features), init)
        self.weights = nn.ParameterList(nn.Parameter(weight.clone()) for _ in range(num_heads))
        self.biases = nn.ParameterList(
            nn.Parameter(torch.zeros(num_classes)) for _ in range(num_heads)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits (G, N, C) of features (N, F)."""
        # One product a head: its logits are bit-identical to those of a run alone. One product for
        # all heads would first copy all weights into one matrix, which costs more.
        logits = [F.linear(features, weight, bias) for weight, bias in self.pairs()]
        return torch.stack(logits, dim=1).transpose(0, 1)

    def after_step(self, progress: object) -> None:
        """Do nothing: no target follows a probe's step."""

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return weight and bias of each head, for a parameter group with its own learning rate."""
        return list(zip(self.weights, self.biases, strict=True))

    @torch.no_grad()
    def head(self, index: int) -> nn.Linear:
        """Return a copy of one head as an ordinary linear layer."""
        weight, bias = self.weights[index], self.biases[index]
        linear = nn.Linear(
            weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype
        )
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
        return linear


def grid_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy (G,) of each head's logits (G, N, C) for labels (N,).

    With smoothing s: (1 - s) * NLL + s * mean over classes of -log p.
    """
    # float32: in half precision small probabilities round to 0
    log_p = logits.transpose(0, 1).float().log_softmax(dim=-1)  # (N, G, C), as the heads left it
    nll = -log_p.gather(-1, labels[:, None, None].expand(-1, len(logits), 1)).squeeze(-1)
    if smoothing:
        # Smoothing mixes the label with the uniform distribution.
        nll = (1.0 - smoothing) * nll - smoothing * log_p.mean(dim=-1)
    # Not a mean over heads: the sum of these gives every head the gradient it would have alone.
    return nll.mean(dim=0)


class Classifier(nn.Module):
    """Put a class head on a backbone. SiT's two class tokens get one head each (arXiv:2104.03602).

    `representation_size` R puts Linear(F, R) and tanh before each head, which makes it a head of
    two layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        representation_size: int = 0,
        init: str = "normal",
    ) -> None:
        """Draw the heads, `init` as in `LinearHeads`."""
        super().__init__()
        self.backbone = backbone
        self.two_tokens = getattr(backbone, "num_prefix_tokens", 1) == 2
        self.heads = nn.ModuleList(
            _class_head(backbone.num_features, num_classes, representation_size, init)
            for _ in range(2 if self.two_tokens else 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (T, N, C) of images (N, 3, H, W): one set for each of the T heads."""
        if self.two_tokens:  # (N, 2 + patches, F) after the final norm
            features = self.backbone.forward_features(images)[:, :2].unbind(1)
        else:
            features = (self.backbone(images),)
        return torch.stack(
            [head(feature) for head, feature in zip(self.heads, features, strict=True)]
        )

    def predict(self, images: Tensor) -> Tensor:
        """Return float32 logits (N, C): the mean over the heads."""
        return self(images).float().mean(0)

    def after_step(self, progress: object) -> None:
        """Do nothing: no target follows a classifier's step."""


def _class_head(
    num_features: int, num_classes: int, representation_size: int, init: str
) -> nn.Sequential:
    last = _linear(representation_size or num_features, num_classes, init)
    if representation_size:
        return nn.Sequential(_linear(num_features, representation_size, "trunc"), nn.Tanh(), last)
    return nn.Sequential(last)


def _linear(width_in: int, width_out: int, init: str) -> nn.Linear:
    linear = nn.Linear(width_in, width_out)
    _start(linear.weight, init)
    nn.init.zeros_(linear.bias)
    return linear


def layer_ids(backbone: Backbone) -> dict[str, int]:
    """Return the layer number of each parameter by timm's group matcher; the stem is layer 0.

    The final norm belongs to the last block. Raises `ValueError` for a model that timm cannot take
    apart.
    """
    matcher = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise ValueError(
            "FINETUNE.LAYER_DECAY: timm knows no layers of this backbone; set it to 1.0"
        )
    return group_parameters(backbone, matcher(coarse=False), reverse=True)


def soft_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy (T,) of each head's logits (T, N, C) for shares (N, C)."""
    return -(targets * logits.float().log_softmax(dim=-1)).sum(-1).mean(-1)
