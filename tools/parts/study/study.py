"""What a study compares, and the rows that were measured for it."""

import ast
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from utils.config import strict_yaml
from utils.config.load import written_values

ROOT = Path(__file__).resolve().parents[3]
Row = dict[str, object]
Results = dict[str, dict[int, Row]]  # entry -> seed -> its row
# Raise it when rows are judged in another way: older rows no longer count and are judged again.
EVALUATION = 2
PEERS = ROOT / "benchmarks" / "studies"
UNTRAINED = ("random", "pixels")  # peers that need no training
MEASURES = {
    "knn20": "k-NN 20",
    "knn200": "k-NN 200",
    "linear": "linear",
    "linear_10pct": "linear, 10 %",
    "linear_1pct": "linear, 1 %",
}


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
    # to add it to the table of a machine that never ran it: the entry whose speed here and there
    # tells what the time of that machine is worth here
    speed_like: str = ""
    line: str = ""  # in the picture of accuracy over time: the line that this entry is a point of


@dataclass(frozen=True)
class Claim:
    """A published difference of two methods, which the study's rows can confirm or refute."""

    first: str  # entry
    second: str  # entry that it is compared with
    measure: str
    gain: float  # of the first one, in points
    source: str  # who says so, of which network and data


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
    claims: tuple[Claim, ...] = ()
    measure: str = "knn20"  # that its picture shows and that decides
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

    def rows(self, entry: Entry, rows: Sequence[Row], tier: str, machine: str) -> dict[int, Row]:
        """Return the rows of an entry on a machine by seed.

        A minute holds more epochs on a faster machine, so the rows of two are never averaged. Only
        what is not trained is the same on all.
        """
        any_machine = entry.peer in UNTRAINED
        return rows_of(rows, self.recipe(entry, tier), "" if any_machine else machine)


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
    claims = tuple(
        Claim(**_checked(path, f"claims[{number}]", options, Claim))
        for number, options in enumerate(tree.pop("claims", ()))
    )
    options = _checked(path, "study", tree, Study)
    study = Study(path.stem, entries=tuple(entries), claims=claims, **options)
    for entry in study.entries:
        lengths = [key for key in ("minutes", "epochs", "epochs_of") if getattr(entry, key)]
        timed = study.minutes or entry.peer in UNTRAINED
        if len(lengths) > 1 or (not lengths and not timed):
            found = " and ".join(lengths) or "no length"
            raise ValueError(
                f"{path}: entries.{entry.name} has {found}; give minutes, epochs or epochs_of"
            )
    for measure in (study.measure, *(claim.measure for claim in claims)):
        if measure not in MEASURES:
            raise ValueError(
                f"{path}: there is no measure {measure!r}; known: {', '.join(MEASURES)}"
            )
    for number, claim in enumerate(claims):
        if not claim.gain:
            raise ValueError(f"{path}: claims[{number}].gain is 0; a claim says which entry gains")
    names = {entry.name for entry in entries}
    asked = {name for entry in entries for name in (entry.epochs_of, entry.speed_like) if name}
    asked.update(*study.differences, *((claim.first, claim.second) for claim in claims))
    for name in sorted(asked - names):
        raise ValueError(f"{path}: there is no entry {name!r}; entries: {', '.join(sorted(names))}")
    return study


def _checked(
    path: Path, where: str, options: object, kind: type[Entry | Claim | Study]
) -> dict[str, Any]:
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


def rows_of(rows: Sequence[Row], recipe: str, machine: str = "") -> dict[int, Row]:
    """Return the newest row of each seed of a recipe, of those judged as today.

    With `machine`, only the rows whose length of training is what its time holds.
    """
    found = [row for row in rows if row["recipe"] == recipe and row.get("evaluation") == EVALUATION]
    if machine:
        found = [row for row in found if machine_of(row) == machine]
    return {int(str(row["seed"])): row for row in found}


def machine_of(row: Row) -> str:
    """Return the machine by whose speed the epochs of a row were chosen."""
    return str(row.get("length_of") or row["machine"])


def measured_time(rows: Sequence[Row]) -> list[Row]:
    """Return the rows whose cost is that of the machine by whose speed their length was chosen."""
    return [row for row in rows if "length_of" not in row]


def results_of(study: Study, rows: Sequence[Row], tier: str, machine: str) -> Results:
    """Return the rows of a study on a machine, by entry and seed."""
    return {entry.name: study.rows(entry, rows, tier, machine) for entry in study.entries}


def machines_of(study: Study, rows: Sequence[Row], tier: str) -> dict[str, int]:
    """Return how many rows of a study each machine has, that with the most first."""
    trained = [entry for entry in study.entries if entry.peer not in UNTRAINED]
    counts: Counter[str] = Counter()
    for machine in sorted({machine_of(row) for row in rows}):
        counts[machine] = sum(len(study.rows(e, rows, tier, machine)) for e in trained)
    return {machine: count for machine, count in counts.most_common() if count}


def machine_named(text: str, rows: Sequence[Row]) -> str:
    """Return the machine whose name in the rows contains `text`; raises `ValueError`."""
    known = sorted({machine_of(row) for row in rows})
    # a name may be the beginning of another one
    found = [text] if text in known else [name for name in known if text in name]
    if len(found) != 1:
        raise ValueError(
            f"--machine {text!r} is in {len(found)} names of machines; known from the rows: "
            f"{'; '.join(known) or 'none'}"
        )
    return found[0]


def number(row: Row, key: str) -> float:
    """Return a number of a row, NaN where it has none."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) else math.nan
