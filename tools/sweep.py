"""Sweep main_semisup.py over a grid, choose on held-out labels, read the test split once.

Example: python tools/sweep.py --cfg configs/synco_resnet50.yaml --data-path D --output O --tag T
             --train-percent 1 10 --epochs 1:60 10:30 --seeds 0 1 2 -- --opts DATA.NUM_WORKERS 4

Each point of the grid is one run of main_semisup.py on one GPU (or on the CPU), with a share of its
labels held out. When all points are there, the best mean validation accuracy of each start, mode
and percentage is chosen, and the choice is written down for good. Only then is the chosen point
trained again on all labels and the test split read. The same command goes on after a stop and tries
failed points again; a point that diverged (code 3) has lost. What follows -- goes to every run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import Parser, answer_at_once, make_parser, run_main
from utils.names import folder_name

# flags of main_semisup.py that the sweep hands on
HANDED_ON = {
    "cfg": ("FILE", "yaml configuration"),
    "data_path": ("DIR", "folder of the data set"),
    "output": ("DIR", "folder of all runs"),
    "tag": ("NAME", "name of the pretraining run"),
    "dataset": ("NAME", "kind of data set, as in main_semisup.py"),
    "device": ("NAME", "auto, cpu or cuda"),
    "protocol": ("NAME", "published settings, as in main_semisup.py"),
    "batch_size": ("N", "per process"),
}
_DATA = {"data_path": "PATH", "dataset": "DATASET"}


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    for name, (metavar, text) in HANDED_ON.items():
        add(
            f"--{name.replace('_', '-')}",
            metavar=metavar,
            type=int if metavar == "N" else str,
            help=text,
        )
    add("--pretrained", metavar="FILE", help="weights or a run's folder; else the run's own newest")
    add("--subsets", type=Path, metavar="DIR", help="lists named 1percent.txt; else they are drawn")
    add(
        "--hold-out",
        type=float,
        metavar="X",
        default=0.2,
        help="share of the labels for validation, default 0.2",
    )
    add("--jobs", type=int, metavar="N", help="runs at a time; else one a GPU, or one on the CPU")
    add("--name", default="sweep", metavar="NAME", help="of the files of the table, default sweep")
    add("--keep-checkpoints", action="store_true", help="of finished runs")
    _add_grid(parser.add_argument_group("the grid, each value with each"))
    return parser


def _add_grid(group: argparse._ArgumentGroup) -> None:
    def add(flag: str, kind: type[int | float | str], default: Sequence[object], text: str) -> None:
        metavar = "X" if kind is float else "N"
        group.add_argument(flag, nargs="+", type=kind, metavar=metavar, default=default, help=text)

    def choose(flag: str, first: str, second: str) -> None:
        names, text = [first, second], f"{first}, {second}, or both"
        group.add_argument(
            flag, nargs="+", choices=names, metavar="NAME", default=names[:1], help=text
        )

    choose("--start", "pretrained", "random")
    choose("--weights", "finetune", "freeze")
    add("--train-percent", float, [1.0], "of the labels, default 1")
    add("--epochs", str, ["60"], "default 60; 1:60 is for 1 %% only")
    rates = [0.005, 0.01, 0.02, 0.05, 0.1]
    add("--lr-backbone", float, rates, "default 0.005 to 0.1, five of them")
    add("--lr-classifier", float, [0.5], "default 0.5")
    add("--seeds", int, [0], "each point once with each; default 0")


def parse_args(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the sweep's own arguments, and those after -- for its runs."""
    own, extra = _split(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    args = parser.parse_args(own)
    if not 0 < args.hold_out < 1:
        parser.error(f"--hold-out {args.hold_out}: a choice needs validation labels; use e.g. 0.2")
    return args, extra


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    own_words = _split(sys.argv[1:])[0]
    # with words behind -- only there is nothing to answer: an empty line would get the help
    if own_words or len(sys.argv) == 1:
        answer_at_once(_parser(), own_words)

import hashlib
import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from yacs.config import CfgNode

from data.sources import open_split
from evaluation.probe import find_weights, images_of
from models import framework_options
from tools.parts.sweep_points import (
    Group,
    Point,
    Result,
    Setting,
    as_csv,
    choose,
    markdown,
    table,
)
from tools.parts.sweep_runs import Runner
from utils.checkpoints.atomic import write_text
from utils.config.datasets import check_place
from utils.config.load import leaves, load_config
from utils.config.schema import declare, key_class
from utils.logger import setup_logger

logger = logging.getLogger("synco")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the grid, then the choices; print and write the table; return the exit code."""
    args, extra = parse_args(argv)
    folder_name(args.name, "--name")
    setup_logger(None, is_main=True)
    folder, shared, weights, content = _place(args, extra)
    # also where a shell has made a background job ignore it
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    runner = Runner(
        folder, shared, args.subsets, _devices(args), keep=args.keep_checkpoints, content=content
    )
    grid = [Point(s, seed, args.hold_out) for s in settings(args, weights) for seed in args.seeds]
    try:
        found = runner.run(grid)
        choice = recorded_choice(runner, grid, found)
        tests = runner.run(
            [point.on_all_labels() for point in grid if point.setting in choice.values()]
        )
    except KeyboardInterrupt:
        logger.info("stopped; the same command goes on from here")
        return 130
    rows = table(found, choice, tests)
    if rows:
        write_text(folder / f"{args.name}.md", markdown(rows))
        write_text(folder / f"{args.name}.csv", as_csv(rows))
        print(markdown(rows) + f"written to {folder / args.name}.md and .csv")
    for name, reason in runner.failed.items():
        logger.error("%s.log: %s", folder / name, reason)
    if runner.failed.keys() - runner.diverged and not choice:
        logger.error("points are missing: nothing is chosen, no test split read")
        logger.error("start the same command again")
    if not found and runner.codes == {2}:  # each run says that its input is wrong
        return 2
    return 1 if runner.failed else 0


def recorded_choice(
    runner: Runner, grid: Sequence[Point], found: dict[Point, Result]
) -> dict[Group, Setting]:
    """Return this grid's choice: the one written down, else a new one once all points are there.

    A second choice would read the test split a second time, so the first one stays. A group of
    which every point diverged has no choice yet: a later call may make it.
    """
    path = runner.folder / "sweep.choice.json"  # the same file whatever --name the table has
    # the grid is known by its runs, whose names have a digest of all that they depend on
    names = sorted(runner.command(point)[0] for point in grid)
    key = hashlib.sha256("\n".join(names).encode()).hexdigest()
    records = json.loads(path.read_bytes()) if path.exists() else {}
    kept = {
        setting.group: setting for setting in (Setting(**values) for values in records.get(key, []))
    }
    best = choose(found, len({point.seed for point in grid}))
    for group, setting in kept.items():
        if best.get(group, setting) != setting:
            logger.warning(
                "another point is the best now; the choice in %s stays: %s", path, setting
            )
    here = {runner.command(point)[0] for point in found} | runner.diverged
    if here.issuperset(names) and best.keys() - kept.keys():
        if records.keys() - {key}:
            logger.warning("%s has the choice of another grid; its test accuracies were read", path)
        kept = best | kept
        records[key] = [asdict(setting) for setting in kept.values()]
        write_text(path, json.dumps(records, indent=1))  # before the test split is read
    return kept


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def settings(args: argparse.Namespace, weights: str) -> Iterator[Setting]:
    """Yield the grid, without its seeds."""
    starts = [{"pretrained": weights, "random": "none"}[start] for start in args.start]
    heads = args.lr_classifier
    for start, mode, percent in itertools.product(starts, args.weights, args.train_percent):
        # one point: with a frozen backbone all rates are the same run
        rates = [0.0] if mode == "freeze" else args.lr_backbone
        for epochs, rate, head in itertools.product(epochs_of(args.epochs, percent), rates, heads):
            yield Setting(start, mode, percent, epochs, rate, head)


def epochs_of(words: Sequence[str], percent: float) -> list[int]:
    """Return the epochs to try for ``percent``: words ``60`` are for all, ``1:60`` for 1 % only."""
    pairs = [word.rpartition(":") for word in words]
    chosen = [int(epochs) for only, _, epochs in pairs if not only or float(only) == percent]
    if not chosen:
        raise ValueError(
            f"--epochs {' '.join(words)} says nothing for {percent:g} %; add {percent:g}:60"
        )
    return chosen


def _place(args: argparse.Namespace, extra: list[str]) -> tuple[Path, list[str], str, str]:
    """Return the runs' folder, the flags they share, the weights, and a digest of what files say.

    The weights are looked for once: a checkpoint that appears later does not change the sweep.
    """
    given = {name: getattr(args, name) for name in HANDED_ON if getattr(args, name) is not None}
    shared = [
        str(part)
        for name, value in given.items()
        for part in (f"--{name.replace('_', '-')}", value)
    ]
    place = [name for name in ("cfg", "output", "tag") if name in given]
    known = [part for name in place for part in (f"--{name}", given[name])]
    # what the runs are given after -- decides their folder too
    parsed, _ = make_parser("sweep").parse_known_args([*known, *extra])
    flags = {key: value for key, value in vars(parsed).items() if key in ("OUTPUT", "TAG")}
    cfg_keys = declare(framework_options())
    cfg = load_config(cfg_keys, [parsed.cfg], parsed.opts, flags)
    # a wrong path would be found by each run, one after the other
    data = {f"DATA.{key}": given[name] for name, key in _DATA.items() if name in given}
    seen = {k: v for k, v in vars(parsed).items() if k in ("DATA.PATH", "DATA.DATASET")}
    used = load_config(cfg_keys, [parsed.cfg], parsed.opts, {**data, **seen}).DATA
    check_place(used.DATASET, used.PATH, used.DOWNLOAD)
    splits = {split: open_split(used, split, labelled=True) for split in ("train", "val")}
    weights = str(find_weights(cfg, args.pretrained)) if "pretrained" in args.start else "none"
    folder = Path(cfg.OUTPUT) / cfg.NAME / cfg.TAG / "semisup"
    return folder, [*shared, *extra], weights, _content(cfg, args, weights, images_of(**splits))


def _content(
    cfg: CfgNode, args: argparse.Namespace, weights: str, images: Mapping[str, str]
) -> str:
    """Digest what files say: yaml, protocol, weights, lists of labels, the images of both splits.

    A finished run is skipped by its name, so the name has to change with any of them.
    """
    values = {key: value for key, value in leaves(cfg) if key_class(key, "semisup") == "identity"}
    files = [] if weights == "none" else [Path(weights)]
    if args.protocol:
        files.append(ROOT / "configs" / "_base_" / f"finetune_{args.protocol}.yaml")
    if args.subsets:
        files += [
            args.subsets / f"{percent:g}percent.txt"
            for percent in args.train_percent
            if percent < 100
        ]
    state = hashlib.sha256(json.dumps([values, images], sort_keys=True).encode())
    for file in files:
        if file.is_file():  # a missing one is named by the run that needs it
            state.update(hashlib.sha256(file.read_bytes()).digest())
    return state.hexdigest()


def _devices(args: argparse.Namespace) -> list[str]:
    """Return one entry for each run at a time: which GPU it sees, or nothing."""
    count = torch.cuda.device_count() if args.device != "cpu" else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = visible[:count] if visible != [""] else [str(number) for number in range(count)]
    jobs = max(count, 1) if args.jobs is None else args.jobs
    if jobs < 1:
        raise ValueError(f"--jobs: {jobs} runs at a time would run nothing; use 1 or more")
    return [gpus[number % count] if count else "" for number in range(jobs)]


if __name__ == "__main__":
    run_main(main)
