"""Train and judge all entries of a study; keep each result; make a table and a picture of them.

Example: python tools/reproduce.py methods_resnet8 --data-path D

NAME is a file of benchmarks/studies/. Each entry trains for the study's CPU minutes, counted over
all its processes: a short run measures its speed first, and its schedule ends with the budget. A
k-NN and linear probes (1, 10 and 100 % of the labels, images without augmentation) judge it
afterwards. Each result is a line of docs/results/studies.jsonl, which all studies share: the same
recipe and seed is trained once. A changed recipe is another one. The same command goes on after a
stop; started twice, two entries train side by side. --render only writes docs/results/NAME.md and
NAME.svg again.

A faster machine trains more epochs in the same time, so the time of one machine fixes the epochs of
a table. --machine AMD adds rows to the table of the machine that is called so: each entry trains as
many epochs as that machine's time holds, which its earlier rows tell. Where it has no row of an
entry, the study's `speed_like` names another entry, and the speeds of both here tell it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.cli import Parser, answer_at_once, run_main


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("study", metavar="NAME", help="a file of benchmarks/studies/, or its path")
    add("--data-path", default="", metavar="DIR", help="folder of the data set")
    add("--tier", choices=["cpu", "gpu"], default="cpu", help="which machine trains [cpu]")
    add("--seeds", nargs="+", type=int, metavar="N", help="instead of the study's")
    add("--entries", nargs="+", metavar="NAME", help="only these entries")
    add("--work", type=Path, default=Path("output/studies"), metavar="DIR", help="where to train")
    add("--results", type=Path, default=ROOT / "docs" / "results", metavar="DIR", help="of rows")
    add("--machine", default="", metavar="TEXT", help="a part of a machine's name in the rows")
    add("--render", action="store_true", help="only write table and picture again")
    return parser


# The command line is read before yaml and charts are loaded.
if __name__ == "__main__":
    answer_at_once(_parser())

from dataclasses import replace

from tools.parts.study.lengths import Lengths
from tools.parts.study.pictures import picture
from tools.parts.study.runs import Runs, this_machine
from tools.parts.study.study import (
    Entry,
    Study,
    append_row,
    machine_named,
    machines_of,
    read_rows,
    read_study,
    results_of,
)
from tools.parts.study.tables import markdown
from tools.parts.study.trainer import Trainer
from utils.checkpoints.atomic import write_text


def main() -> int:
    """Run what is missing, then write the page; return the exit code."""
    args = _parser().parse_strictly(None)
    # the programs that it starts run in another folder
    args.work, args.results = args.work.resolve(), args.results.resolve()
    args.data_path = args.data_path and str(Path(args.data_path).resolve())
    path = Path(args.study)
    study = read_study(path if path.suffix else ROOT / "benchmarks" / "studies" / f"{path}.yaml")
    if args.seeds:
        study = replace(study, seeds=tuple(args.seeds))
    wanted = args.entries or [entry.name for entry in study.entries]
    for name in wanted:
        if name not in [entry.name for entry in study.entries]:
            names = ", ".join(entry.name for entry in study.entries)
            raise ValueError(f"--entries: {study.name} has no entry {name!r}; entries: {names}")
    file = args.results / "studies.jsonl"
    rows = read_rows(file)
    machine = machine_named(args.machine, rows) if args.machine else ""
    if args.render:
        machine = machine or next(iter(machines_of(study, rows, args.tier)), "")
    else:
        machine = machine or this_machine(args.tier)
        trainer = Trainer(Runs(study, args.work, args.data_path, args.tier, machine))
        # Seed by seed: a study that is not finished compares all entries.
        for seed in study.seeds:
            for entry in study.entries:
                if entry.name in wanted:
                    run_entry(trainer, entry, seed, file)
    render(study, args.tier, file, machine)
    return 0


def run_entry(trainer: Trainer, entry: Entry, seed: int, file: Path) -> None:
    """Train and judge an entry unless this recipe and seed have a row."""
    with trainer.only_here(entry, seed) as free:
        # read under the lock: another driver may have finished it meanwhile
        rows = read_rows(file)
        runs = trainer.runs
        if not free or seed in runs.rows(entry, rows):
            return
        if Lengths(runs).is_known(entry, rows):
            append_row(file, trainer.measure(entry, seed, rows))
        else:
            said = f"{runs.machine} has no row of it, nor of an entry that is its speed_like"
            print(f"{entry.name}: left out; {said}", file=sys.stderr)


def render(study: Study, tier: str, file: Path, machine: str) -> None:
    """Write the page and the picture of a study from its rows of a machine."""
    rows = read_rows(file)
    for other, count in machines_of(study, rows, tier).items():
        if other != machine:
            rows_there = f"{count} row{'s' if count > 1 else ''} of {other}"
            print(f"left out: {rows_there}; --machine shows them", file=sys.stderr)
    results = results_of(study, rows, tier, machine)
    name = f"{study.name}_gpu" if tier == "gpu" else study.name
    write_text(file.with_name(f"{name}.svg"), picture(study, results, tier))
    page = file.with_name(f"{name}.md")
    write_text(page, markdown(study, results, tier, f"{name}.svg"))
    print(page)


if __name__ == "__main__":
    run_main(main)
