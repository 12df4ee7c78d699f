"""Start a method from a file of weights: both networks, and the heads and queue that it has."""

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from yacs.config import CfgNode

from models.parts.momentum import KeyQueue, MomentumFramework
from models.weights.find import WHICH, some, tensors_of
from models.weights.load import check_norm_eps, load_network, refuse_not_finite
from utils.checkpoints.foreign import read_torch

logger = logging.getLogger("synco")


def start_from(framework: MomentumFramework, cfg: CfgNode, weights: Path, which: str = "") -> None:
    """Give a fresh method the weights of a file, in any layout.

    Both networks take the file's network `which`. Without `which`, each takes its own of a file of
    ours that has both, and otherwise both take the one that the original evaluates. Heads,
    predictor and queue come along from a file of ours, or of `convert.py import --full`, if all
    heads fit. Raises `ValueError` if the file lacks a part of the backbone.
    """
    checkpoint, source = read_torch(weights), str(weights)
    check_norm_eps(checkpoint, cfg.MODEL.BACKBONE.NORM_EPS, source)
    online, target = framework.online.backbone, framework.target.backbone
    loaded = load_network(online, checkpoint, source, which)
    logger.info("%s", loaded)
    found = tensors_of(checkpoint.get("framework"))
    own_target = not which and any(key.startswith("target.backbone.") for key in found)
    if own_target:
        logger.info("target network: %s", load_network(target, checkpoint, source, "target"))
    else:
        logger.info("both networks start from its %s network", loaded.network.taken)
        # a target that started elsewhere would pull its queries away from these weights
        target.load_state_dict(online.state_dict())
    side = "" if own_target else ("online", "target")[WHICH[loaded.network.taken]]
    logger.info("%s", _load_rest(framework, found, source, side))


def _load_rest(
    framework: MomentumFramework, found: Mapping[str, Tensor], source: str, side: str
) -> str:
    """Load heads and queues; say what was taken. `side`: the network that both heads come from."""
    own = framework.state_dict()
    queues = {n: part for n, part in framework.named_modules() if isinstance(part, KeyQueue)}
    taken: dict[str, Tensor] = {}
    misfits: list[str] = []
    for key, tensor in own.items():
        first, _, rest = key.partition(".")
        # Backbones are loaded already, queues after the heads.
        if rest.startswith("backbone.") or key.startswith(tuple(f"{name}." for name in queues)):
            continue
        theirs = found.get(f"{side}.{rest}" if side and first in ("online", "target") else key)
        if theirs is None or theirs.shape != tensor.shape:
            misfits.append(key)
        else:
            taken[key] = theirs
    if misfits:
        # A predictor on another projector is no better than a random one: all heads or none.
        why = f"{some(misfits)} is missing or of another shape" if found else "the file has none"
        return f"heads, predictor and queue start at random: {why}"
    for name in queues:
        keys = found.get(f"{name}.keys")
        # The position stays 0: that of another batch size would not divide the queue.
        if keys is not None and keys.shape == own[f"{name}.keys"].shape:
            taken[f"{name}.keys"] = keys
    refuse_not_finite(taken, source)
    framework.load_state_dict(taken, strict=False)
    fresh = [name for name in queues if f"{name}.keys" not in taken]
    said = f"; {', '.join(fresh)} starts at random: missing or of another size" if fresh else ""
    parts = sorted({".".join(key.split(".")[:2]) for key in taken if not key[-1].isdigit()})
    return f"also took {', '.join(parts)}{said}"
