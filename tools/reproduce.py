"""Train and judge all entries of a study; keep each result; make a table and a picture of them.

Example: python tools/reproduce.py methods_resnet8 --data-path D

NAME is a file of benchmarks/studies/. Each entry trains for the study's CPU minutes, counted over
all its processes: a short run measures its speed first, and its schedule ends with the budget. A
k-NN and a linear probe on images without augmentation judge it afterwards. Each result is appended
to docs/results/NAME.jsonl. The same command goes on after a stop; started twice, two entries train
side by side. --render only writes docs/results/NAME.md and NAME.svg again.
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
    add("--render", action="store_true", help="only write table and picture again")
    return parser


# The command line is read before yaml and charts are loaded.
if __name__ == "__main__":
    answer_at_once(_parser())

from dataclasses import replace

from tools.parts.studies import (
    Entry,
    Study,
    append_row,
    markdown,
    picture,
    read_rows,
    read_study,
    rows_of,
)
from tools.parts.study_runs import Trainer
from utils.checkpoints.atomic import write_text


def main() -> int:
    """Run what is missing, then write the page; return the exit code."""
    args = _parser().parse_strictly(None)
    path = Path(args.study)
    study = read_study(path if path.suffix else ROOT / "benchmarks" / "studies" / f"{path}.yaml")
    if args.seeds:
        study = replace(study, seeds=tuple(args.seeds))
    wanted = args.entries or [entry.name for entry in study.entries]
    for name in wanted:
        if name not in [entry.name for entry in study.entries]:
            names = ", ".join(entry.name for entry in study.entries)
            raise ValueError(f"--entries: {study.name} has no entry {name!r}; entries: {names}")
    trainer = Trainer(study, args.work / study.name, args.data_path, args.tier)
    if not args.render:
        for entry in study.entries:
            if entry.name in wanted:
                run_entry(study, entry, trainer, args.results)
    render(study, args.results)
    return 0


def run_entry(study: Study, entry: Entry, trainer: Trainer, results: Path) -> None:
    """Train and judge an entry with each seed that has no row yet."""
    file = results / f"{study.name}.jsonl"
    for seed in study.seeds:
        with trainer.only_here(entry, seed) as free:
            # read under the lock: another driver may have finished it meanwhile
            rows = read_rows(file)
            if not free or seed in rows_of(rows, entry.name):
                continue
            append_row(file, trainer.measure(entry, seed, rows))


def render(study: Study, results: Path) -> None:
    """Write the page and the picture of a study from its rows."""
    rows = read_rows(results / f"{study.name}.jsonl")
    command = f"python tools/reproduce.py {study.name} --data-path D"
    page = results / f"{study.name}.md"
    write_text(results / f"{study.name}.svg", picture(study, rows))
    write_text(page, markdown(study, rows, command))
    print(page)


if __name__ == "__main__":
    run_main(main)
