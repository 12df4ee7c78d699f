"""A line on a terminal that redraws itself each second. A file or a pipe gets nothing."""

import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import TextIO

logger = logging.getLogger("synco")

_SECONDS = 1.0  # between two drawings
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
    """Draws what `describe(columns)` returns, on a terminal, from a second thread.

    A thread, since the line has to move during a long step, an evaluation or a compilation too.
    """

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
