"""How long an entry of a study trains: by its speed, or as another run did."""

import itertools
import json
import math
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tools.parts.study.costs import POLL, start, tree_cpu_seconds
from tools.parts.study.runs import Length, Runs
from tools.parts.study.study import ROOT, UNTRAINED, Entry, Row, measured_time, number
from utils.checkpoints.atomic import write_text
from utils.config.load import written_values

_SPEED_SHARE = 0.05  # of the budget is trained to measure the speed, outside the budget
_SPEED_LEAST = 10.0  # seconds of that: the first steps compile and are slow
_MANY_EPOCHS = 100_000  # of the run that is stopped when its speed is known


@dataclass(frozen=True)
class Lengths:
    """Finds out how long the entries of a study train."""

    runs: Runs

    def is_known(self, entry: Entry, rows: Sequence[Row]) -> bool:
        """Return whether an entry's epochs are known, or can be found out here."""
        timed = not (entry.peer in UNTRAINED or entry.epochs or entry.epochs_of)
        if self.runs.is_here or not timed or self.runs.rows(entry, rows):
            return True
        return bool(entry.speed_like and self._rows_of_like(entry, rows))

    def of(self, entry: Entry, seed: int, rows: Sequence[Row]) -> Length:
        """Return how long an entry trains with this seed."""
        if entry.peer in UNTRAINED:
            return Length(0)
        if entry.epochs:
            return Length(entry.epochs)
        if entry.epochs_of:
            found = self.runs.rows(self.runs.study.entry(entry.epochs_of), rows)
            if seed not in found:
                raise ValueError(
                    f"entry {entry.name}: epochs_of needs a row of {entry.epochs_of} with seed "
                    f"{seed}; run it first"
                )
            return Length.of(found[seed])
        budget = self._budget(entry)
        if not self.runs.is_here:
            known = list(self.runs.rows(entry, rows).values())
            if known:
                return _median_length(measured_time(known) or known)
            budget *= self._time_here(entry, seed, rows)
        speed = self._speed(entry, seed, self._budget(entry))
        # whole epochs would lose much of the budget where it holds few of them
        epochs = (budget - speed["start"]) / speed["epoch"]
        if entry.peer:
            length = Length(math.floor(epochs * 100) / 100)
        else:
            steps = math.floor(epochs * speed["epoch_steps"])
            length = Length(round(steps / speed["epoch_steps"], 2), steps)
        if length.epochs <= 0:
            raise ValueError(
                f"entry {entry.name}: an epoch takes {speed['epoch']:.0f} seconds, the start "
                f"{speed['start']:.0f}; give more minutes than {budget / 60:g}"
            )
        return length

    def whose(self, entry: Entry, length: Length, rows: Sequence[Row]) -> Row:
        """Say for a row whose time chose its epochs, if that is not the time of this machine."""
        if self.runs.is_here or not length.epochs:
            return {}
        timed = measured_time(list(self.runs.rows(entry, rows).values()))
        like = {} if timed or not entry.speed_like else {"length_like": entry.speed_like}
        return {"length_of": self.runs.machine, **like}

    def _budget(self, entry: Entry) -> float:
        """Return the seconds that an entry trains."""
        return 60.0 * (entry.minutes or self.runs.study.minutes)

    def _rows_of_like(self, entry: Entry, rows: Sequence[Row]) -> list[Row]:
        """Return the rows, timed on the machine, of the entry that tells what its time is worth."""
        like = self.runs.study.entry(entry.speed_like)
        return measured_time(list(self.runs.rows(like, rows).values()))

    def _time_here(self, entry: Entry, seed: int, rows: Sequence[Row]) -> float:
        """Return how many seconds here do the work of a second of `machine`.

        `speed_like` trained so many epochs there in its time; its speed here tells how long they
        take here.
        """
        like = self.runs.study.entry(entry.speed_like)
        budget, speed = self._budget(like), self._speed(like, seed, self._budget(like))
        epochs = _median_length(self._rows_of_like(entry, rows)).epochs
        return (speed["start"] + epochs * speed["epoch"]) / budget

    def _speed(self, entry: Entry, seed: int, budget: float) -> dict[str, float]:
        """Return the seconds of the start and of an epoch and its steps, measured once for a seed.

        Not once for all: on a shared machine a measurement is off by some percent, and the interval
        over the seeds has to contain that.
        """
        # another machine's epochs are trained here in another precision
        which = "" if self.runs.is_here else "-auto"
        file = self.runs.work / f"{self.runs.tag(entry)}-{seed}{which}.speed.json"
        if not file.exists():
            write_text(file, json.dumps(self._measured_speed(entry, seed, budget)))
        return json.loads(file.read_bytes())

    def _measured_speed(self, entry: Entry, seed: int, budget: float) -> dict[str, float]:
        tag = f"{self.runs.tag(entry)}-{seed}-speed"
        # what an earlier driver left would resume, and its start would cost less
        shutil.rmtree(self.runs.folder(tag), ignore_errors=True)
        self.runs.say(tag, "measuring the speed")
        command = self.runs.training(entry, tag, seed, Length(_MANY_EPOCHS))
        command += _without_warmup(entry)
        with (self.runs.work / f"{tag}.log").open("wb") as log:
            child = start(command, log)
        try:
            points = list(self._watched(child, tag, max(_SPEED_LEAST, budget * _SPEED_SHARE)))
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()
        epoch_steps = self._steps(tag)
        shutil.rmtree(self.runs.folder(tag), ignore_errors=True)
        # the median: a burst of other work on the machine must not count
        pairs = itertools.pairwise(points)
        step = statistics.median((end - begin) / (b - a) for (a, begin), (b, end) in pairs)
        first, begin = points[0]
        return {
            "start": max(0.0, begin - first * step),
            "epoch": step * epoch_steps,
            "epoch_steps": epoch_steps,
        }

    def _watched(
        self, child: subprocess.Popen[bytes], tag: str, seconds: float
    ) -> Iterator[tuple[int, float]]:
        """Yield (step, seconds) at each change of the status, until enough are used.

        Seconds are those of CPUs, on a GPU those since the start: its time is nobody's CPU time.
        """
        last, begin, used, started = 0, 0.0, -1.0, time.monotonic()
        while used < seconds:
            if child.poll() is not None:
                raise ValueError(f"{tag} ended early; see {self.runs.work / tag}.log")
            time.sleep(POLL)
            step = int(str(self.runs.status(tag).get("step", 0)))
            now = time.monotonic() - started
            if self.runs.tier == "cpu":
                now = tree_cpu_seconds(child.pid)
            if step > last:
                begin = now if not last else begin
                last, used = step, now - begin
                yield step, now

    def _steps(self, tag: str) -> float:
        status = self.runs.status(tag)
        return number(status, "total") / number(status, "epochs")


def _median_length(rows: Sequence[Row]) -> Length:
    ordered = sorted(rows, key=lambda row: number(row, "epochs"))
    return Length.of(ordered[len(ordered) // 2])


def _without_warmup(entry: Entry) -> list[str]:
    """Return options that make a method's first steps cost as much as the later ones.

    SynCo makes no synthetic negatives while it warms up; the speed of those steps would buy it more
    epochs than its time holds.
    """
    keys = () if entry.peer else written_values(ROOT / entry.cfg)
    return [
        f"{key}=0" for key in keys if key.startswith("MODEL.") and key.endswith(".WARMUP_EPOCHS")
    ]
