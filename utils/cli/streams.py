"""Make standard output and error safe: closed ones, broken pipes, control characters."""

import io
import os
import sys
from typing import Any

from utils.names import visible


def guard_streams() -> None:
    """Let this process write, also if its standard output or error was closed at the start.

    Control characters in printed text are shown as escapes.
    """
    # Else the next file that is opened, a checkpoint even, gets the number 2, and libraries write
    # their messages into it.
    _fill_gaps()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
    # not one of a test
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = _output(sys.stdout)


def _fill_gaps() -> None:
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)


def _output(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _Pipe(stream.fileno(), "wb", closefd=False)
    lines = stream.line_buffering or stream.write_through  # the latter: python -u
    return _Visible(
        io.BufferedWriter(raw), stream.encoding, "backslashreplace", line_buffering=lines
    )


class _Pipe(io.FileIO):
    """Drop output once its reader has gone (`| head -1`); the program continues."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


class _Visible(io.TextIOWrapper):
    """Show control characters as escapes."""

    def write(self, text: str) -> int:
        super().write(visible(text, keep="\n\t"))
        return len(text)
