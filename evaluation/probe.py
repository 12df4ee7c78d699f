"""What a linear probe is about and reports: weights, grid, the accuracy of each head, one table."""

import functools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.guards import NonFiniteError
from engine.optim import Group, check_optimizer, clips_together
from engine.run import Run
from evaluation.accuracy import topk_correct
from utils.checkpoints import file as checkpoint
from utils.checkpoints.atomic import write_text
from utils.config import strict_yaml
from utils.distributed import all_reduce_sum, is_main, on_main
from utils.names import folder_name

logger = logging.getLogger("synco")

_LOGITS = 1 << 24  # of all heads at a time, 64 MiB


def find_weights(cfg: CfgNode, pretrained: str | None) -> Path:
    """Return `pretrained` or, of a folder or of `OUTPUT/NAME/TAG`, the newest valid checkpoint."""
    folder = Path(pretrained) if pretrained else Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG
    if pretrained and not folder.is_dir():
        return folder
    found = checkpoint.newest_valid(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds no checkpoint; pretrain with the same --cfg, --output and --tag "
            "first, or give --pretrained FILE"
        )
    return found.path


def warn_of_other_pixels(cfg: CfgNode, weights: Path | None) -> None:
    """Warn where the run beside the weights had images of another size or scale."""
    beside = weights.parent / "config.yaml" if weights else None
    if beside is None or not beside.is_file():
        return
    try:
        values = strict_yaml.load(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # another program's file
        return
    data = values.get("DATA") if isinstance(values, dict) else None
    before = data if isinstance(data, dict) else {}
    for key in ("IMG_SIZE", "RANGE", "MEAN", "STD"):
        if key in before and before[key] != cfg.DATA[key]:
            logger.warning(
                "DATA.%s: the weights were trained with %s, now it is %s; give the values of that "
                "run unless this is meant",
                key,
                before[key],
                cfg.DATA[key],
            )


def weights_fingerprint(weights: Path | None, network: str = "online") -> str:
    """Say which weights a run starts from: the file's sha256, and the network if not the online."""
    if weights is None:
        return "random weights"
    digest = on_main(lambda: checkpoint.sha256_of(weights))
    # Runs from before the choice have no name here: they took the online network or the student.
    named = network in ("target", "teacher", "whole")
    return f"weights {digest}" + (f", {network}" if named else "")


class Images(Protocol):
    """What a source of images tells about itself."""

    def fingerprint(self) -> str:
        """Return a digest of names and labels, or of all content."""

    def content(self) -> str:
        """Return a digest of some content, "" where the fingerprint has it all."""


def images_of(**splits: Images) -> dict[str, str]:
    """Return digests of the images of each split: names, labels, and content of some."""
    found = {name: f"{split.fingerprint()} {split.content()}" for name, split in splits.items()}
    return {name: text.strip() for name, text in found.items()}


def weights_label(weights: Path | None, which: str) -> str:
    """Return the name of weights in folders and tables: two networks of a file are two names."""
    if weights is None:
        return "random"
    return f"{weights.stem}-{which}" if which else weights.stem


class GridPoint(NamedTuple):
    """A head's place in the grid: its learning rate, its weight decay, and its name in the log."""

    name: str
    lr: float
    weight_decay: float
    rate: int  # the learning rate's number among LINEAR.LRS


def grid_points(linear: CfgNode) -> list[GridPoint]:
    """Return learning rates x weight decays; a name has the weight decay if there are several.

    Raises `ValueError` for a point that is given twice, and for weight decays that change.
    """
    decays = linear.WEIGHT_DECAYS or [linear.OPTIM.WEIGHT_DECAY]
    if linear.WEIGHT_DECAYS and linear.OPTIM.WEIGHT_DECAY_END:
        raise ValueError(
            "LINEAR.WEIGHT_DECAYS (--weight-decay): each is constant; set "
            f"LINEAR.OPTIM.WEIGHT_DECAY_END to 0 instead of {linear.OPTIM.WEIGHT_DECAY_END:g}"
        )
    points = [
        GridPoint(f"lr{lr:g}" + (f"_wd{decay:g}" if len(decays) > 1 else ""), lr, decay, number)
        for decay in decays
        for number, lr in enumerate(linear.LRS)
    ]
    # Two points of one name would overwrite each other in the log and in the result.
    twice = [name for name, times in Counter(point.name for point in points).items() if times > 1]
    if twice:
        raise ValueError(
            f"LINEAR.LRS (--lr) or LINEAR.WEIGHT_DECAYS (--weight-decay): {', '.join(twice)} "
            "is given twice; name each value once (six digits count)"
        )
    return points


def check_linear(linear: CfgNode) -> None:
    """Raise `ValueError` for a `LINEAR` section whose features or subsets contradict each other."""
    few = [percent for percent in linear.LABEL_PERCENTS if percent < 100]
    if few and not linear.CACHED_FEATURES:
        raise ValueError(
            f"LINEAR.LABEL_PERCENTS (--labels): {few[0]:g} needs --cached-features; with augmented "
            f"views use main_semisup.py --weights freeze --train-percent {few[0]:g}"
        )
    if linear.CACHED_FEATURES and linear.DROP_PATH:
        raise ValueError(
            f"LINEAR.DROP_PATH (--drop-path-rate): {linear.DROP_PATH:g} cannot act in "
            "--cached-features, computed once in eval mode; add --drop-path-rate 0"
        )
    check_optimizer(linear.OPTIM, "LINEAR.")
    # each head of a grid must be the head of a run alone
    if len(grid_points(linear)) > 1 and clips_together(linear.OPTIM):
        raise ValueError(
            f"LINEAR.OPTIM.NAME: {linear.OPTIM.NAME!r} clips the gradients of all heads of a grid "
            "together; give one --lr and one --weight-decay, or use e.g. timm/adamw"
        )


def probe_folder(linear: CfgNode, label: str, percent: float) -> str:
    """Return a probe's folder below its run's: `linear/<weights>[-cached][-<percent>pct]`.

    Raises `ValueError` for the name of a file that would lead elsewhere, such as `...pt`.
    """
    subset = f"-{percent:g}pct" if percent < 100 else ""
    # The stem of a hostile name such as "...pt" would leave the folder.
    place = folder_name(label, "--pretrained: the name of the weights' file, without its ending")
    return f"linear/{place}{'-cached' if linear.CACHED_FEATURES else ''}{subset}"


def diverged(points: Sequence[GridPoint], closed_at: Tensor | None) -> dict[str, int]:
    """Return the names of the points whose heads were closed, and the step of each."""
    steps = [-1] * len(points) if closed_at is None else closed_at.tolist()
    return {point.name: step for point, step in zip(points, steps, strict=True) if step >= 0}


def open_points(points: Sequence[GridPoint], closed_at: Tensor | None) -> dict[int, GridPoint]:
    """Return the points whose heads still train, by their place in the grid."""
    closed = diverged(points, closed_at)
    for name, step in closed.items():
        _say_closed(name, step)
    if len(closed) == len(points):
        raise NonFiniteError(
            f"every head diverged ({', '.join(closed)}); give lower learning rates (--lr)"
        )
    return {number: point for number, point in enumerate(points) if point.name not in closed}


@functools.cache  # once a process
def _say_closed(name: str, step: int) -> None:
    if is_main():
        logger.warning(
            "%s diverged at step %d and was closed; the other heads go on. Its lr is too high",
            name,
            step,
        )


def _right_and_total(heads: nn.Module, blocks: Sequence[tuple[Tensor, Tensor]]) -> list[int]:
    """Return the counts of top-1 and top-5 of each head, then of images, over all ranks."""
    num_heads = len(list(heads.parameters())) // 2  # a weight (C, F) and a bias (C,) each
    device = next(heads.parameters()).device
    counts = torch.zeros(2 * num_heads + 1, dtype=torch.int64, device=device)
    # The logits of all heads at once would be num_heads times a batch's: cut to 64 MiB.
    size = max(1, _LOGITS // sum(p.shape[0] for p in heads.parameters()))
    for features, labels in blocks:
        for part, target in zip(features.split(size), labels.split(size), strict=True):
            counts[:-1] += topk_correct(heads(part), target, (1, 5)).flatten()
        counts[-1] += len(labels)
    return all_reduce_sum(counts).tolist()


def head_groups(
    optim: CfgNode,
    pairs: Sequence[tuple[nn.Parameter, nn.Parameter]],
    points: Sequence[GridPoint],
) -> list[Group]:
    """Return the parameter groups of heads, given by weight and bias, at their points."""
    groups: list[Group] = []
    for (weight, bias), point in zip(pairs, points, strict=True):
        group: Group = {"rate": point.rate, "weight_decay": point.weight_decay}
        if optim.NAME == "lars":  # exempts biases, as in pretraining
            exempt: Group = {"params": [bias], "weight_decay": 0.0, "exempt": True, "adapt": False}
            groups += [{**group, "params": [weight]}, {**group, **exempt}]
        else:
            groups.append({**group, "params": [weight, bias]})
    return groups


@torch.no_grad()
def head_accuracies(
    heads: nn.Module, blocks: Sequence[tuple[Tensor, Tensor]], points: Mapping[int, GridPoint]
) -> dict[str, float]:
    """Return percent top-1 and top-5 of each head (`lr30/top1`) and of the best (`top1`).

    `blocks` are this process's (features, labels), on its device; the counts of all processes are
    summed. `points` are those to report, by their place in the grid.
    """
    *right, total = _right_and_total(heads, blocks)
    accuracy = {
        point.name: [100.0 * count / total for count in right[2 * place : 2 * place + 2]]
        for place, point in points.items()
    }
    top1, top5 = max(accuracy.values())
    values = {"top1": top1, "top5": top5}
    for name, row in accuracy.items():
        values[f"{name}/top1"], values[f"{name}/top5"] = row
    return values


def write_result(
    run: Run,
    what: Mapping[str, object],
    best: Mapping[str, float],
    final: Mapping[str, float],
    knn: Mapping[str, float],
    points: Sequence[GridPoint],
    closed_at: Tensor | None = None,
) -> dict[str, object]:
    """Write `result.json` of a finished probe and return it.

    It begins with the entries of `what`. Weight decays are named where there are several. Heads
    that diverged are listed with their step and have no accuracy.
    """
    closed = diverged(points, closed_at)
    trained = [point for point in points if point.name not in closed]

    def best_of(point: GridPoint) -> float:
        return best.get(f"{point.name}/top1", final[f"{point.name}/top1"])

    # By the best epoch, as the published tables do; the final accuracy is written too.
    chosen = max(trained, key=best_of)
    several = len({point.weight_decay for point in points}) > 1
    result = {
        **what,
        "lr": chosen.lr,
        **({"weight_decay": chosen.weight_decay} if several else {}),
        "best_top1": best_of(chosen),
        "final_top1": final[f"{chosen.name}/top1"],
        "final_top5": final[f"{chosen.name}/top5"],
        **knn,
        "final_by_point" if several else "final_by_lr": {
            point.name if several else f"{point.lr:g}": [
                final[f"{point.name}/top{k}"] for k in (1, 5)
            ]
            for point in trained
        },
        **({"diverged": closed} if closed else {}),
    }
    if is_main():
        path = run.folder / "result.json"
        write_text(path, json.dumps(result, indent=1))
        show_grid(final, trained, chosen)
        logger.info("  result: %s", path)
    run.close()
    return result


def show_grid(final: Mapping[str, float], trained: Sequence[GridPoint], best: GridPoint) -> None:
    """Log the accuracies of each head after the last epoch, if there are several."""
    width = max(len(point.name) for point in trained)
    for point in trained if len(trained) > 1 else []:
        top1, top5 = (final[f"{point.name}/top{k}"] for k in (1, 5))
        mark = "  <- chosen" if point is best else ""
        logger.info("  %s  top1 %5.2f  top5 %5.2f%s", point.name.ljust(width), top1, top5, mark)


def show_probes(results: Sequence[Mapping[str, object]]) -> None:
    """Log one line a probe: weights, labels where they are not all, and the grid's best."""
    knn = [key for key in results[0] if key.startswith("knn") and key.endswith("top1")]
    few = ["labels", "images"] if any(result["labels"] != "100pct" for result in results) else []
    grid = [key for key in ("lr", "weight_decay") if key in results[0]]
    show_table(results, ["weights", *few, *grid, "best_top1", "final_top1", "final_top5", *knn])


def show_table(results: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Log one line a result, columns aligned."""
    rows = [[_cell(column, result[column]) for column in columns] for result in results]
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        logger.info("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def _cell(column: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:g}" if column.startswith(("lr", "weight_decay")) else f"{value:.2f}"
