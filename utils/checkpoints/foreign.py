"""Read files of other programs without executing anything of them: torch files that pickle a configuration,
plain pickles, safetensors.

What the pickle asks for is interpreted by ``inert.py``; the few constructions that files of weights
need (tensors, arrays, ordered dictionaries) are rebuilt by ``rebuild.py``. The rest stays a ``StandIn``.
"""

import io
import logging
import mmap
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from utils.checkpoints import file as checkpoint
from utils.checkpoints.file import CheckpointError
from utils.checkpoints.inert import ForeignFileError, StandIn, interpret
from utils.checkpoints.rebuild import STORAGES, Rebuilder, storage_identities

logger = logging.getLogger("synco")

_MAGIC = 0x1950A86A20F9469CFC6C  # the first value of torch files before 1.6


def read_torch(path: Path) -> dict[str, Any]:
    """Return the dictionary of a torch file, pickle of arrays or safetensors file, tensors on the CPU.

    Objects other than tensors, arrays, containers and numbers come as ``StandIn`` and are named in the log.
    Raises ``CheckpointError`` (a ``ValueError``): missing, damaged, compressed, or asking for code.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return dict(_guarded(path, _read_safetensors))
    if _is_zip(path):
        _guarded(path, _refuse_compressed)
    try:
        value = checkpoint.load(path)
    except CheckpointError as refused:
        if not isinstance(refused.__cause__, pickle.UnpicklingError):
            raise  # missing, truncated, or not what its record says
        value, stand_ins = _guarded(path, _read_inertly)
        if stand_ins:
            logger.warning("%s: left out as data only: %s", path, ", ".join(stand_ins))
    if not isinstance(value, dict):
        raise ForeignFileError(f"{path} holds a {type(value).__name__}, not a dictionary of tensors")
    _guarded(path, lambda _: _refuse_expanded(value))
    return value


def read_pickle(path: Path) -> Any:
    """Return the contents of a plain pickle: containers, text, numbers and numpy arrays, nothing else.

    Raises ``ForeignFileError`` naming anything else that the file asks for.
    """
    value, stand_ins = _guarded(path, _read_inertly)
    if stand_ins:
        raise ForeignFileError(f"{path} asks for {', '.join(stand_ins)}; only plain data is read")
    return value


def _guarded(path: Path, read: Callable[[Path], Any]) -> Any:
    """Call ``read(path)``; every failure becomes a ``ForeignFileError``, one line that names the path."""
    try:
        return read(path)
    except ForeignFileError as error:
        raise ForeignFileError(f"{path} {error}") from error
    except OSError as error:
        raise ForeignFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # hostile bytes make libraries raise nearly any type
        reason = str(error).splitlines()[0][:80] if str(error) else ""
        raise ForeignFileError(f"{path} is damaged ({type(error).__name__}: {reason})") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; the library refuses wrong offsets."""
    with safe_open(str(path), framework="pt") as file:
        # The library may return views of the mapped file. Copies stay valid when the file changes.
        return {name: file.get_tensor(name).clone() for name in file.keys()}


def _is_zip(path: Path) -> bool:
    """Tell a zip file as torch does, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _refuse_compressed(path: Path) -> None:
    """Refuse an archive that unpacks to more than it has; torch stores, never compresses."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ForeignFileError("unpacks to more bytes than it has; torch files are not compressed")
    if len(set(names)) != len(names):
        raise ForeignFileError("holds two entries of the same name")


def _refuse_expanded(value: Any) -> None:
    for tensor in _tensors(value, set()):
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ForeignFileError("holds a sparse or empty-shell tensor; save dense ones")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ForeignFileError(f"holds a tensor of shape {tuple(tensor.shape)} without as many values")


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item, seen)


# ---- containers of pickles -------------------------------------------------------------------------


def _read_inertly(path: Path) -> tuple[Any, list[str]]:
    """Return the value of a torch file or plain pickle and the names of what stayed a stand-in."""
    if _is_zip(path):
        with zipfile.ZipFile(path) as archive:
            return _read_zip(archive)
    with path.open("rb") as file:
        if not file.read(1):
            raise ForeignFileError("is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            return _read_stream(memory)  # type: ignore[arg-type]


def _read_zip(archive: zipfile.ZipFile) -> tuple[Any, list[str]]:
    entries = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(entries) != 1 or any("/code/" in name for name in archive.namelist()):
        raise ForeignFileError("is no torch file of weights; save its state_dict instead")
    folder = entries[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise ForeignFileError("was written on a big-endian machine; convert it there")
    read: dict[str, bytes] = {}

    def storage(key: str) -> bytes:
        if key not in read:
            read[key] = archive.read(f"{folder}data/{key}")
        return read[key]

    return Rebuilder(storage).finish(interpret(io.BytesIO(archive.read(entries[0]))))


def _read_stream(file: BinaryIO) -> tuple[Any, list[str]]:
    """Read a plain pickle or a torch file before 1.6: pickles one after the other, then the storages."""
    value = interpret(file)
    if value != _MAGIC or isinstance(value, StandIn):
        return Rebuilder(None).finish(value)
    _, system, value, keys = (interpret(file) for _ in range(4))
    if not isinstance(system, dict) or not system.get("little_endian", True):
        raise ForeignFileError("was written on a big-endian machine; convert it there")
    sizes = {identity[2]: STORAGES[identity[1].attribute].itemsize for identity in storage_identities(value)}
    storages = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little", signed=True)
        storages[key] = file.read(max(count, 0) * sizes.get(key, 1))
    return Rebuilder(storages.__getitem__).finish(value)
