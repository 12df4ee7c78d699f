"""Say what a pretraining run has learned: a table beside raw pixels and a random backbone.

Example: python tools/report.py --cfg configs/demo.yaml --output O --tag T

Takes the flags of the run and writes report.md, report.json, learning_curve.png and neighbours.png
into its folder. The few-label columns are where pretraining shows: all rows see the same labels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file

from utils.cli import answer_at_once, make_parser, parse, run_main

# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(make_parser(__doc__ or ""))

import json
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data import evaluation_loader
from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.sources import open_split
from data.sources.base import Source
from engine.precision import choose_device
from engine.run import Run
from evaluation.accuracy import extract_features, few_label_accuracy, logistic_probe, topk_correct
from evaluation.knn import knn_accuracy
from models import framework_options, online_backbone
from models.weights.load import load_network
from tools.parts.pictures import nearest, pick_queries, save_learning_curve, save_neighbours
from utils.checkpoints import file as checkpoint
from utils.checkpoints.atomic import write_text
from utils.checkpoints.foreign import read_torch
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import setup_logger
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")

KNN_K = 20
FEW_LABELS = (10, 1)  # a class
DRAWS = 20
PIXEL_SIDE = 32
MANY_IMAGES = 20_000  # with more, probes on thousands of correlated pixels take minutes
PIXEL_COMPONENTS = 256
COLUMNS = {
    "knn": f"k-NN (k={KNN_K})",
    "linear": "linear, all labels",
    "labels10": "10 labels/class",
    "labels1": "1 label/class",
}
NOTES = (
    f"Top-1 accuracy on the test images, percent. k-NN: weighted vote of the {KNN_K} nearest "
    "training images by cosine. Linear: logistic regression on frozen features. Few labels: the "
    f"same, mean ± standard deviation over {DRAWS} draws of the labelled images, equal for all "
    f"rows. Raw pixels: the evaluation view, at most {PIXEL_SIDE} pixels a side, minus the mean "
    f"image ({PIXEL_COMPONENTS} principal components for more than {MANY_IMAGES:,} images). Random "
    "backbone: the run's network before its first step, batch norms as initialised (statistics of "
    "the data change its k-NN by about a point and lower its probes)."
)

# column -> (mean, standard deviation over draws)
Scores = dict[str, tuple[float, float | None] | None]


class Split(NamedTuple):
    """One representation of both splits: features (N, F) and labels (N,), all on the CPU."""

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor


def main() -> int:
    """Report on the run that the flags name; return the exit code."""
    args, flags = parse(make_parser(__doc__ or ""))
    if args.eval or args.throughput:
        raise ValueError("--eval and --throughput belong to the mains; a report takes neither")
    cfg = load_config(declare(framework_options()), [args.cfg], args.opts, flags)
    setup_logger(None, is_main=True)
    run = Run(cfg, Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG, choose_device(cfg.DEVICE))
    # the result, so standard output: the log shows a line break as an escape
    print(report(run))
    return 0


def report(run: Run) -> str:
    """Probe a run's newest valid checkpoint, write report and pictures; return what to show.

    Raises `ValueError` if the run has no checkpoint or its data no labels.
    """
    found = checkpoint.newest_valid(run.folder)
    if found is None:
        raise ValueError(
            f"{run.folder} holds no checkpoint to report on; run main_pretrain.py with the same "
            "--cfg, --output and --tag first"
        )
    train, val = (open_split(run.cfg.DATA, split, labelled=True) for split in ("train", "val"))
    splits = representations(run, train, val, found.path)
    scores = {name: evaluate(split, train.num_classes, run.seed) for name, split in splits.items()}
    images = f"{len(train)} training and {len(val)} test images"
    title = f"{run.cfg.NAME}/{run.cfg.TAG}, step {found.step}, {images}"
    record = {
        "checkpoint": found.path.name,
        "step": found.step,
        "k": KNN_K,
        "draws": DRAWS,
        "rows": _plain(scores),
    }
    write_text(run.folder / "report.json", json.dumps(record, indent=1))
    write_text(run.folder / "report.md", f"# {title}\n\n{markdown_table(scores)}\n\n{NOTES}\n")
    files = [
        run.folder / "report.md",
        *save_pictures(run, train, val, splits["trained backbone"], scores),
    ]
    return "\n".join([f"{title}\n", terminal_table(scores), "", *map(str, files)])


def representations(run: Run, train: Source, val: Source, path: Path) -> dict[str, Split]:
    """Return raw pixels, features of the random and of the trained backbone, for both splits."""
    backbone = run.prepare(build_online(run.cfg))
    random = extract(run, train, val, backbone)
    load_network(backbone, read_torch(path), str(path))
    return {
        "raw pixels": pixel_split(run, train, val),
        "random backbone": random,
        "trained backbone": extract(run, train, val, backbone),
    }


def build_online(cfg: CfgNode) -> nn.Module:
    """Build the run's backbone as pretraining does, with its weights of step 0."""
    torch.manual_seed(keyed_seed("model", cfg.SEED))  # as start_run does before anything is built
    return online_backbone(cfg)


def raw_pixels(images: Tensor) -> Tensor:
    """Turn normalised images (N, 3, S, S) into levels (N, F) in [0, 1], made small."""
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    if images.shape[-1] > PIXEL_SIDE:
        size = (PIXEL_SIDE, PIXEL_SIDE)
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return (images * std + mean).flatten(1)


def pixel_split(run: Run, train: Source, val: Source) -> Split:
    """Return raw pixels minus the mean training image."""
    # the cosine of plain levels would compare little but brightness
    split = extract(run, train, val, raw_pixels)
    # three equal channels would only cost time
    width = split.bank.shape[1] // 3 if _is_grey(split.bank) else split.bank.shape[1]
    bank, queries = split.bank[:, :width], split.queries[:, :width]
    mean = bank.mean(0)
    split = split._replace(bank=bank - mean, queries=queries - mean)
    return split if len(train) <= MANY_IMAGES else principal(split, PIXEL_COMPONENTS)


def principal(split: Split, num: int) -> Split:
    """Project centred features on the ``num`` principal components of the bank."""
    # eigh sorts upwards, so the largest are the last
    axes = torch.linalg.eigh(split.bank.T @ split.bank).eigenvectors[:, -num:]
    return split._replace(bank=split.bank @ axes, queries=split.queries @ axes)


def _is_grey(levels: Tensor) -> bool:
    """Tell whether the three channels of (N, 3 * S * S) are equal: one of them says it all."""
    channels = levels.unflatten(1, (3, -1))
    return bool((channels - channels[:, :1]).abs().max() < 1e-3)


def extract(run: Run, train: Source, val: Source, backbone: Callable[[Tensor], Tensor]) -> Split:
    """Return the features of both splits under the evaluation view."""
    parts: list[Tensor] = []
    with run.evaluating(backbone if isinstance(backbone, nn.Module) else nn.Identity()):
        for source in (train, val):
            batches = evaluation_loader(run.cfg, source, run.device, run.cfg.LINEAR.BATCH_SIZE)
            parts += (tensor.cpu() for tensor in extract_features(backbone, batches))
    return Split(*parts)


def evaluate(split: Split, num_classes: int, seed: int) -> Scores:
    """Return the columns of a row; None where a class has too few images to draw from."""
    bank, labels, queries, answers = split
    logits = logistic_probe(bank, labels, queries, num_classes)
    scores: Scores = {
        "knn": (knn_accuracy(*split, num_classes, (KNN_K,))[f"knn{KNN_K}_top1"], None),
        "linear": (100.0 * int(topk_correct(logits, answers, (1,))) / len(answers), None),
    }
    fewest = int(labels.bincount(minlength=num_classes).min())
    for count in FEW_LABELS:
        enough = fewest >= count
        scores[f"labels{count}"] = (
            few_label_accuracy(*split, num_classes, count, DRAWS, seed) if enough else None
        )
    return scores


def terminal_table(scores: dict[str, Scores]) -> str:
    """Return the table with aligned columns, the best of each marked with a star."""
    return "\n".join("  ".join(row) for row in _aligned(_cells(scores, "{}*", "{} ")))


def markdown_table(scores: dict[str, Scores]) -> str:
    """Return the table as Markdown, the best of each column in bold."""
    header, *rows = _aligned(_cells(scores, "**{}**", "{}"))
    rule = ["-" * len(header[0]), *("-" * (len(cell) - 1) + ":" for cell in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _cells(scores: dict[str, Scores], best: str, other: str) -> list[list[str]]:
    top = {
        column: max((row[column] or (-1.0, None))[0] for row in scores.values())
        for column in COLUMNS
    }
    table = [["", *COLUMNS.values()]]
    for name, row in scores.items():
        cells = [name]
        for column in COLUMNS:
            value = row[column]
            mark = best if value and value[0] == top[column] else other
            cells.append(mark.format(_number(value)))
        table.append(cells)
    return table


def _number(value: tuple[float, float | None] | None) -> str:
    if value is None:
        return "-"
    return f"{value[0]:.1f}" if value[1] is None else f"{value[0]:.1f} ± {value[1]:.1f}"


def _aligned(table: list[list[str]]) -> list[list[str]]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rows = []
    for name, *cells in table:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        rows.append([name.ljust(widths[0]), *right])
    return rows


def _plain(scores: dict[str, Scores]) -> dict[str, object]:
    return {
        name: {
            column: value and {"mean": value[0], "std": value[1]} for column, value in row.items()
        }
        for name, row in scores.items()
    }


def save_pictures(
    run: Run, train: Source, val: Source, trained: Split, scores: dict[str, Scores]
) -> list[Path]:
    """Write the learning curve and the neighbours; return the paths of all pictures of the run."""
    curve, neighbours = run.folder / "learning_curve.png", run.folder / "neighbours.png"
    shown = KNN_K if KNN_K in run.cfg.KNN.K else next(iter(run.cfg.KNN.K), KNN_K)
    baselines = {
        name: row["knn"][0]
        for name, row in scores.items()
        if name != "trained backbone" and row["knn"]
    }
    save_learning_curve(curve, run.folder, f"knn{shown}", baselines if shown == KNN_K else {})
    chosen = pick_queries(trained.query_labels, 8, run.seed)
    save_neighbours(
        neighbours, val, chosen, train, nearest(trained.bank, trained.queries[chosen], 6)
    )
    return [path for path in (run.folder / "views.png", curve, neighbours) if path.exists()]


if __name__ == "__main__":
    run_main(main)
