"""A kill before or after any fsync, rename or removal of a whole run of two ranks loses nothing."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
from figures import figure

CALLS = ("fsync", "replace", "rename", "remove", "unlink", "link", "rmdir")


def crash_at(rank: int, *, call: int, before: bool, note: Path) -> None:
    """SIGKILL rank 0 at its ``call``-th fsync, rename or removal (from 1); note each call's name."""
    count = 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            with note.open("a") as file:
                file.write(f"{name}\n")
            if before and count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    if rank == 0:
        for name in CALLS:
            setattr(os, name, counted(name, getattr(os, name)))


class Ranks:
    """A run of four steps of two ranks that saves after each."""

    def __init__(self, root: Path) -> None:
        self.root, self.note = root, root / "note"
        data = str(runs.image_folder(root / "images", train=16, val=2))
        self.keys: dict[str, Any] = {"DATA__DATASET": "imagefolder", "DATA__PATH": data}
        self.keys |= {
            "AUG__RECIPE": "moco_v2",
            "TRAIN__BATCH_SIZE": 2,
            "CHECKPOINT__EVERY_STEPS": 1,
        }

    def start(self, tag: str, call: int = 0, before: bool = False) -> tuple[list[int], str]:
        """Run and return the exit codes and the text of rank 0."""
        self.note.unlink(missing_ok=True)
        argv = runs.arguments("synco", self.root, tag, world=2, **self.keys)
        fault = partial(crash_at, call=call, before=before, note=self.note)
        jobs = forked.start("main_pretrain", argv, self.root / "log", ranks=2, prepare=fault)
        return [job.wait() for job in jobs], jobs[0].text()

    def state(self, tag: str) -> str:
        return runs.digest(self.root / "synco" / tag)


def crash_everywhere(tmp_path: Path, every: int) -> None:
    """Crash at each ``every``-th point from a fresh start, resume and compare."""
    ranks = Ranks(tmp_path)
    assert ranks.start("whole")[0] == [0, 0]
    calls = ranks.note.read_text().split()
    points = [(call, before) for call in range(1, len(calls) + 1) for before in (True, False)][
        ::every
    ]
    identical, resumed = 0, []
    for call, before in points:
        tag = f"crash{call}{before}"
        codes, _ = ranks.start(tag, call, before)
        assert codes[0] == -signal.SIGKILL, (call, before)
        codes, text = ranks.start(tag)
        assert codes == [0, 0], text
        identical += ranks.state(tag) == ranks.state("whole")
        resumed.append(runs.resumed_at(text))
    kinds = ", ".join(f"{calls.count(name)} {name}" for name in CALLS if name in calls)
    figure("calls in the run", len(calls), f"({kinds})")
    figure("identical / crash points", f"{identical}/{len(points)}")
    figure("resumed from each of steps", " ".join(map(str, sorted(set(resumed)))))
    assert identical == len(points)
    assert {"fsync", "replace", "remove"} <= set(calls)
    if every == 1:
        assert set(resumed) >= {0, 1, 2, 3}


def test_some_crash_points_of_two_ranks(tmp_path: Path) -> None:
    crash_everywhere(tmp_path, every=29)


@pytest.mark.slow
def test_every_crash_point_of_two_ranks(tmp_path: Path) -> None:
    crash_everywhere(tmp_path, every=1)
