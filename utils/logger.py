"""Write what a run says: terminal, log file, metrics (JSON lines, TensorBoard).

Logging never stops a training: a full disk or a lost folder is reported once and the run goes on.
"""

import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from termcolor import colored
from torch import Tensor

from utils.distributed import rank
from utils.names import OneLine, board_tag, visible
from utils.progress import is_terminal

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

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
    """Append scalars to `folder`/metrics.jsonl and TensorBoard; without a folder do nothing."""

    def __init__(
        self, folder: Path | None, tensorboard: bool = True, task: str = "pretrain"
    ) -> None:
        """Open nothing yet: files appear with the first value. `task` groups TensorBoard's tags."""
        self._folder = folder
        self._task = task
        self._tensorboard = tensorboard and folder is not None
        self._file: FileIO | None = None
        self._torn = False
        self._board: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._warned: set[str] = set()

    def truncate_after(self, step: int, evaluation_too: bool = False) -> None:
        """Drop torn lines and lines of steps > `step`, so that a resumed run writes each step once.

        `evaluation_too`: drop the evaluation after `step` also. Its line has no learning rate.
        """
        self._purge_step = step + 1
        if self._folder is not None:
            self._guard(METRICS_FILE, lambda: self._rewrite(step, evaluation_too))

    def write(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """Append the line {"step", **values, "time"}; numbers go to TensorBoard too."""
        if self._folder is None:
            return
        # tensors of one element become numbers
        plain = {key: v.item() if hasattr(v, "item") else v for key, v in values.items()}
        self._guard(METRICS_FILE, lambda: self._append(step, plain))
        if self._tensorboard:
            self._guard("tensorboard", lambda: self._scalars(step, plain))

    def text(self, name: str, text: str, step: int) -> None:
        """Show a text, such as the configuration, in TensorBoard."""
        if self._tensorboard:
            # indented by four it is code in Markdown
            code = "".join(f"    {line}\n" for line in text.splitlines())
            self._guard("tensorboard", lambda: self._writer().add_text(name, code, step))

    def picture(self, path: Path, step: int) -> None:
        """Show a PNG file that we wrote in TensorBoard, under its name without digits."""
        if self._tensorboard:
            name = f"{'' if self._task == 'pretrain' else f'{self._task}/'}pictures/"
            name += re.sub(r"[_\d]+$", "", path.stem)
            self._guard("tensorboard", lambda: self._add_picture(name, path, step))

    def embedding(self, features: Tensor, labels: Sequence[int], step: int) -> None:
        """Show features (N, D) in TensorBoard's projector, coloured by their labels."""
        if self._tensorboard:
            self._guard(
                "tensorboard",
                lambda: self._writer().add_embedding(features, list(labels), None, step, "knn"),
            )

    def close(self) -> None:
        """Close both outputs."""
        if self._file is not None:
            self._guard(METRICS_FILE, self._file.close)
            self._file = None
        if self._board is not None:
            self._guard("tensorboard", self._board.close)
            self._board = None

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Run `action`; warn once for each output about an error of the outside world."""
        try:
            action()
        except Exception as error:
            # TensorBoard may raise anything, and its writer thread is dead after an error.
            if name == "tensorboard":
                self._tensorboard, self._board = False, None
            # UnicodeError: a path that a C locale cannot spell
            elif not isinstance(error, (OSError, UnicodeError)):
                raise
            if name not in self._warned:
                self._warned.add(name)
                logger.warning(_FAILED, name, error)

    def _append(self, step: int, values: Mapping[str, object]) -> None:
        if self._file is None:
            self._file = self._open()
        record = {"step": step, **values, "time": now()}
        line = json.dumps(finite_json(record), allow_nan=False) + "\n"
        data = ("\n" + line if self._torn else line).encode()
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

    def _writer(self) -> "SummaryWriter":
        if self._board is None:
            # here, since the package is optional and slow to import
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        return self._board

    def _scalars(self, step: int, values: Mapping[str, object]) -> None:
        board = self._writer()
        for key, value in values.items():
            if isinstance(value, int | float):
                board.add_scalar(board_tag(key, self._task), value, step)

    def _add_picture(self, name: str, path: Path, step: int) -> None:
        with Image.open(path, formats=["PNG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._writer().add_image(name, pixels, step, dataformats="HWC")


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
