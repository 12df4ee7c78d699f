"""What a linear probe reports: which weights, the accuracy of each head, one table."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from utils import checkpoint
from utils.atomic import write_text
from utils.distributed import is_main, on_main
from utils.evaluate import topk_correct
from utils.run import Run

logger = logging.getLogger("synco")


def find_weights(cfg: CfgNode, pretrained: str | None) -> Path:
    """Return ``pretrained`` (a file, or a run's folder), or the newest valid checkpoint of
    ``OUTPUT/NAME/TAG``.
    """
    folder = Path(pretrained) if pretrained else Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG
    if pretrained and not folder.is_dir():
        return folder
    found = checkpoint.newest_valid(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no checkpoint; pretrain with the same --cfg, --output and --tag first, or give "
            "--pretrained FILE"
        )
    return found.path


def weights_fingerprint(weights: Path | None) -> str:
    """Say which weights a run starts from, by their sha256."""
    return f"weights {on_main(lambda: checkpoint.digest(weights))}" if weights else "random weights"


@torch.no_grad()
def head_accuracies(
    heads: nn.Module, features: Tensor, labels: Tensor, rates: Sequence[float]
) -> dict[str, float]:
    """Return percent top-1 and top-5 of each head (``lr30/top1``) and of the best one (``top1``, ``top5``).

    ``features`` (M, F) are those of the whole evaluation set, so the counts are exact on any number of
    processes.
    """
    counts = sum(
        topk_correct(heads(part), target, (1, 5))
        for part, target in zip(features.split(4096), labels.split(4096), strict=True)
    )
    accuracy = (100.0 * counts.double() / len(labels)).tolist()  # type: ignore[union-attr]
    values = {
        f"lr{rate:g}/top{k}": row[i]
        for rate, row in zip(rates, accuracy, strict=True)
        for i, k in ((0, 1), (1, 5))
    }
    best = max(accuracy)
    return {"top1": best[0], "top5": best[1], **values}


def write_result(
    run: Run,
    label: str,
    best: dict[str, float],
    final: dict[str, float],
    knn: dict[str, float],
    rates: Sequence[float],
) -> dict[str, Any]:
    """Write ``result.json`` of a finished probe and return it: best over epochs, last epoch, k-NN, by
    learning rate.
    """
    chosen = max(rates, key=lambda rate: best.get(f"lr{rate:g}/top1", final[f"lr{rate:g}/top1"]))
    result = {
        "weights": label,
        "lr": chosen,
        "best_top1": best.get("top1", final["top1"]),
        "final_top1": final[f"lr{chosen:g}/top1"],
        "final_top5": final[f"lr{chosen:g}/top5"],
        **knn,
        "final_by_lr": {
            f"{rate:g}": [final[f"lr{rate:g}/top1"], final[f"lr{rate:g}/top5"]] for rate in rates
        },
    }
    if is_main():
        write_text(run.folder / "result.json", json.dumps(result, indent=1))
    run.close()
    return result


def show_probes(results: Sequence[dict[str, Any]]) -> None:
    """Log one line a probed set of weights."""
    knn = [key for key in results[0] if key.startswith("knn") and key.endswith("top1")]
    show_table(results, ["weights", "lr", "best_top1", "final_top1", "final_top5", *knn])


def show_table(results: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Log one line a result, columns aligned."""
    rows = [[_cell(column, result[column]) for column in columns] for result in results]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        logger.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(column: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:g}" if column.startswith("lr") else f"{value:.2f}"
