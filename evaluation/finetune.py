"""What fine-tuning adds to a run: folder, parameter groups, accuracies, and results."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.optim import Group, parameter_groups, with_layer_decay
from engine.run import Run
from evaluation.accuracy import topk_correct
from evaluation.probe import weights_label
from utils.batch import Batch
from utils.checkpoints import file as checkpoint
from utils.checkpoints.atomic import write_text
from utils.config.load import leaves
from utils.config.schema import KEYS, key_class, plain
from utils.distributed import all_reduce_sum, is_main

logger = logging.getLogger("synco")

# the "rate" of a parameter group: which base rate of the plan it follows
BACKBONE, CLASSIFIER = 0, 1


def check_finetune(node: CfgNode) -> None:
    """Raise `ValueError` for a `FINETUNE` section that would train or measure nothing."""
    if node.WEIGHTS == "finetune" and not node.LR_BACKBONE:
        raise ValueError(
            "FINETUNE.LR_BACKBONE (--lr-backbone): 0 would not fine-tune; give a rate such as "
            "0.01, or use --weights freeze"
        )
    if node.WEIGHTS == "freeze" and node.LR_BACKBONE:
        logger.warning("--lr-backbone %g has no effect on a frozen backbone", node.LR_BACKBONE)
    if not node.TEST and not node.HOLD_OUT:
        raise ValueError(
            "FINETUNE.TEST: False leaves nothing to evaluate; set FINETUNE.HOLD_OUT, e.g. 0.2"
        )


def run_name(cfg: CfgNode, weights: Path | None, which: str = "") -> str:
    """Return the name of a run's folder: weights, labels, rates, and a digest of all else."""
    # So no two points of a sweep share a folder, and the same command finds its own again.
    node = cfg.FINETUNE
    labels = Path(node.SUBSET).stem if node.SUBSET else f"{node.TRAIN_PERCENT:g}pct"
    said = f"{weights_label(weights, which)}-{labels}-{node.WEIGHTS}"
    rates = f"lr{node.LR_BACKBONE:g}-{node.LR_CLASSIFIER:g}-{node.EPOCHS}ep"
    # A list of labels may have any name; a folder may not.
    return re.sub(r"[^\w.-]", "_", f"{said}-{rates}-{_digest(cfg, weights)}")


def _digest(cfg: CfgNode, weights: Path | None) -> str:
    """Digest weights, identity keys that are not default, list of labels, and global batch."""
    defaults = {name: plain(key.default) for name, key in KEYS.items()}
    # Only what differs from the defaults: a key that a later version adds renames no folder.
    own = {
        key: value
        for key, value in leaves(cfg)
        if key_class(key, "semisup") == "identity" and defaults.get(key) != value
    }
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # asked before the processes have joined
    batch = cfg.FINETUNE.BATCH_SIZE * cfg.TRAIN.ACCUMULATION_STEPS * processes
    parts = [json.dumps(own, sort_keys=True), str(batch)]
    if weights and weights.is_file():  # two files of one name are two starts
        parts.append(checkpoint.sha256_of(weights))
    if cfg.FINETUNE.SUBSET:
        try:
            parts.append(hashlib.sha256(Path(cfg.FINETUNE.SUBSET).read_bytes()).hexdigest())
        except OSError as error:
            raise ValueError(
                f"--subset {cfg.FINETUNE.SUBSET}: cannot be read ({error}); check the path"
            ) from error
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def fitting_batch(num_images: int, wanted: int, share: int, even: bool = False) -> int:
    """Return the global batch: `wanted` images, or as many as there are, a multiple of `share`.

    `share` is processes x micro-batches; `even`: the images of one micro-batch are paired.
    Raises `ValueError` if the images are too few, or `wanted` cannot be paired.
    """
    # Every micro-batch of every process must be even to be paired within itself.
    unit = 2 * share if even else share
    if wanted % unit:
        raise ValueError(
            f"FINETUNE.BATCH_SIZE (--batch-size) {wanted // share}: Mixup pairs images; use an "
            "even one"
        )
    fitting = min(wanted, num_images // unit * unit)
    if not fitting:
        raise ValueError(
            f"FINETUNE.TRAIN_PERCENT (--train-percent): {num_images} labelled images are too few "
            f"for {share} processes x micro-batches{' of pairs' if even else ''}; use more labels "
            "or fewer processes"
        )
    return fitting


def finetune_groups(
    backbone: nn.Module, heads: nn.Module, node: CfgNode, layers: Mapping[str, int] | None = None
) -> list[Group]:
    """Return the parameter groups of an `OPTIM` section: backbone and heads follow a rate each.

    With `layers` (parameter name -> number of its layer, the last one highest) a layer's
    `lr_scale` is that of the next times `FINETUNE.LAYER_DECAY`, the heads' being 1 (Bao et al.
    2021, arXiv:2106.08254).
    """
    groups = [{**group, "rate": BACKBONE} for group in parameter_groups(backbone, node.OPTIM)]
    if layers:
        above = max(layers.values()) + 1
        scale = {
            parameter: node.LAYER_DECAY ** (above - layers[name])
            for name, parameter in backbone.named_parameters()
        }
        # A group has one rate, so each layer becomes a group.
        groups = with_layer_decay(groups, scale)
    return [
        *groups,
        *({**group, "rate": CLASSIFIER} for group in parameter_groups(heads, node.OPTIM)),
    ]


class FrozenCheck:
    """Remember a frozen module, to prove afterwards that nothing in it has moved."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Buffers too: running statistics move without a gradient.
        self._before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def check(self) -> None:
        """Raise `RuntimeError` unless every parameter and buffer is bit-identical."""
        now = self._module.state_dict()
        moved = [
            name for name, tensor in self._before.items() if not torch.equal(tensor, now[name])
        ]
        if moved:
            raise RuntimeError(
                f"{len(moved)} tensors of the frozen backbone moved: {', '.join(moved[:4])}"
            )


@torch.no_grad()
def accuracy(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    prefix: str,
    device: torch.device,
) -> dict[str, float]:
    """Return percent top-1 and top-5 over the batches of all ranks, which share no image.

    Counts are summed before they are divided, so the number of ranks changes nothing. `predict`
    gives logits (N, C) and is in eval mode.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    for batch in batches:
        counts[:2] += topk_correct(predict(batch.views[0]), batch.labels, (1, 5))
        counts[2] += len(batch.labels)
    right1, right5, total = all_reduce_sum(counts).tolist()
    return {f"{prefix}top1": 100.0 * right1 / total, f"{prefix}top5": 100.0 * right5 / total}


def summarise(
    run: Run,
    weights: str,
    images: tuple[int, int],
    accuracies: Mapping[str, float],
    best: Mapping[str, float],
    write: bool = True,
) -> dict[str, object]:
    """Return the results of a run, `write` them to `result.json`, and close the run.

    `images` are those trained on and held out; `accuracies` are of the last epoch's weights.
    """
    node = run.cfg.FINETUNE
    result = {
        "weights": weights,
        "mode": node.WEIGHTS,
        "labels": Path(node.SUBSET).stem if node.SUBSET else f"{node.TRAIN_PERCENT:g}pct",
        "images": images[0],
        "held_out": images[1],
        "lr_backbone": node.LR_BACKBONE,
        "lr_classifier": node.LR_CLASSIFIER,
        "epochs": node.EPOCHS,
        "seed": run.cfg.SEED,
        **{f"last_{name}": value for name, value in accuracies.items()},
        **{f"best_{name}": value for name, value in best.items()},
    }
    # The best epoch is chosen on the test split itself, so its accuracy is optimistic.
    if not node.HOLD_OUT:
        logger.info(
            "best: over epochs on the test split, as published scripts report; last: not chosen"
        )
    if write and is_main():
        path = run.folder / "result.json"
        write_text(path, json.dumps(result, indent=1))
        logger.info("  result: %s", path)
    run.close()
    return result


def columns_of(results: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the table's columns: what was trained, then last and best accuracies."""
    first = ["weights", "mode", "labels", "images", "lr_backbone", "lr_classifier"]
    return [*first, *(key for key in results[0] if key.startswith(("last_", "best_")))]
