"""Optimisers and their parameter groups."""

from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias

import timm.optim
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from utils.config.schema import KEYS

Group: TypeAlias = dict[str, Any]  # a parameter group: "params", and options of any type

_TIMM = "timm/"
_TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed", "relative_position_bias_table")


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888) as MoCo v3 and BYOL use it.

    Matrices: g <- g + wd w; g <- g * trust |w| / |g| (1 if either norm is 0). Groups with
    `adapt=False` (biases and norms) get neither. Then mu <- momentum mu + g; w <- w - lr mu.
    """

    def __init__(
        self,
        params: Iterable[Group],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
            "adapt": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters, on a GPU with a handful of multi-tensor operations a group."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and params[0].is_cuda:
                # One call for all tensors of a group: a loop would launch a kernel for each.
                self._update(params, group)
                continue
            # A CPU takes one tensor after the other: each stays in the cache over all operations.
            for p in params:
                self._update([p], group)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        if group["adapt"]:
            grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
            torch._foreach_mul_(grads, self._trust(params, grads, group["trust_coefficient"]))
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        torch._foreach_add_(params, buffers, alpha=-group["lr"])

    @staticmethod
    def _trust(params: list[Tensor], grads: list[Tensor], coefficient: float) -> list[Tensor]:
        weight_norms = torch.stack(torch._foreach_norm(params))
        grad_norms = torch.stack(torch._foreach_norm(grads))
        ratio = coefficient * weight_norms / grad_norms
        # A norm of 0 would give 0 or infinity: such a matrix keeps the plain rate.
        usable = (weight_norms > 0) & (grad_norms > 0)
        return list(torch.where(usable, ratio, torch.ones_like(ratio)).unbind())


def check_optimizer(node: CfgNode, section: str = "") -> None:
    """Raise `ValueError` for a `timm/<name>` that timm lacks or that our loop cannot serve.

    `section` (`LINEAR.`) is the section around `OPTIM`, for the message.
    """
    if not node.NAME.startswith(_TIMM):
        return
    name, known = node.NAME.removeprefix(_TIMM), timm.optim.list_optimizers()
    key = f"{section}OPTIM.NAME: {node.NAME!r}"
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{key} is not in timm {timm.__version__}; the nearest is {_TIMM}{near}")
    info = timm.optim.get_optimizer_info(name)
    if info.second_order:
        raise ValueError(
            f"{key} needs second derivatives, which the training loop does not compute; use an "
            f"optimiser of first order, e.g. {_TIMM}lamb"
        )
    # Such a decay compares the rate with one peak; ours has a schedule for each group.
    if (info.defaults or {}).get("corrected_weight_decay"):
        raise ValueError(
            f"{key} corrects its weight decay by one peak rate, and parameter groups here have "
            f"rates of their own; use one without the correction, e.g. {_TIMM}adamw"
        )
    _check_installed(name, key)


def _check_installed(name: str, key: str) -> None:
    try:
        timm.optim.get_optimizer_class(name, bind_defaults=False)
    except (AssertionError, ImportError) as error:  # of bitsandbytes and APEX
        raise ValueError(f"{key} cannot run here ({error}); use e.g. {_TIMM}lamb") from error


def _timm_optimizer(node: CfgNode, groups: list[Group]) -> torch.optim.Optimizer:
    """Build timm's optimiser over our groups; a key at its default means timm's default."""
    name = node.NAME.removeprefix(_TIMM)
    info = timm.optim.get_optimizer_info(name)
    options: dict[str, Any] = {}
    if node.BETAS != KEYS["OPTIM.BETAS"].default and info.num_betas == 2:
        options["betas"] = tuple(node.BETAS)
    if node.EPS != KEYS["OPTIM.EPS"].default:
        options["eps"] = node.EPS
    # timm drops what an optimiser does not take. MADGRAD refuses a rate of 0, which the engine
    # replaces before the first step anyway.
    return timm.optim.create_optimizer_v2(
        groups,
        name,
        lr=1.0,
        weight_decay=node.WEIGHT_DECAY,
        momentum=node.MOMENTUM,
        **options,
    )


def clips_together(node: CfgNode) -> bool:
    """Tell whether an optimiser clips the gradients of all its parameters by one norm."""
    if not node.NAME.startswith(_TIMM):
        return False
    probed = _timm_optimizer(node, [{"params": [nn.Parameter(torch.zeros(1, 1))]}])
    return bool(probed.defaults.get("max_grad_norm"))


def parameter_groups(module: nn.Module, node: CfgNode) -> list[Group]:
    """Split the trainable parameters into those that decay and those that do not.

    LARS always exempts one-dimensional parameters; the others only with `EXCLUDE_1D`.
    `EXCLUDE_TOKENS` adds class tokens, positions, relative position tables and what timm exempts in
    the backbone; the published MoBY code (arXiv:2105.04553) decays them. `EXCLUDE_RULE` "norms" is
    the rule of Swin's detectors and segmenters (arXiv:2103.14030): names with "norm", tables and
    positions, but neither biases nor the batch norms of heads, whose names hold no "norm".
    "norm_layers" is Detectron2's: what norm layers hold, whatever it is called.
    """
    rule = node.EXCLUDE_RULE
    exempt_1d = (node.EXCLUDE_1D and rule == "1d") or node.NAME == "lars"
    exempt_tokens = (node.EXCLUDE_TOKENS and rule != "norm_layers") or rule == "norms"
    in_norms = _in_norm_layers(module) if rule == "norm_layers" else set()
    decay: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    named_by_timm = _named_by_timm(module) if node.EXCLUDE_TOKENS else set()
    for name, parameter in module.named_parameters():
        is_1d = parameter.ndim <= 1 or name.endswith(".bias")
        is_token = name.rsplit(".", 1)[-1] in _TOKENS or name in named_by_timm
        no_decay = (exempt_1d and is_1d) or (exempt_tokens and is_token)
        no_decay = no_decay or (rule == "norms" and "norm" in name) or name in in_norms
        if parameter.requires_grad:
            (exempt if no_decay else decay).append(parameter)
    without: Group = {"params": exempt, "weight_decay": 0.0, "exempt": True}
    if node.NAME == "lars":
        without["adapt"] = False
    groups: list[Group] = [{"params": decay}, without]
    return [group for group in groups if group["params"]]


def _in_norm_layers(module: nn.Module) -> set[str]:
    """Return the names of the parameters of norm layers."""
    names: set[str] = set()
    for path, part in module.named_modules():
        # timm has norm classes of its own, so the name of the class tells
        if "norm" in type(part).__name__.lower():
            own = part.named_parameters(recurse=False)
            names |= {f"{path}.{name}".lstrip(".") for name, _ in own}
    return names


def _named_by_timm(module: nn.Module) -> set[str]:
    """Return the parameters that timm's models list in `no_weight_decay`."""
    # Such as the scales and position MLPs of Swin v2's attention: no rule on names finds them.
    names: set[str] = set()
    for path, part in module.named_modules():
        listed = getattr(part, "no_weight_decay", None)
        if callable(listed):
            names |= {f"{path}.{name}".lstrip(".") for name in listed()}
    return names


def with_layer_decay(groups: Iterable[Group], scale: Mapping[nn.Parameter, float]) -> list[Group]:
    """Split groups so that each has one `lr_scale`, its parameters' `scale` (1 if not in it)."""
    return [
        {**group, "params": [p for p in group["params"] if scale.get(p, 1.0) == value]}
        | {"lr_scale": value}
        for group in groups
        for value in sorted({scale.get(p, 1.0) for p in group["params"]})
    ]


def build_optimizer(
    node: CfgNode, groups: list[Group], *, fused: bool = True
) -> torch.optim.Optimizer:
    """Build the optimiser of an `OPTIM` section; `fused` must be False under a gradient scaler."""
    # With a scaler a fused optimiser skips a step that overflowed by itself, and fused SGD then
    # leaves a fresh momentum buffer uninitialised.
    if node.NAME.startswith(_TIMM):
        return _timm_optimizer(node, groups)
    # The engine sets the learning rate before each step.
    common = {"lr": 0.0, "weight_decay": node.WEIGHT_DECAY}
    match node.NAME:
        case "sgd":
            return torch.optim.SGD(
                groups,
                momentum=node.MOMENTUM,
                nesterov=node.NESTEROV and node.MOMENTUM > 0,
                fused=fused,
                **common,
            )
        case "adamw":
            beta1, beta2 = node.BETAS
            return torch.optim.AdamW(
                groups, betas=(beta1, beta2), eps=node.EPS, fused=fused, **common
            )
        case "lars":
            return LARS(
                groups, momentum=node.MOMENTUM, trust_coefficient=node.TRUST_COEFFICIENT, **common
            )
    raise ValueError(f"OPTIM.NAME: {node.NAME!r} is not one of sgd, adamw, lars")
