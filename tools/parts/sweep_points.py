"""The points of a sweep, the choice among them, and its table."""

import csv
import hashlib
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

COLUMNS = (
    "start",
    "mode",
    "labels",
    "epochs",
    "lr_backbone",
    "lr_classifier",
    "seeds",
    "val_top1",
    "chosen",
)
Group = tuple[str, str, float]  # start, mode, percentage: what one choice is made among
TESTS = ("test_top1", "test_top5")
Result = dict[str, float]  # of result.json; its words are not looked at


@dataclass(frozen=True)
class Setting:
    """A point of the grid, whatever the seed; `start` is a file of weights or `none`."""

    start: str
    mode: str
    percent: float
    epochs: int
    lr_backbone: float
    lr_classifier: float

    @property
    def group(self) -> Group:
        """Return what one choice is made among."""
        return self.start, self.mode, self.percent


@dataclass(frozen=True)
class Point:
    """One run: a setting, a seed, and the share of the labels held out (0 once it is chosen)."""

    setting: Setting
    seed: int
    hold_out: float

    def __str__(self) -> str:
        """Return what tells this run from the others, for people."""
        s = self.setting
        start = "random" if s.start == "none" else "pretrained"
        rates = f"{s.lr_backbone:g}/{s.lr_classifier:g}"
        run = f"{start}, {s.mode} on {s.percent:g} %, {s.epochs} epochs"
        return f"{run}, lr {rates}, seed {self.seed}"

    def arguments(self, shared: Sequence[str], subsets: Path | None) -> list[str]:
        """Return the flags of main_semisup.py, but for the run's name."""
        s = self.setting
        values = {
            "--pretrained": s.start,
            "--weights": s.mode,
            "--train-percent": f"{s.percent:g}",
            "--epochs": s.epochs,
            "--lr-backbone": s.lr_backbone,
            "--lr-classifier": s.lr_classifier,
            "--seed": self.seed,
        }
        if subsets and s.percent < 100:
            values["--subset"] = subsets / f"{s.percent:g}percent.txt"
        flags = [str(part) for pair in values.items() for part in pair]
        # a run that helps to choose never sees the test split
        watch = self.hold_out > 0
        opts = ["FINETUNE.HOLD_OUT", f"{self.hold_out:g}", "FINETUNE.TEST", str(not watch)]
        # One look, at the end: the best of many looks would be optimistic.
        return [*shared, *flags, "--opts", *opts, "FINETUNE.EVAL_EPOCHS", str(s.epochs)]

    def on_all_labels(self) -> "Point":
        """Return the run of a choice: nothing held out, the test split read at its end."""
        return replace(self, hold_out=0.0)

    def name(self, arguments: Sequence[str]) -> str:
        """Return the run's folder: readable, and another one if any argument is another."""
        s = self.setting
        part = "search" if self.hold_out else "chosen"
        start = Path(s.start).stem if s.start != "none" else "random"
        # a run with any other flag has another folder, so no result is reused by mistake
        digest = hashlib.sha256("\n".join(arguments).encode()).hexdigest()[:8]
        rates = f"lr{s.lr_backbone:g}-{s.lr_classifier:g}-{s.epochs}ep"
        return f"{part}-{start}-{s.percent:g}pct-{s.mode}-{rates}-seed{self.seed}-{digest}"


def choose(found: dict[Point, Result], seeds: int) -> dict[Group, Setting]:
    """Return for each group the setting with the best mean validation top-1 of the last epoch.

    Ties go to the first. Settings without all their `seeds` are no candidates.
    """
    means: dict[Setting, float] = {}
    for setting in dict.fromkeys(point.setting for point in found):
        values = [result["last_val_top1"] for result in _of(found, setting)]
        # a mean of fewer seeds varies more, and so would be chosen too often
        if len(values) == seeds:
            means[setting] = statistics.fmean(values)
    best: dict[Group, Setting] = {}
    for setting, mean in means.items():
        if setting.group not in best or mean > means[best[setting.group]]:
            best[setting.group] = setting
    return best


def _of(found: dict[Point, Result], setting: Setting) -> list[Result]:
    return [result for point, result in found.items() if point.setting == setting]


def table(
    found: dict[Point, Result],
    choice: dict[Group, Setting],
    tests: dict[Point, Result],
) -> list[dict[str, str]]:
    """Return a row for each setting: mean and deviation over seeds; if chosen, the test's too."""
    rows = []
    for setting in dict.fromkeys(point.setting for point in found):
        results = _of(found, setting)
        chosen = setting in choice.values()
        row = {
            "start": "random" if setting.start == "none" else Path(setting.start).stem,
            "mode": setting.mode,
            "labels": f"{setting.percent:g} %",
            "epochs": str(setting.epochs),
            "lr_backbone": f"{setting.lr_backbone:g}",
            "lr_classifier": f"{setting.lr_classifier:g}",
            "seeds": str(len(results)),
            "val_top1": spread([result["last_val_top1"] for result in results]),
            "chosen": "yes" if chosen else "",
        }
        for name in TESTS:
            row[name] = spread([r[f"last_{name}"] for r in _of(tests, setting)]) if chosen else ""
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> str:
    """Write mean and standard deviation of a sample."""
    if not values:
        return "failed"
    # One seed has no deviation.
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation}"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Write rows as a table."""
    columns = [*COLUMNS, *TESTS]
    cells = [[_in_markdown(row[column]) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _in_markdown(text: str) -> str:
    """Return a cell that stays one cell whatever a file is called."""
    return " ".join(text.splitlines()).replace("\\", "\\\\").replace("|", "\\|")


def _in_csv(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula: weights may be called =cmd.pt."""
    is_number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?( ± [\d.]+)?", text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) and not is_number else text


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    """Write rows as comma-separated values."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *TESTS], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: _in_csv(value) for column, value in row.items()})
    return text.getvalue()
