"""Train and judge all entries of a study; keep each result; make a table and a picture of them.

Example: python tools/reproduce.py methods_resnet8 --data-path D

NAME is a file of benchmarks/studies/. Each entry trains for the study's CPU minutes, counted over
all its processes: a short run measures its speed first, and its schedule ends with the budget. A
k-NN and linear probes (1, 10 and 100 % of the labels, images without augmentation) judge it
afterwards. Each result is a line of docs/results/studies.jsonl, which all studies share: the same
recipe and seed is trained once. A changed recipe is another one. The same command goes on after a
stop; started twice, two entries train side by side. --render only writes docs/results/NAME.md and
NAME.svg again.
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

from tools.parts.study.pictures import picture
from tools.parts.study.runs import Trainer
from tools.parts.study.study import (
    Entry,
    Study,
    append_row,
    read_rows,
    read_study,
    results_of,
    rows_of,
)
from tools.parts.study.tables import markdown
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
    trainer = Trainer(study, args.work, args.data_path, args.tier)
    file = args.results / "studies.jsonl"
    # Seed by seed: a study that is not finished compares all entries.
    for seed in () if args.render else study.seeds:
        for entry in study.entries:
            if entry.name in wanted:
                run_entry(trainer, entry, seed, file)
    render(study, args.tier, file)
    return 0


def run_entry(trainer: Trainer, entry: Entry, seed: int, file: Path) -> None:
    """Train and judge an entry unless this recipe and seed have a row."""
    with trainer.only_here(entry, seed) as free:
        # read under the lock: another driver may have finished it meanwhile
        rows = read_rows(file)
        if free and seed not in rows_of(rows, trainer.recipe(entry)):
            append_row(file, trainer.measure(entry, seed, rows))


def render(study: Study, tier: str, file: Path) -> None:
    """Write the page and the picture of a study from its rows."""
    results = results_of(study, read_rows(file), tier)
    name = f"{study.name}_gpu" if tier == "gpu" else study.name
    write_text(file.with_name(f"{name}.svg"), picture(study, results, tier))
    page = file.with_name(f"{name}.md")
    write_text(page, markdown(study, results, tier, f"{name}.svg"))
    print(page)


if __name__ == "__main__":
    run_main(main)
