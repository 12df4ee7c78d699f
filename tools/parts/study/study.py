"""What a study compares, the rows that were measured for it, and the tables made of them."""

import ast
import hashlib
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.config import strict_yaml
from utils.config.datasets import DATASETS
from utils.config.load import written_values

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, object]
Results = dict[str, dict[int, Row]]  # entry -> seed -> its row
# Student's t for 95 % of the probability, by degrees of freedom: few seeds need wide intervals.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# Raise it when rows are judged in another way: older rows no longer count and are judged again.
EVALUATION = 2
PEERS = ROOT / "benchmarks" / "studies"
UNTRAINED = ("random", "pixels")  # peers that need no training
MEASURES = {"knn20": "k-NN 20", "knn200": "k-NN 200", "linear": "linear"}


@dataclass(frozen=True)
class Entry:
    """One line of a table: a recipe of ours or of another library."""

    name: str
    cfg: str  # of main_pretrain.py; of another library: of the backbone and the probe
    peer: str = (
        ""  # `random`, `pixels`, or another library's method, see benchmarks/studies/peer_runs.py
    )
    opts: tuple[str, ...] = ()  # for --opts, KEY=VALUE
    minutes: float = 0.0  # of training, as in the study; 0: the study's
    epochs: float = 0.0  # train so many, not for a time
    epochs_of: str = ""  # train as many epochs as this entry did, not for a time
    line: str = ""  # in the picture of accuracy over time: the line that this entry is a point of


@dataclass(frozen=True)
class Study:
    """Entries that are trained on one data set for one time, each with several seeds.

    Minutes are those of all processes' CPUs, on a GPU those of the clock.
    """

    name: str
    title: str
    dataset: str
    minutes: float
    seeds: tuple[int, ...]
    entries: tuple[Entry, ...]
    differences: tuple[tuple[str, str], ...] = ()  # (entry, entry): what the first one gains
    notes: tuple[str, ...] = ()  # what a reader of the table has to know

    def entry(self, name: str) -> Entry:
        """Return the entry of this name."""
        return next(entry for entry in self.entries if entry.name == name)

    def recipe(self, entry: Entry, tier: str) -> str:
        """Return a digest of what is trained: a row of another recipe is not its row.

        Two studies with the same recipe share its rows, whatever they call it. Of other libraries
        the recipe is code, which counts without its comments. Of ours it is the values of the
        configuration; rows name the commit.
        """
        minutes: object = float(entry.minutes or self.minutes)
        if entry.peer in UNTRAINED:
            minutes = 0
        if entry.epochs:
            minutes = {"epochs": entry.epochs}
        if entry.epochs_of:
            minutes = self.recipe(self.entry(entry.epochs_of), tier)
        values = sorted(written_values(ROOT / entry.cfg).items())
        parts = [tier, self.dataset, minutes, entry.peer, values, entry.opts]
        if entry.peer and entry.peer not in UNTRAINED:
            code = PEERS / f"peer_{entry.peer.rpartition('_')[0]}.py"
            parts.append(ast.unparse(ast.parse(code.read_text(encoding="utf-8"))))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def read_study(path: Path) -> Study:
    """Read `benchmarks/studies/NAME.yaml`; raises `ValueError` with the key that is wrong."""
    try:
        tree = strict_yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = [found.stem for found in sorted(path.parent.glob("*.yaml"))]
        raise ValueError(
            f"there is no study {path.stem!r} ({path}); known: {', '.join(known) or 'none'}"
        ) from error
    if not isinstance(tree, dict) or not isinstance(tree.get("entries"), dict):
        raise ValueError(f"{path}: expects `entries:` with a line for each entry")
    entries = []
    for name, options in tree.pop("entries").items():
        entries.append(Entry(name, **_checked(path, f"entries.{name}", options, Entry)))
    study = Study(path.stem, entries=tuple(entries), **_checked(path, "study", tree, Study))
    for entry in study.entries:
        lengths = [key for key in ("minutes", "epochs", "epochs_of") if getattr(entry, key)]
        timed = study.minutes or entry.peer in UNTRAINED
        if len(lengths) > 1 or (not lengths and not timed):
            found = " and ".join(lengths) or "no length"
            raise ValueError(
                f"{path}: entries.{entry.name} has {found}; give minutes, epochs or epochs_of"
            )
    names = {entry.name for entry in entries}
    asked = {entry.epochs_of for entry in entries if entry.epochs_of}
    for name in sorted(asked.union(*study.differences) - names):
        raise ValueError(f"{path}: there is no entry {name!r}; entries: {', '.join(sorted(names))}")
    return study


def _checked(path: Path, where: str, options: object, kind: type[Entry | Study]) -> dict[str, Any]:
    """Return the options as arguments of `kind`; refuse unknown keys and values of another type."""
    known = {field.name: field.type for field in fields(kind)}
    if not isinstance(options, dict):
        raise ValueError(f"{path}: {where} expects key: value; known keys: {', '.join(known)}")
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"{path}: {where}.{key} is unknown; known keys: {', '.join(known)}")
        expected = "text" if known[key] is str else "a number" if known[key] is float else "a list"
        fits = {"text": str, "a number": int | float, "a list": list}[expected]
        if not isinstance(value, fits):
            raise ValueError(f"{path}: {where}.{key} is {value!r}, expected {expected}")
        found[key] = _frozen(value)
    return found


def _frozen(value: object) -> object:
    return tuple(_frozen(part) for part in value) if isinstance(value, list) else value


# ---- rows ----------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Return the rows measured so far; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append a row. One write of one line: several drivers may append to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # a line cut off by a crash must not swallow this one
        torn = file.tell() and not path.read_bytes().endswith(b"\n")
        file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def rows_of(rows: Sequence[Row], recipe: str) -> dict[int, Row]:
    """Return the newest row of each seed of a recipe, of those judged as today."""
    today = [row for row in rows if row.get("evaluation") == EVALUATION]
    return {int(str(row["seed"])): row for row in today if row["recipe"] == recipe}


def results_of(study: Study, rows: Sequence[Row], tier: str) -> Results:
    """Return the rows of a study by entry and seed."""
    return {entry.name: rows_of(rows, study.recipe(entry, tier)) for entry in study.entries}


# ---- tables --------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of the mean (Student's t); NaN of one value."""
    if len(values) < 2:
        return math.nan
    t = _T95[min(len(values) - 2, len(_T95) - 1)]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def gains(results: Results, first: str, second: str, measure: str) -> list[float]:
    """Return by how much `first` is above `second` with each seed that both have."""
    one, other = results[first], results[second]
    seeds = sorted(one.keys() & other.keys())
    return [number(one[seed], measure) - number(other[seed], measure) for seed in seeds]


def number(row: Row, key: str) -> float:
    """Return a number of a row, NaN where it has none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan


def markdown(study: Study, results: Results, tier: str, picture: str) -> str:
    """Return the page of a study: picture, what was run, the table, the differences."""
    on_gpu = tier == "gpu"
    command = f"python tools/reproduce.py {study.name} --data-path D" + " --tier gpu" * on_gpu
    rows = [row for found in results.values() for row in found.values()]
    measures = MEASURES | {
        key: f"linear, {key[7:].replace('pct', ' %')}"
        for key in sorted({key for row in rows for key in row if key.startswith("linear_")})
    }
    per_epoch, memory = ("s/epoch", "GPU memory") if on_gpu else ("CPU s/epoch", "memory")
    head = ["", "seeds", "epochs", "CPU min", "wall min", per_epoch, memory, *measures.values()]
    lines = [f"# {study.title}", "", f"![{study.title}]({picture})", "", f"`{command}`", ""]
    lines += [*_conditions(study, rows, on_gpu), ""]
    lines += [*(f"* {note}" for note in study.notes), *([""] if study.notes else [])]
    lines += [_line(head), _line(["---"] * len(head))]
    for entry in study.entries:
        found = list(results[entry.name].values())
        lines.append(_line([entry.name, *_cells(found, list(measures), on_gpu)]))
    if study.differences:
        heading = "Difference of the two at equal seeds, with its 95 % interval"
        lines += ["", f"{heading}; bold where 0 lies outside the interval:", ""]
        lines += [_line(["", "seeds", *measures.values()]), _line(["---"] * (2 + len(measures)))]
        for first, second in study.differences:
            counts = str(len(gains(results, first, second, "knn20")))
            cells = [_gain(gains(results, first, second, measure)) for measure in measures]
            lines.append(_line([f"{first} - {second}", counts, *cells]))
    return "\n".join(lines) + "\n"


def _conditions(study: Study, rows: Sequence[Row], on_gpu: bool) -> list[str]:
    """Say where and when the rows were measured: a line a machine and version."""
    keys = ("commit", "machine", "torch", "date")
    held_out = f"{study.dataset}_held_out" in DATASETS
    choice = "a tenth of the training images" if held_out else "the test images"
    places = sorted({tuple(str(row.get(key, "?")) for key in keys) for row in rows})
    said = [f"* commit {c}, {m}, torch {t}, {d}" for c, m, t, d in places] or ["Nothing was run."]
    length, place = "training", "one GPU" if on_gpu else "one thread"
    if study.minutes:
        unit = "minutes" if on_gpu else "CPU minutes"
        length = f"{study.minutes:g} {unit} of training, unless a line says otherwise,"
    return [
        f"{study.dataset}; {length} on {place}; evaluation is not counted. "
        "Mean over the seeds, and standard deviation "
        f"where there are several. The rate of a linear probe is chosen on {choice}. "
        "Empty: not run.",
        "",
        *said,
    ]


def _cells(found: Sequence[Row], measures: Sequence[str], on_gpu: bool) -> list[str]:
    if not found:
        return ["", "", "", "", "", "", *("" for _ in measures)]
    plain = (
        ("epochs", ".4g", 1),
        ("cpu_seconds", ".1f", 60),
        ("wall_seconds", ".1f", 60),
    )
    cells = [str(len(found))]
    for key, form, divisor in plain:
        mean = statistics.mean(number(row, key) / divisor for row in found)
        cells.append(format(mean, form) if mean else "")
    epochs = sum(number(row, "epochs") for row in found)
    cost = sum(number(row, "wall_seconds" if on_gpu else "cpu_seconds") for row in found)
    cells.append(f"{cost / epochs:.{1 if on_gpu else 0}f}" if epochs else "")
    if on_gpu:
        gib = max(number(row, "gpu_memory_gib") for row in found)
    else:
        gib = max(number(row, "peak_mib") for row in found) / 1024
    cells.append(f"{gib:.1f} GiB" if math.isfinite(gib) else "")
    return cells + [_mean([number(row, measure) for row in found]) for measure in measures]


def _mean(values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}"


def _gain(values: Sequence[float]) -> str:
    if not values or not all(map(math.isfinite, values)):
        return ""
    mean, half = statistics.mean(values), interval(values)
    if not math.isfinite(half):
        return f"{mean:+.2f}"
    cell = f"{mean:+.2f} ± {half:.2f}"
    return f"**{cell}**" if abs(mean) > half else cell


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
