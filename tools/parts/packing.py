"""An unfinished pack on the disk: a kill at any instant loses only the last seconds."""

import contextlib
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from data.sources.binary import checksum
from data.sources.packed import HEAD, PackIndex, closing
from utils.checkpoints.locks import try_lock

Settings = dict[str, object]  # all that the bytes of a pack depend on
SKIPPED = -1  # the length of an image that was left out
_ROW = np.dtype(
    [
        ("index", "<i8"),  # of the image in the source
        ("length", "<i8"),  # of its record
        ("checksum", "<u4"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("unused", "<u4"),
    ]
)
# After as many bytes or seconds, whichever comes first, what was written is forced to the disk.
_COMMIT_BYTES = 64 << 20
_COMMIT_SECONDS = 10.0


@dataclass
class Partial:
    """An unfinished pack: its records in order, and a journal with a row for each on the disk."""

    path: Path
    journal_path: Path
    data: IO[bytes]
    journal: IO[bytes]
    rows: np.ndarray
    done: int  # images of the source with a row
    committed: int = 0
    pending: int = 0  # bytes since the last commit
    since: float = field(default_factory=time.monotonic)  # the last commit

    @staticmethod
    def journal_of(output: Path) -> Path:
        """Return the path of the journal of a pack."""
        return output.with_name(f"{output.name}.partial.journal")

    @classmethod
    def open(cls, output: Path, settings: Settings, count: int, skip: bool) -> "Partial":
        """Continue a pack or begin one; `ValueError` if its settings differ or it is in use."""
        path = output.with_name(f"{output.name}.partial")
        journal = cls.journal_of(output).open("a+b")
        _lock(journal, path)
        found = _read_journal(journal, path, settings)
        if len(found) and not skip and (found["length"] == SKIPPED).any():
            raise ValueError(
                f"{path} was begun with --skip-unreadable: give it again, or remove {path}"
            )
        data = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        # Records are on the disk before their rows, but a damaged disk may have lost some.
        ends = len(HEAD) + np.cumsum(np.maximum(found["length"], 0))
        found = found[: np.searchsorted(ends, os.fstat(data.fileno()).st_size, side="right")]
        line = json.dumps(settings).encode() + b"\n"
        journal.truncate(len(line) + found.nbytes if len(found) else 0)
        data.truncate(int(ends[len(found) - 1]) if len(found) else 0)
        if len(found):
            print(f"going on after {len(found)} of {count} images")
        else:
            data.write(HEAD)
            journal.write(line)
        data.seek(0, os.SEEK_END)
        rows = np.zeros(count, dtype=_ROW)
        rows[: len(found)] = found
        return cls(path, cls.journal_of(output), data, journal, rows, len(found), len(found))

    def add(self, record: bytes | None, height: int, width: int) -> None:
        """Append the record of the next image, or None to leave it out."""
        length = SKIPPED if record is None else len(record)
        self.rows[self.done] = (self.done, length, checksum(record or b""), height, width, 0)
        if record is not None:
            self.data.write(record)
            self.pending += len(record)
        self.done += 1
        if self.pending >= _COMMIT_BYTES or time.monotonic() - self.since > _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Force the records to the disk, then their rows."""
        # in this order: a row of a record that is not there would be believed
        self.data.flush()
        os.fsync(self.data.fileno())
        self.journal.write(self.rows[self.committed : self.done].tobytes())
        self.journal.flush()
        os.fsync(self.journal.fileno())
        self.committed, self.pending, self.since = self.done, 0, time.monotonic()

    def close_file(self, index: PackIndex, described: dict[str, object]) -> None:
        """Write the index after the records."""
        for part in closing(index, described):
            self.data.write(part)
        self.data.flush()
        os.fsync(self.data.fileno())

    def close(self) -> None:
        """Close the files; what could not be written is written by the next call."""
        for file in (self.data, self.journal):
            with contextlib.suppress(OSError):  # of a full disk, which has been reported
                file.close()


def _lock(journal: IO[bytes], path: Path) -> None:
    """Refuse to write beside another process."""
    if not try_lock(journal, path):
        raise ValueError(f"{path} is being written by another process; wait for it")


def _read_journal(journal: IO[bytes], path: Path, settings: Settings) -> np.ndarray:
    """Return the whole rows of a journal; `ValueError` if it is of other settings."""
    journal.seek(0)
    content = journal.read()
    line, newline, rest = content.partition(b"\n")
    if not newline:
        return np.zeros(0, dtype=_ROW)
    found = json.loads(line)
    # A repaired image changes what the images hold, and the command that it stopped goes on.
    if isinstance(found, dict):
        found["content"] = settings.get("content")
    if found != settings:
        raise ValueError(
            f"{path} was begun otherwise ({difference(found, settings)}): repeat that command, "
            f"or remove {path} and {journal.name}"
        )
    # a kill may have cut off the last row
    rows = np.frombuffer(rest, dtype=_ROW, count=len(rest) // _ROW.itemsize)
    wrong = np.flatnonzero((rows["index"] != np.arange(len(rows))) | (rows["length"] == 0))
    return rows[: wrong[0]] if len(wrong) else rows


def difference(old: object, new: Settings) -> str:
    """Say which settings differ."""
    old = old if isinstance(old, dict) else {}
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return "; ".join(f"{key}: {old.get(key)!r}, now {new.get(key)!r}" for key in keys)
