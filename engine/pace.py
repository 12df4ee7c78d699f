"""How fast a run is: seconds a step, the share of them spent waiting for data, the time left."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_SETTLING = 3  # steps after a start that may compile, fill caches or start workers
_MEMORY = 200  # steps that the running mean goes back


class Pace:
    """Times the steps of this process on the host's clock."""

    def __init__(self) -> None:
        self._steps = 0
        self._mean = 0.0  # seconds a step, of the newest steps
        self._between = 0.0  # seconds of evaluations, checkpoints and log lines so far
        self._window: list[tuple[float, float]] = []  # (seconds, of these waiting) a step
        self._given = self._ended = time.perf_counter()
        self._waited = 0.0

    def around(self, steps: Iterable[T]) -> Iterator[T]:
        """Yield from a loader, and time how long each item was waited for."""
        asked = time.perf_counter()
        for item in steps:
            self._given = time.perf_counter()
            self._waited = self._given - asked
            yield item
            asked = time.perf_counter()
            # The caller has been at work since the step ended: an evaluation, a checkpoint.
            if self._ended >= self._given:
                self._between += asked - self._ended

    def end_step(self) -> None:
        """Note that the step's work is done."""
        self._ended = time.perf_counter()
        seconds = self._ended - self._given + self._waited
        self._steps += 1
        # The first steps say nothing about the others, e.g. while a network is compiled.
        if self._steps <= _SETTLING:
            self._window.append((seconds, self._waited))
            return
        if self._steps == _SETTLING + 1:
            self._window.clear()
        self._window.append((seconds, self._waited))
        share = 1 / min(self._steps - _SETTLING, _MEMORY)
        self._mean += share * (seconds - self._mean)

    def window(self) -> tuple[float, float]:
        """Return the seconds a step since the last call, and the share of them spent waiting."""
        seconds, waited = (sum(column) for column in zip(*self._window, strict=True))
        count = len(self._window)
        self._window.clear()
        return max(seconds / count, 1e-9), min(waited / max(seconds, 1e-9), 1.0)

    def seconds_per_step(self) -> float:
        """Return the mean of the newest steps; NaN while the run settles."""
        return self._mean if self._steps > _SETTLING else float("nan")

    def seconds_left(self, steps: int) -> float:
        """Return how long `steps` more will take, with their evaluations; NaN if unknown."""
        if steps <= 0:
            return 0.0
        return steps * (self.seconds_per_step() + self._between / max(self._steps, 1))
