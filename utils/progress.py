"""How far and how fast a loop is, and a line on a terminal that shows it each second."""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO, TypeVar

logger = logging.getLogger("synco")

T = TypeVar("T")

_SECONDS = 1.0  # between two drawings
_LOG_SECONDS = 30.0  # between two log lines where there is no terminal
_SETTLING = 3  # steps after a start that may compile, fill caches or start workers
_MEMORY = 200  # steps that the running mean goes back
_WIPE = "\r\x1b[K"


def is_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream can show a line that rewrites itself."""
    if stream is None:  # closed before Python started
        return False
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


class ProgressLine:
    """Draws what `describe(columns)` returns, from a second thread; only on a terminal."""

    # A thread: the line moves during a long step, an evaluation or a compilation too.

    def __init__(self, describe: Callable[[int], str], stream: TextIO | None = None) -> None:
        """Draw on `stream`, standard error if None."""
        self._describe = describe
        self._stream = sys.stderr if stream is None else stream
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to draw, if the stream is a terminal."""
        if self._thread is None and is_terminal(self._stream):
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Stop drawing and wipe the line."""
        if self._thread is None:
            return
        self._closed.set()
        # A terminal that is stopped (Ctrl-S) must not hold the run.
        self._thread.join(timeout=2 * _SECONDS)
        if not self._thread.is_alive():
            self._write(_WIPE)
        self._thread = None

    def _run(self) -> None:
        try:
            while not self._closed.wait(_SECONDS):
                columns = os.get_terminal_size(self._stream.fileno()).columns or 80
                self._write("\r" + self._describe(columns - 1)[: columns - 1] + "\x1b[K")
        except Exception as error:  # the terminal went away: no reason to stop a training
            logger.debug("the progress line ends (%s)", error)

    def _write(self, text: str) -> None:
        # One system call past the stream's buffer: its lock must not be held when a worker is
        # forked, since the worker would wait for it for ever.
        try:
            os.write(self._stream.fileno(), text.encode())
        except (OSError, ValueError):
            self._closed.set()


class Counter:
    """Say how far a loop is: a line that moves on a terminal, a log line now and then elsewhere."""

    def __init__(
        self, title: str, total: int, unit: str = "images", stream: TextIO | None = None
    ) -> None:
        """Count up to `total`; `unit` names what is counted. Draws on standard error if no other.

        Use it in a `with` block, which wipes the line.
        """
        self.title, self.total, self.unit, self.done = title, total, unit, 0
        self._first: tuple[float, int] | None = None
        self._line = ProgressLine(self.text, stream)
        self._silent = is_terminal(sys.stderr if stream is None else stream)
        self._next = time.monotonic() + _LOG_SECONDS

    def __enter__(self) -> "Counter":
        """Begin to draw."""
        self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe the line."""
        self._line.close()

    def update(self, done: int) -> None:
        """Note that so many are done."""
        now = time.monotonic()
        # the pace is measured from here: what came before is the start of the workers
        self._first = self._first or (now, done)
        self.done = done
        if not self._silent and now >= self._next:
            self._next = now + _LOG_SECONDS
            share = f"{done:,} of {self.total:,} {self.unit} ({done / max(self.total, 1):.0%})"
            logger.info("%s: %s", self.title, ", ".join([share, *self._pace(now)]))

    def text(self, columns: int) -> str:
        """Return the line for a terminal of so many columns."""
        fields = [f"{self.done:,}/{self.total:,} {self.unit}", *self._pace(time.monotonic())]
        return progress_text(self.title, self.done / max(self.total, 1), fields, columns)

    def _pace(self, now: float) -> list[str]:
        """Return rate and time left, once there is a pace."""
        start, first = self._first or (now, self.done)
        if now <= start or self.done <= first:
            return []
        rate = (self.done - first) / (now - start)
        shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        left = format_duration((self.total - self.done) / rate)
        return [f"{shown} {self.unit}/s", f"{left} left"]


def progress_text(head: str, fraction: float, fields: list[str], columns: int) -> str:
    """Return `head [####....] fields` of at most `columns`; the field before the last goes first.

    The bar takes what the fields leave.
    """
    fields = list(fields)
    while len(fields) > 2 and len("  ".join([head, *fields])) + 12 > columns:
        del fields[-2]
    rest = "  ".join(fields)
    width = min(30, columns - len(head) - len(rest) - 4)
    middle = f" {bar(fraction, width)} " if width >= 5 else "  "
    return (head + middle + rest)[: max(columns, 0)]


def bar(fraction: float, width: int = 20) -> str:
    """Return `[####....]` with `width` cells."""
    done = round(width * min(max(fraction, 0.0), 1.0))
    return "[" + "#" * done + "." * (width - done) + "]"


def format_duration(seconds: float) -> str:
    """Return seconds as "1:02:03" or "2d 03:04:05"; "-:--:--" if not finite or negative."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    rest = f"{minute:02d}:{second:02d}"
    return f"{days}d {hour:02d}:{rest}" if days else f"{hour}:{rest}"


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
