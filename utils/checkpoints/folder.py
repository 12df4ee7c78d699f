"""Choose which checkpoints of a folder stay: the last ones, every so many steps, the best one."""

import logging
import math
import os
from collections.abc import Collection
from pathlib import Path

from utils.checkpoints.file import (
    CheckpointError,
    committed,
    evaluation_of,
    is_valid,
    read_record,
    record_path,
    step_of,
    uncommitted,
)

logger = logging.getLogger("synco")

_FLOOR = 2  # never keep fewer valid checkpoints than this


def sweep(folder: Path) -> None:
    """Remove the *.tmp files that killed saves left; only the owner of the folder may call this."""
    for path in (*folder.glob("ckpt_*.tmp"), *folder.glob("nonfinite_*.tmp")):
        remove(path)


def set_aside(folder: Path, after: int) -> None:
    """Move the checkpoints of later steps than `after` into `folder`/set_aside."""
    later = [path for path in committed(folder) if step_of(path) > after]
    if later:
        aside = folder / "set_aside"
        aside.mkdir(exist_ok=True)
        for path in later:
            # The record moves last: a kill in between leaves a record without a file, which is no
            # checkpoint, and the next call finishes the move.
            if path.exists():
                os.replace(path, aside / path.name)
            os.replace(record_path(path), aside / record_path(path).name)
        logger.warning("%d later checkpoint(s) moved to %s", len(later), aside)


def prune(
    folder: Path, keep_last: int, keep_every: int | None = None, protect: Collection[Path] = ()
) -> None:
    """Remove old checkpoints, but not the last ones, every `keep_every` steps, or `protect`.

    At least two that verify always stay. A file that cannot be removed is a warning.
    """
    # one file may be named in several ways
    protected = {path.resolve() for path in protect}
    paths = committed(folder)
    newest = paths[: max(keep_last, _FLOOR)]

    def wanted(path: Path) -> bool:
        if keep_every and step_of(path) % keep_every == 0:
            return True
        return path in newest or path.resolve() in protected

    needed = 0 if all(map(wanted, paths)) else _FLOOR  # verifying reads whole files
    for path in paths:
        if needed > 0 and is_valid(path):
            needed -= 1
        elif not wanted(path):
            remove(record_path(path))  # first: a file without a record does not count
            remove(path)
    for path in uncommitted(folder):  # a kill between the two removals left it
        if paths and step_of(path) < step_of(paths[0]) and path.resolve() not in protected:
            remove(path)


def best(folder: Path, metric: str, lower_is_better: bool = False) -> Path | None:
    """Return the checkpoint whose evaluation gave the best `metric`, the earliest of equal ones."""
    # From the JSON files alone, so that a resumed run finds the same one.
    values: list[tuple[float, Path]] = []
    # oldest first, and `max` takes the first of equals
    for path in reversed(committed(folder)):
        try:
            value = evaluation_of(read_record(path)).get(metric, math.nan)
        except (CheckpointError, OSError):
            continue  # damaged
        if not math.isnan(value):  # nan also: saved at a step without an evaluation
            values.append((-value if lower_is_better else value, path))
    return max(values, key=lambda entry: entry[0])[1] if values else None


def require(metric: str, measured: Collection[str]) -> None:
    """Refuse a `CHECKPOINT.KEEP_BEST` that is not among the names of what is measured."""
    if metric and metric not in measured:
        choice = f"choose one of {', '.join(measured)}" if measured else "set KNN.EVERY_EPOCHS"
        raise ValueError(f"CHECKPOINT.KEEP_BEST: {metric!r} is not measured in this run; {choice}")


def improves(value: float, so_far: float | None, lower_is_better: bool = False) -> bool:
    """Tell whether `value` is better than the best one before; not a number never is."""
    if so_far is None:
        return value == value
    return value < so_far if lower_is_better else value > so_far


def remove(path: Path) -> None:
    """Remove a file if it is there; one that cannot be removed is a warning."""
    try:
        os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
