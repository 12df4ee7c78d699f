"""Say what pretraining runs have learned: one HTML page, a table, pictures.

Example: python tools/report.py output/demo/demo1

Takes folders of runs (or the flags of one run) and writes report.html, report.md, report.json,
learning_curve.png and neighbours.png into each. With several, the page of the first shows them
side by side. The few-label columns are where pretraining shows: all rows see the same labels.
"""

import argparse
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
    answer_at_once(_parser())

import json
import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

from data import evaluation_loader
from data.pixels import refuse_other_pixels
from data.sources import is_labelled, open_split
from data.sources.base import Source, subset
from engine.precision import choose_device
from engine.run import Run
from models import framework_options
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
from tools.parts.report.measure import (
    PIXELS,
    RANDOM,
    TRAINED,
    Split,
    build_online,
    evaluate,
    knn_levels,
    representations,
)
from tools.parts.report.page import RunPage, write_page
from tools.parts.report.pictures import nearest, pick_queries, save_learning_curve, save_neighbours
from tools.parts.report.score_table import (
    DRAWS,
    KNN_K,
    NOTES,
    Scores,
    cells,
    markdown_table,
    plain,
    terminal_table,
)
from tools.parts.run_files import RunFiles, open_run_files
from utils.checkpoints import file as checkpoint
from utils.checkpoints.atomic import write_text
from utils.checkpoints.foreign import read_torch
from utils.config.key import Value
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import setup_logger
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")

_MOST_QUERIES, _MOST_UNLABELLED = 1000, 20_000  # images of a report on data without a test split


class Images(NamedTuple):
    """The images of a report: neighbours of `queries` are looked for in `bank`."""

    bank: Source
    queries: Source
    labelled: bool
    in_train: bool = False  # the queries are training images too

    @property
    def words(self) -> str:
        """Say how many images these are."""
        bank, queries = f"{len(self.bank):,} training", f"{len(self.queries):,}"
        if not self.in_train:
            return f"{bank} and {queries} test images"
        kind = "images" if self.labelled else "images without labels"
        return f"{bank} {kind}, {queries} others of them as queries"


class Measured(NamedTuple):
    """What a report says of a run: its checkpoint, its data, its features and their scores."""

    run: Run
    files: RunFiles
    found: checkpoint.Found
    images: Images
    splits: dict[str, Split]
    scores: dict[str, Scores]  # none without labels
    title: str

    @property
    def curve(self) -> str:
        """Return the k-NN accuracy that the curve shows, such as `knn20`."""
        return next(iter(self.files.knn_names()), f"knn{KNN_K}_top1").removesuffix("_top1")

    @property
    def levels(self) -> dict[str, float]:
        """Return the k-NN accuracies of what was not trained, for the k of the curve."""
        if not self.scores:
            return {}
        others = {name: self.splits[name] for name in (PIXELS, RANDOM)}
        classes, temperature = self.images.bank.num_classes, self.run.cfg.KNN.TEMPERATURE
        return knn_levels(others, classes, int(self.curve[3:]), temperature)


def main() -> int:
    """Report on the runs that the command line names; return the exit code."""
    args, flags = parse(_parser())
    if args.eval or args.throughput or args.show_config:
        raise ValueError(
            "--eval, --throughput and --show-config belong to the mains; a report takes none"
        )
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
    """Probe a run's newest valid checkpoint; `ValueError` if the run has none."""
    found = checkpoint.newest_valid(run.folder)
    if found is None:
        raise ValueError(
            f"{run.folder} holds no checkpoint to report on; run main_pretrain.py with the same "
            "--cfg, --output and --tag first"
        )
    refuse_other_pixels(run.cfg.DATA)
    images = open_images(run.cfg)
    logger.info("%s: %s, %s", run.folder, found.path.name, images.words)
    splits, bank, queries = representations(
        run, images.bank, images.queries, found.path, images.in_train
    )
    images = images._replace(bank=bank, queries=queries)
    scores = {}
    for name, split in splits.items() if images.labelled else ():
        logger.info("probing %s", name)
        classes, temperature = images.bank.num_classes, run.cfg.KNN.TEMPERATURE
        scores[name] = evaluate(split, classes, run.seed, temperature)
    title = f"{run.cfg.NAME}/{run.cfg.TAG}, step {found.step}, {images.words}"
    return Measured(run, open_run_files(run.folder), found, images, splits, scores, title)


def open_images(cfg: CfgNode) -> Images:
    """Return both splits with labels or, where there are none, two parts of the training images."""
    try:
        bank, queries = (open_split(cfg.DATA, split, labelled=True) for split in ("train", "val"))
    except ValueError as error:
        train = open_split(cfg.DATA, "train")  # a wrong path ends here
        logger.warning("%s. The report takes some training images as queries", error)
        return _in_two(train, cfg.SEED)
    return Images(bank, queries, True)


def _in_two(train: Source, seed: int) -> Images:
    if len(train) < 2:
        raise ValueError("a report needs at least 2 images: one, and its neighbour")
    generator = torch.Generator().manual_seed(keyed_seed("queries", seed))
    order = torch.randperm(len(train), generator=generator)
    asked = min(_MOST_QUERIES, max(1, len(train) // 5))
    labelled = is_labelled(train)
    # pictures need no more; an accuracy is of all images
    last = None if labelled else asked + _MOST_UNLABELLED
    bank, queries = (
        subset(train, part.sort().values) for part in (order[asked:last], order[:asked])
    )
    return Images(bank, queries, labelled, in_train=True)


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
    pictures = save_pictures(measured)
    shown = [f"![{path.stem.replace('_', ' ')}]({path.name})" for path in pictures]
    table = [markdown_table(scores), NOTES] if scores else ["No labels, so no accuracies."]
    write_text(folder / "report.md", "\n\n".join([f"# {title}", *table, *shown]) + "\n")
    files = map(str, [folder / "report.md", *pictures])
    return "\n".join([f"{title}\n", *([terminal_table(scores), ""] if scores else []), *files])


def run_page(measured: Measured, rows: int) -> RunPage:
    """Return what the page shows of a run, with `rows` rows of each kind of picture."""
    run, splits, scores = measured.run, measured.splits, measured.scores
    bank, queries, labelled = measured.images[:3]
    recipe, changed = changed_keys(run.cfg, measured.files)
    page = RunPage(measured.files, measured.title, recipe=recipe, changed=changed)
    if labelled:
        page.levels, page.chance = measured.levels, 100.0 / bank.num_classes
        marked = cells(scores, "*{}", "{}")[1:]
        page.best = [[cell.startswith("*") for cell in line] for line in marked]
        page.table = cells(scores, "{}", "{}")
    page.views = view_strips(run.cfg, bank, rows)
    trained = splits[TRAINED]
    chosen = pick_queries(trained.query_labels, rows, run.seed)
    features = [(name, splits[name].bank, splits[name].queries) for name in (TRAINED, RANDOM)]
    page.neighbours = neighbour_strips(features, chosen, queries, bank)
    for name, _, rows_of in features:
        page.maps.append(feature_map_chart(name, rows_of, trained.query_labels, run.seed))
    page.map_classes = list(queries.classes)
    page.attention = attention(run, queries, measured.found.path, chosen)
    page.reconstructions = reconstruction_tiles(run.folder)
    return page


def attention(run: Run, queries: Source, path: Path, chosen: Tensor) -> list[Strip]:
    """Return the attention of a ViT on the `chosen` queries; nothing for other networks."""
    backbone = run.prepare(build_online(run.cfg))
    if not hasattr(backbone, "blocks"):
        return []
    load_network(backbone, read_torch(path), str(path))
    batches = evaluation_loader(run.cfg, subset(queries, chosen), run.device, len(chosen))
    images = next(iter(batches)).views[0]
    with run.evaluating(backbone):
        maps = attention_maps(backbone, images)
    return [] if maps is None else attention_strips(images.cpu(), maps)


def save_pictures(measured: Measured) -> list[Path]:
    """Write the learning curve and the neighbours; return the paths of all pictures of the run."""
    folder, images = measured.run.folder, measured.images
    curve, neighbours = folder / "learning_curve.png", folder / "neighbours.png"
    save_learning_curve(curve, folder, measured.curve, measured.levels, measured.files.events())
    splits = [(name, measured.splits[name]) for name in (TRAINED, RANDOM)]
    chosen = pick_queries(splits[0][1].query_labels, 8, measured.run.seed)
    found = {name: nearest(split.bank, split.queries[chosen], 6) for name, split in splits}
    save_neighbours(neighbours, images.queries, chosen, images.bank, found)
    return [path for path in (folder / "views.png", curve, neighbours) if path.exists()]


if __name__ == "__main__":
    run_main(main)
