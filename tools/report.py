"""Say what pretraining runs have learned: one HTML page, a table, pictures.

Example: python tools/report.py output/demo/demo1

Takes folders of runs (or the flags of one run) and writes report.html, report.md, report.json,
learning_curve.png and neighbours.png into each. With several, the page of the first shows them
side by side. The few-label columns are where pretraining shows: all rows see the same labels.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file

from utils.cli import Parser, answer_at_once, make_parser, parse, run_main

# of the flags of a run, which are all taken, those that mean something here
_USEFUL = ("DATA.PATH", "DATA.DATASET", "OUTPUT", "TAG", "DEVICE", "SEED", "TRAIN.PRECISION")


def _parser() -> Parser:
    parser = make_parser(__doc__ or "")
    for action in parser._actions:
        if action.option_strings and action.dest not in (*_USEFUL, "cfg", "opts", "help"):
            action.help = argparse.SUPPRESS
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: RUN/report.html")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    # read when torch is loaded: on a busy machine spinning threads make this ten times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    answer_at_once(_parser())

import json
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data import evaluation_loader
from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.sources import open_split
from data.sources.base import Source, subset
from engine.precision import choose_device
from engine.run import Run
from evaluation.accuracy import extract_features, few_label_accuracy, logistic_probe, topk_correct
from evaluation.knn import knn_accuracy
from models import framework_options, online_backbone
from models.weights.load import load_network
from tools.parts.report.changed_keys import changed_keys
from tools.parts.report.looks import (
    Strip,
    attention_maps,
    attention_strips,
    feature_map_chart,
    neighbour_strips,
    reconstruction_tiles,
    view_strips,
)
from tools.parts.report.page import RunPage, write_page
from tools.parts.report.pictures import nearest, pick_queries, save_learning_curve, save_neighbours
from tools.parts.report.score_table import (
    DRAWS,
    FEW_LABELS,
    KNN_K,
    MANY_IMAGES,
    NOTES,
    PIXEL_COMPONENTS,
    PIXEL_SIDE,
    Scores,
    cells,
    markdown_table,
    plain,
    terminal_table,
)
from tools.parts.run_files import open_run_files
from utils.checkpoints import file as checkpoint
from utils.checkpoints.atomic import write_text
from utils.checkpoints.foreign import read_torch
from utils.config.key import Value
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import setup_logger
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")


class Split(NamedTuple):
    """One representation of both splits: features (N, F) and labels (N,), all on the CPU."""

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor


class Measured(NamedTuple):
    """What a report says of a run: its checkpoint, its data, its features and their scores."""

    run: Run
    found: checkpoint.Found
    train: Source
    val: Source
    splits: dict[str, Split]
    scores: dict[str, Scores]
    title: str


def main() -> int:
    """Report on the runs that the command line names; return the exit code."""
    args, flags = parse(_parser())
    if args.eval or args.throughput:
        raise ValueError("--eval and --throughput belong to the mains; a report takes neither")
    setup_logger(None, is_main=True)
    runs = open_runs(args.runs, args.cfg, args.opts, flags)
    # the results, so standard output: the log shows a line break as an escape
    measured = []
    for run in runs:
        measured.append(measure(run))
        print(write_report(measured[-1]), flush=True)
    page = args.html or runs[0].folder / "report.html"
    few = max(2, 8 // len(runs))  # so that the page of many runs stays small
    write_page(page, [run_page(one, few) for one in measured], NOTES)
    print(page)
    return 0


def open_runs(
    folders: list[Path], cfg: str | None, opts: list[str], flags: Mapping[str, Value]
) -> list[Run]:
    """Return the runs in `folders`, or the one that the flags name if there is none."""
    schema = declare(framework_options())
    if not folders:
        tree = load_config(schema, [cfg], opts, flags)
        folder = Path(tree.OUTPUT) / tree.NAME / tree.TAG
        return [Run(tree, folder, choose_device(tree.DEVICE), training=False)]
    if cfg:
        raise ValueError("--cfg: a run's folder has its own config.yaml; leave out --cfg")
    runs = []
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is no folder of a run: it has no config.yaml")
        tree = load_config(schema, [folder / "config.yaml"], opts, flags)
        runs.append(Run(tree, folder, choose_device(tree.DEVICE), training=False))
    return runs


def measure(run: Run) -> Measured:
    """Probe a run's newest valid checkpoint.

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
    scores = {}
    for name, split in splits.items():
        logger.info("probing %s", name)
        scores[name] = evaluate(split, train.num_classes, run.seed)
    images = f"{len(train)} training and {len(val)} test images"
    title = f"{run.cfg.NAME}/{run.cfg.TAG}, step {found.step}, {images}"
    return Measured(run, found, train, val, splits, scores, title)


def write_report(measured: Measured) -> str:
    """Write the table and the pictures of a run into its folder; return what to show."""
    folder, scores, title = measured.run.folder, measured.scores, measured.title
    record = {
        "checkpoint": measured.found.path.name,
        "step": measured.found.step,
        "k": KNN_K,
        "draws": DRAWS,
        "rows": plain(scores),
    }
    write_text(folder / "report.json", json.dumps(record, indent=1))
    write_text(folder / "report.md", f"# {title}\n\n{markdown_table(scores)}\n\n{NOTES}\n")
    trained = measured.splits["trained backbone"]
    pictures = save_pictures(measured.run, measured.train, measured.val, trained, scores)
    files = [folder / "report.md", *pictures]
    return "\n".join([f"{title}\n", terminal_table(scores), "", *map(str, files)])


def run_page(measured: Measured, rows: int) -> RunPage:
    """Return what the page shows of a run, with `rows` rows of each kind of picture."""
    run, found, train, val, splits, scores, title = measured
    files = open_run_files(run.folder)
    levels = _baselines(scores)
    recipe, changed = changed_keys(run.cfg, files)
    marks = [[cell.startswith("*") for cell in line] for line in cells(scores, "*{}", "{}")[1:]]
    table, chance = cells(scores, "{}", "{}"), 100.0 / train.num_classes
    page = RunPage(files, title, table, marks, levels, chance, recipe, changed)
    page.views = view_strips(run.cfg, train, rows)
    trained, random = splits["trained backbone"], splits["random backbone"]
    chosen = pick_queries(trained.query_labels, rows, run.seed)
    features = [(name, splits[name].bank, splits[name].queries) for name in list(splits)[:0:-1]]
    page.neighbours = neighbour_strips(features, chosen, val, train)
    for name, split in (("trained backbone", trained), ("random backbone", random)):
        page.maps.append(feature_map_chart(name, split.queries, split.query_labels, run.seed))
    page.map_classes = list(val.classes)
    page.attention = attention(run, val, found.path, chosen)
    page.reconstructions = reconstruction_tiles(run.folder)
    return page


def attention(run: Run, val: Source, path: Path, chosen: Tensor) -> list[Strip]:
    """Return the attention of a ViT on the `chosen` test images; nothing for other networks."""
    backbone = run.prepare(build_online(run.cfg))
    if not hasattr(backbone, "blocks"):
        return []
    load_network(backbone, read_torch(path), str(path))
    batches = evaluation_loader(run.cfg, subset(val, chosen), run.device, len(chosen))
    images = next(iter(batches)).views[0]
    with run.evaluating(backbone):
        maps = attention_maps(backbone, images)
    return [] if maps is None else attention_strips(images.cpu(), maps)


def representations(run: Run, train: Source, val: Source, path: Path) -> dict[str, Split]:
    """Return raw pixels, features of the random and of the trained backbone, for both splits."""
    backbone = run.prepare(build_online(run.cfg))
    logger.info("%s: features of the random backbone, of raw pixels, of %s", run.folder, path.name)
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


def _baselines(scores: dict[str, Scores]) -> dict[str, float]:
    rows = {name: row["knn"] for name, row in scores.items() if name != "trained backbone"}
    return {name: cell[0] for name, cell in rows.items() if cell}


def save_pictures(
    run: Run, train: Source, val: Source, trained: Split, scores: dict[str, Scores]
) -> list[Path]:
    """Write the learning curve and the neighbours; return the paths of all pictures of the run."""
    curve, neighbours = run.folder / "learning_curve.png", run.folder / "neighbours.png"
    shown = KNN_K if KNN_K in run.cfg.KNN.K else next(iter(run.cfg.KNN.K), KNN_K)
    baselines = _baselines(scores)
    save_learning_curve(curve, run.folder, f"knn{shown}", baselines if shown == KNN_K else {})
    chosen = pick_queries(trained.query_labels, 8, run.seed)
    save_neighbours(
        neighbours, val, chosen, train, nearest(trained.bank, trained.queries[chosen], 6)
    )
    return [path for path in (run.folder / "views.png", curve, neighbours) if path.exists()]


if __name__ == "__main__":
    run_main(main)
