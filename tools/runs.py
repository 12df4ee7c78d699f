"""List and compare the runs of an output folder, from their files.

Example: python tools/runs.py ls output

ls shows all runs, best sorts them by an accuracy, diff compares two of them, export writes them all
as CSV. A run that says it is running but has written nothing for ten minutes is called silent.
"""

import csv
import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file

from tools.parts.run_files import (
    SILENT_AFTER,
    RunFiles,
    differences,
    find_runs,
    open_run_files,
    seconds_as_text,
)
from utils.cli import Parser, run_main

COLUMNS = tuple("run method backbone data state step left loss knn linear images/s age".split())


def _parser() -> Parser:
    parser = Parser(
        description=__doc__,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("ls", "show all runs"),
        ("best", "show all runs, the best first"),
        ("export", "write all runs as CSV"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument(
            "root",
            nargs="?",
            type=Path,
            default=Path("output"),
            metavar="FOLDER",
            help="folder of all runs, default output",
        )
        command.add_argument(
            "--silent-after",
            type=float,
            default=SILENT_AFTER,
            metavar="SECONDS",
            help="after which a run is called silent, default 600",
        )
        if name == "best":
            command.add_argument(
                "--by",
                choices=["knn", "linear"],
                default="knn",
                metavar="NAME",
                help="knn (default) or linear",
            )
        if name == "export":
            command.add_argument("--csv", action="store_true", help="the format, the only one")
            command.add_argument("--output", type=Path, metavar="FILE", help="default: the screen")
    command = commands.add_parser("diff", help="compare two runs")
    command.add_argument("runs", nargs=2, type=Path, metavar="RUN", help="folder of a run")
    return parser


def main() -> int:
    """Answer the command; return the exit code."""
    args = _parser().parse_strictly(None)
    if args.command == "diff":
        print(compare([open_run_files(folder) for folder in args.runs]))
        return 0
    rows = [described(run, args.silent_after) for run in find_runs(args.root)]
    if args.command == "best":
        rows.sort(key=lambda row: _number(row[args.by]), reverse=True)
    # As a table for people; export writes CSV below.
    if args.command != "export":
        print(aligned([list(COLUMNS), *([str(row[c]) for c in COLUMNS] for row in rows)]))
        return 0
    text = as_csv(rows)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


def described(run: RunFiles, silent_after: float = SILENT_AFTER) -> dict[str, str]:
    """Return the columns of a run."""
    config, total, state = run.config, run.total(), run.state(silent_after)
    losses, left = run.curve("loss"), run.status.get("eta")
    if isinstance(left, int | float) and state == "running":
        left = seconds_as_text(left)
    return {
        "run": run.name,
        "method": str(config.get("MODEL.NAME", "-")),
        "backbone": str(config.get("MODEL.BACKBONE.NAME", "-")),
        "data": str(config.get("DATA.DATASET", "-")),
        "state": state,
        "step": f"{run.step()}/{total or '?'}",
        "left": str(left) if left and state == "running" else "-",
        "loss": _shown(losses[-1][1] if losses else None, 3),
        "knn": _shown(run.best_knn(), 2),
        "linear": _shown(run.best_linear(), 2),
        "images/s": _shown(run.speed(), 0),
        "age": seconds_as_text(run.silence()),
    }


def compare(runs: list[RunFiles]) -> str:
    """Return what two runs differ in: keys of the configuration, then results."""
    table = [["", *(run.name for run in runs)]]
    configs = [run.config for run in runs]
    table += [[key, *map(str, values)] for key, values in differences(configs)]
    # In brackets below the keys: what was measured.
    columns = [described(run) for run in runs]
    table += [[f"({c})", *(row[c] for row in columns)] for c in COLUMNS[4:]]
    return aligned(table)


def as_csv(rows: list[dict[str, str]]) -> str:
    """Return the runs as comma-separated values with a head line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def aligned(table: list[list[str]]) -> str:
    """Return rows of text with their columns aligned."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join(line.rstrip() for line in lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _number(text: str) -> float:
    # Runs without a result come last.
    return -1.0 if text == "-" else float(text)


if __name__ == "__main__":
    run_main(main)
