"""Write what a run says: terminal, log file, metrics (JSON lines and `utils.sinks`).

Logging never stops a training: a full disk or a lost folder is reported once and the run goes on.
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from termcolor import colored
from torch import Tensor

from utils.distributed import rank
from utils.names import OneLine, board_tag, visible
from utils.progress import is_terminal
from utils.sinks import SINKS, Sink

logger = logging.getLogger("synco")

LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
_FAILED = "cannot write %s (%s); training goes on"
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
        if self.color and level:
            level = colored(level, _COLORS.get(record.levelno, "blue"), force_color=True)
        return f"{stamp} {self.label}{level}{visible(record.message)}"


class _TerminalHandler(logging.StreamHandler):
    """Write to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, which wipes the progress line in the same write."""
        wipe = "\r\x1b[K" if is_terminal(self.stream) else ""
        return wipe + super().format(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Stay silent: a closed terminal (nohup, broken pipe) is no reason to stop."""


class _FileHandler(logging.FileHandler):
    """Append to the log file; report a failed write once on the other handlers and go on."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            logger.warning(_FAILED, self.baseFilename, sys.exc_info()[1])


def setup_logger(folder: Path | None, is_main: bool) -> logging.Logger:
    """Return the logger "synco": INFO on rank 0, which also appends to log.txt, WARNING elsewhere.

    Repeated calls replace the handlers of the previous call. Colours need a terminal and no
    NO_COLOR.
    """
    close_logger()
    logger.setLevel(logging.INFO if is_main else logging.WARNING)
    terminal = _TerminalHandler(sys.stderr)
    color = is_terminal(sys.stderr) and not os.environ.get("NO_COLOR")
    terminal.setFormatter(_TerminalFormatter(color, "" if is_main else f"[rank {rank()}] "))
    logger.addHandler(terminal)
    if is_main and folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handler = _FileHandler(folder / LOG_FILE, encoding="utf-8")
        except OSError as error:
            logger.warning(_FAILED, folder / LOG_FILE, error)
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


def now() -> str:
    """Return the time in UTC, to the second, as `2026-11-29T00:06:48+00:00`."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and infinities as strings: strict JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return value


class Metrics:
    """Append scalars to `folder`/metrics.jsonl and sinks; without a folder do nothing."""

    def __init__(
        self,
        folder: Path | None,
        sinks: Iterable[str] = ("tensorboard",),
        task: str = "pretrain",
    ) -> None:
        """Open nothing yet: files appear with the first value.

        `sinks` are names of `utils.sinks.SINKS`. `task` groups the tags that they show.
        """
        self._folder = folder
        self._task = task
        # those that have not failed, None before the first value
        self._sinks: dict[str, Sink | None] = dict.fromkeys(sinks if folder else ())
        self._file: FileIO | None = None
        self._torn = False
        self._first_step: int | None = None
        self._warned: set[str] = set()

    def truncate_after(self, step: int, evaluation_too: bool = False) -> None:
        """Drop torn lines and lines of steps > `step`, so that a resumed run writes each step once.

        `evaluation_too`: drop the evaluation after `step` also. Its line has no learning rate.
        """
        self._first_step = step + 1
        if self._folder is not None:
            self._guard(METRICS_FILE, lambda: self._rewrite(step, evaluation_too))

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append the line {"step", **values, "time"}; numbers go to the sinks too."""
        if self._folder is None:
            return
        # tensors of one element become numbers
        plain = {key: v.item() if hasattr(v, "item") else v for key, v in values.items()}
        self._guard(METRICS_FILE, lambda: self._append(step, plain))
        tagged = {
            board_tag(key, self._task): value
            for key, value in plain.items()
            if isinstance(value, int | float)
        }
        self._to_sinks(lambda sink: sink.scalars(tagged, step))

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as the configuration, in the sinks."""
        self._to_sinks(lambda sink: sink.text(name, text, step))

    def picture(self, path: Path, step: int) -> None:
        """Show a PNG file that we wrote in the sinks, under its name without digits."""
        name = f"{'' if self._task == 'pretrain' else f'{self._task}/'}pictures/"
        name += re.sub(r"[_\d]+$", "", path.stem)
        self._to_sinks(lambda sink: sink.picture(name, _pixels(path), step))

    def embedding(self, features: Tensor, labels: Sequence[int], step: int) -> None:
        """Show features (N, D) and their labels in the sinks that can (TensorBoard's projector)."""
        self._to_sinks(lambda sink: sink.embedding(features, labels, step))

    def close(self) -> None:
        """Close all outputs."""
        if self._file is not None:
            self._guard(METRICS_FILE, self._file.close)
            self._file = None
        for name, sink in list(self._sinks.items()):
            if sink is not None:
                self._sinks[name] = None  # a later value opens it again
                self._guard_sink(name, sink.close)

    def _to_sinks(self, action: Callable[[Sink], None]) -> None:
        for name in list(self._sinks):
            self._guard_sink(name, partial(self._to_sink, name, action))

    def _to_sink(self, name: str, action: Callable[[Sink], None]) -> None:
        assert self._folder is not None
        sink = self._sinks[name] or SINKS[name](self._folder, self._first_step)
        self._sinks[name] = sink
        action(sink)

    def _guard_sink(self, name: str, action: Callable[[], None]) -> None:
        """Run `action`; a sink that fails in any way is off from then on, with one warning."""
        # Other people's code may raise anything, and after an error TensorBoard's writer is dead.
        try:
            action()
        except Exception as error:
            del self._sinks[name]
            logger.warning(_FAILED, name, error)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Run `action`; warn once for each file about an error of the outside world."""
        try:
            action()
        except (
            OSError,
            UnicodeError,
        ) as error:  # UnicodeError: a path that a C locale cannot spell
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(_FAILED, name, error)

    def _append(self, step: int, values: Mapping[str, object]) -> None:
        if self._file is None:
            self._file = self._open()
        record = {"step": step, **values, "time": now()}
        line = json.dumps(finite_json(record), allow_nan=False) + "\n"
        # After half a line, of a kill or a full disk, a new one begins.
        data = ("\n" + line if self._torn else line).encode()
        # Stays so if the write raises.
        self._torn = True
        # unbuffered: a full disk raises or takes a part
        self._torn = self._file.write(data) != len(data)

    def _open(self) -> FileIO:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        file = (self._folder / METRICS_FILE).open("ab+", buffering=0)
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            self._torn = file.read(1) != b"\n"  # a killed process left half a line
        return file

    def _rewrite(self, step: int, evaluation_too: bool) -> None:
        assert self._folder is not None
        path = self._folder / METRICS_FILE
        if self._file is not None:
            # Else later lines would go into the file that is replaced below.
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


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path, formats=["PNG"]) as picture:
        return np.asarray(picture.convert("RGB"))


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
