"""Write what a run says: terminal and log file, metrics (JSON lines, TensorBoard), one progress line.

Logging never stops a training: a full disk or a lost folder is reported once and the run goes on.
"""

import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from termcolor import colored

from utils.distributed import rank
from utils.names import OneLine, visible

logger = logging.getLogger("synco")

LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
_COLORS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class _TerminalFormatter(OneLine):
    """Format a record for people: time, level if not INFO, message; coloured on a terminal."""

    def __init__(self, color: bool, label: str) -> None:
        super().__init__(datefmt="%H:%M:%S")
        self.color, self.label = color, label

    def formatMessage(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record, self.datefmt)
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        if self.color:
            stamp = colored(stamp, "green", force_color=True)
            level = (
                colored(level, _COLORS.get(record.levelno, "blue"), force_color=True)
                if level
                else ""
            )
        return f"{stamp} {self.label}{level}{visible(record.message)}"


class _TerminalHandler(logging.StreamHandler):
    """Write to the terminal; wipe a progress line that stands there, the next update draws it again."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if _is_terminal(self.stream):
                self.stream.write("\r\x1b[K")
        except (OSError, ValueError):
            return
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Stay silent: a closed terminal (nohup, broken pipe) is no reason to stop."""


class _FileHandler(logging.FileHandler):
    """Append to the log file; after a failed write say so once on the other handlers and go on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            logger.warning(
                "cannot write %s (%s); training goes on", self.baseFilename, sys.exc_info()[1]
            )


def _is_terminal(stream: TextIO | None) -> bool:
    if stream is None:  # closed before Python started
        return False
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def setup_logger(folder: Path | None, is_main: bool) -> logging.Logger:
    """Return the logger "synco": INFO on rank 0, WARNING elsewhere; rank 0 also appends to `folder`/log.txt.

    Repeated calls replace the handlers of the previous call. Colours need a terminal and no
    NO_COLOR.
    """
    close_logger()
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    terminal = _TerminalHandler(sys.stderr)
    color = _is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    terminal.setFormatter(_TerminalFormatter(color, "" if is_main else f"[rank {rank()}] "))
    logger.addHandler(terminal)
    if is_main and folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handler = _FileHandler(folder / LOG_FILE, encoding="utf-8")
        except OSError as error:
            logger.warning(
                "cannot open %s (%s); training goes on without it", folder / LOG_FILE, error
            )
        else:
            handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
            logger.addHandler(handler)
    return logger


def close_logger() -> None:
    """Remove and close the handlers that `setup_logger` added; handlers of others stay."""
    for handler in list(logger.handlers):
        if isinstance(handler, _TerminalHandler | _FileHandler):
            logger.removeHandler(handler)
            try:
                handler.close()
            except OSError:  # unwritten text of a full disk; said when it happened
                pass


def finite_json(value: Any) -> Any:
    """Return `value` with what strict JSON has no word for replaced: NaN and infinities become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return value


class Metrics:
    """Append scalars to `folder`/metrics.jsonl and TensorBoard; without a folder do nothing."""

    def __init__(self, folder: Path | None, tensorboard: bool = True) -> None:
        """Open nothing yet: files appear with the first value."""
        self._folder = folder
        self._tensorboard = tensorboard and folder is not None
        self._file: FileIO | None = None
        self._torn = False
        self._board: Any = None
        self._purge_step: int | None = None
        self._warned: set[str] = set()

    def truncate_after(self, step: int, evaluation_too: bool = False) -> None:
        """Drop torn lines and lines of steps > `step`, so that a resumed run writes each step once.

        With `evaluation_too` also the evaluation after `step`, which has no learning rate.
        """
        self._purge_step = step + 1
        if self._folder is not None:
            self._guard(METRICS_FILE, lambda: self._rewrite(step, evaluation_too))

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append the line {"step": step, **values}, numbers also to TensorBoard; tensors hold one element."""
        if self._folder is None:
            return
        plain = {
            key: value.item() if hasattr(value, "item") else value for key, value in values.items()
        }
        self._guard(METRICS_FILE, lambda: self._append(step, plain))
        if self._tensorboard:
            self._guard("tensorboard", lambda: self._scalars(step, plain))

    def close(self) -> None:
        """Close both outputs."""
        if self._file is not None:
            self._guard(METRICS_FILE, self._file.close)
            self._file = None
        if self._board is not None:
            self._guard("tensorboard", self._board.close)
            self._board = None

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Run `action`; an error of the outside world is warned about once for each output.

        TensorBoard is a program of others: it fails on import and while it writes in ways of its
        own.
        """
        try:
            action()
        except Exception as error:
            if name == "tensorboard":  # its writer thread is dead after an error
                self._tensorboard, self._board = False, None
            # paths that a C locale cannot spell
            elif not isinstance(error, (OSError, UnicodeError)):
                raise
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("cannot write %s (%s); training goes on", name, error)

    def _append(self, step: int, values: dict[str, Any]) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        line = json.dumps(finite_json({"step": step, **values}), allow_nan=False) + "\n"
        data = ("\n" + line if self._torn else line).encode()
        self._torn = True
        # unbuffered: a full disk raises or takes a part
        self._torn = self._file.write(data) != len(data)

    def _open(self) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / METRICS_FILE).open("ab+", buffering=0)
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            self._torn = self._file.read(1) != b"\n"  # a killed process left half a line

    def _rewrite(self, step: int, evaluation_too: bool) -> None:
        assert self._folder is not None
        path = self._folder / METRICS_FILE
        if self._file is not None:
            self._file.close()
            self._file = None
        if not path.exists():
            return
        tmp = path.with_name(path.name + ".tmp")
        with (
            path.open(encoding="utf-8", errors="replace") as old,
            tmp.open("w", encoding="utf-8") as new,
        ):
            new.writelines(line for line in old if _stays(line, step, evaluation_too))
        os.replace(tmp, path)

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for key, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(key, value, step)


def _stays(line: str, step: int, evaluation_too: bool) -> bool:
    """Tell whether a line of metrics.jsonl is whole and stays, see `Metrics.truncate_after`."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    found = record.get("step") if isinstance(record, dict) else None
    if type(found) is not int or not line.endswith("\n"):
        return False
    return found < step or (found == step and ("lr" in record or not evaluation_too))


class ProgressLine:
    """Show one line that rewrites itself where a terminal shows it; write nothing to a file or a pipe."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        """Write to `stream`, standard error if None."""
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._active = _is_terminal(self._stream)
        self._first: tuple[float, int] | None = None

    def update(
        self, epoch: int, step: int, loss: float, lr: float, images_per_second: float
    ) -> None:
        """Redraw the line; `step` counts finished steps, the time left follows from this process's pace."""
        if not self._active:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (now, step)
        since, start = self._first
        left = (now - since) / (step - start) * (self._total - step) if step > start else math.nan
        text = (
            f"epoch {epoch}  {_bar(step / max(self._total, 1))} {step}/{self._total}  loss {loss:.4f}"
            f"  lr {lr:.2e}  {images_per_second:.0f} images/s  ETA {format_duration(left)}"
        )
        self._write("\r" + text[: shutil.get_terminal_size().columns - 1] + "\x1b[K")

    def close(self) -> None:
        """Wipe the line."""
        if self._active:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal went away
            self._active = False


def _bar(fraction: float, width: int = 20) -> str:
    done = round(width * min(max(fraction, 0.0), 1.0))
    return "[" + "#" * done + "." * (width - done) + "]"


def format_duration(seconds: float) -> str:
    """Return seconds as "H:MM:SS", with days as "2d 03:04:05"; "-:--:--" if not finite or negative."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (
        f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
        if days
        else f"{hour}:{minute:02d}:{second:02d}"
    )
