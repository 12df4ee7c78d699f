"""Read torch files, old and new, and plain pickles, without executing anything of them.

All programs read here, their own checkpoints too: one reader has one set of checks. Every size is
compared with the bytes that are in the file before memory is taken.
"""

import io
import mmap
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from utils.checkpoints.pickles import read_pickle_stream
from utils.checkpoints.rebuild import ForeignFileError, Storage

Result = TypeVar("Result")

_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of torch files before 1.6
_MOST_VALUES = 10_000_000  # that a walk through the contents may meet


def read_file(path: Path, *, checksums: bool = True) -> tuple[object, list[str]]:
    """Return the contents of a torch file or pickle and the names of what became a `StandIn`.

    `checksums`: compare those of every entry of a zip file. Raises `ForeignFileError` naming the
    path.
    """

    def read(path: Path) -> tuple[object, list[str]]:
        _refuse_special(path)
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # torch tells a zip file in the same way
        value, foreign = _read_zip(path, checksums) if zipped else _read_plain(path)
        _weigh(value, {})
        return value, foreign

    return guarded(path, read)


def guarded(path: Path, read: Callable[[Path], Result]) -> Result:
    """Call `read(path)`; every failure becomes a `ForeignFileError` of one line with the path."""
    try:
        return read(path)
    except Exception as error:  # hostile bytes make libraries raise nearly any type
        raise ForeignFileError(f"{path} {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, ForeignFileError):
        return str(error)
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    # no str(error): it may be the repr of a hostile value, which can have no end
    return f"is no file of weights, or damaged or truncated ({type(error).__name__})"


def _refuse_special(path: Path) -> None:
    """Refuse pipes and devices, which have no end, and empty files."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ForeignFileError("is no regular file")
    if found.st_size == 0:
        raise ForeignFileError("is empty")


def _weigh(value: object, known: dict[int, int]) -> int:
    """Return how many values a walk meets.

    Raises `ForeignFileError` for too many, for a container inside itself and for bare storages.
    """
    if isinstance(value, Storage):
        raise ForeignFileError("holds a bare storage; save tensors instead")
    if not isinstance(value, (dict, list, tuple)):
        return 1
    # Each container is walked once: 60 lists, each twice in the next, hold 2^60 values.
    if id(value) not in known:
        known[id(value)] = 0  # not finished: who meets it now is inside of it
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_weigh(item, known) for item in items)
    size = known[id(value)]
    if size == 0:
        raise ForeignFileError("holds a container inside itself")
    if size > _MOST_VALUES:
        raise ForeignFileError(f"holds more than {_MOST_VALUES:,} values")
    return size


# ---- zip files: torch since 1.6 ------------------------------------------------------------------


def _read_zip(path: Path, checksums: bool) -> tuple[object, list[str]]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ForeignFileError("unpacks to more bytes than it has; save it uncompressed")
        if len(set(names)) != len(names):
            raise ForeignFileError("holds two entries of the same name")
        if checksums and (damaged := archive.testzip()):
            raise ForeignFileError(f"is damaged: {damaged!r} fails its checksum; copy it again")
        folder = _folder(archive, names)
        storages: dict[str, Tensor] = {}

        def locate(key: str, count: int, itemsize: int) -> Tensor:
            if key not in storages:
                # torch.tensor copies into memory that is aligned as torch aligns it
                raw = np.frombuffer(archive.read(f"{folder}data/{key}"), np.uint8)
                storages[key] = torch.tensor(raw)
            return storages[key]

        return read_pickle_stream(io.BytesIO(archive.read(f"{folder}data.pkl")), locate)


def _folder(archive: zipfile.ZipFile, names: list[str]) -> str:
    """Return the folder of the archive in which a torch file's parts are."""
    entries = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if any("/code/" in name for name in names):
        raise ForeignFileError("is a TorchScript archive (code); save its state_dict instead")
    if len(entries) != 1:
        raise ForeignFileError("is no torch file of weights; save its state_dict instead")
    folder = entries[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise ForeignFileError("was written on a big-endian machine; convert it there")
    return folder


# ---- files that begin with a pickle --------------------------------------------------------------


def _read_plain(path: Path) -> tuple[object, list[str]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        value, foreign = read_pickle_stream(memory)  # type: ignore[arg-type]  # it reads like a file
        if type(value) is int and value == _MAGIC:
            return _read_legacy(memory, path.stat().st_size)  # type: ignore[arg-type]
        return value, foreign


def _read_legacy(file: BinaryIO, most: int) -> tuple[object, list[str]]:
    """Read a torch file before 1.6: pickles one after the other, then the storages."""
    read_pickle_stream(file)  # the version
    system, _ = read_pickle_stream(file)
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ForeignFileError("was written on a big-endian machine; convert it there")
    storages: dict[str, tuple[Tensor, int]] = {}

    def locate(key: str, count: int, itemsize: int) -> Tensor:
        nonlocal most
        if key not in storages:  # its values come later in the file
            most -= count * itemsize
            if most < 0:
                raise ForeignFileError("declares more values than it has")
            storages[key] = torch.zeros(count * itemsize, dtype=torch.uint8), count
        return storages[key][0]

    value, foreign = read_pickle_stream(file, locate)
    keys, _ = read_pickle_stream(file)
    # type before value: a nested value takes for ever to hash
    if not isinstance(keys, list) or not all(type(key) is str for key in keys):
        raise TypeError
    if set(keys) != set(storages):
        raise ForeignFileError("is damaged: its list of storages is not that of its tensors")
    for key in keys:
        flat, count = storages[key]
        found, raw = int.from_bytes(file.read(8), "little"), file.read(flat.numel())
        if found != count or len(raw) != flat.numel():
            raise ForeignFileError("is truncated or damaged: a storage has not the declared size")
        flat.numpy()[:] = np.frombuffer(raw, np.uint8)
    return value, foreign
