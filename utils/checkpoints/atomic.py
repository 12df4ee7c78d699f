"""Write files that are whole or not there: hashed as written and forced to the disk."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

Fill = Callable[[BinaryIO], object]  # writes the content of a file


class _HashingFile:
    """Count and hash what is written to a file; remember the error that torch may wrap."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        # not len(): it counts elements, which may be larger than a byte
        size = memoryview(data).nbytes
        self.sha256.update(data)
        self.bytes += size
        return size

    def flush(self) -> None:
        self.file.flush()


def tmp_path(path: Path) -> Path:
    """Return the name under which `path` is written before its rename."""
    return path.with_name(path.name + ".tmp")


def write_synced(path: Path, fill: Fill) -> dict[str, int | str]:
    """Let `fill(file)` write `path`, fsync it and return {"bytes", "sha256"}.

    Every failure of the disk is an OSError, whatever torch makes of it.
    """
    file = path.open("wb")
    hashing = _HashingFile(file)
    try:
        fill(cast(BinaryIO, hashing))  # torch and pickle only write and flush
        file.flush()
        # before the rename: a power cut could else leave the new name without content
        os.fsync(file.fileno())
        file.close()
    except BaseException as error:
        with contextlib.suppress(OSError):  # close() tries to flush once more
            file.close()
        if hashing.error is not None and error is not hashing.error:
            raise OSError(hashing.error.errno, hashing.error.strerror, str(path)) from error
        raise
    return {"bytes": hashing.bytes, "sha256": hashing.sha256.hexdigest()}


def write_file(path: Path, fill: Fill) -> dict[str, int | str]:
    """Let `fill(file)` replace `path` in one step, as `write_synced` does.

    After a kill it holds the old content or the new one.
    """
    with removed_on_error(tmp_path(path)):
        written = write_synced(tmp_path(path), fill)
        # atomic: a reader sees the old file or the new one
        os.replace(tmp_path(path), path)
    sync_folder(path.parent)
    return written


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step: after a kill it holds the old text or the new one."""
    # escapes: the name of a file may hold bytes that are no UTF-8
    write_file(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def sync_folder(folder: Path) -> None:
    """Force the renames in `folder` to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def removed_on_error(*paths: Path) -> Iterator[None]:
    """Remove `paths` if the block raises."""
    try:
        yield
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):
                os.remove(path)
        raise


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        # piece by piece: a checkpoint may be larger than the memory
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
