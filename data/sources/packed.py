"""One file of images with an index behind them.

A pack is a head, the records (encoded images, or uint8 pixels H x W x 3), the arrays of the index,
a JSON text that says where they are, and a tail that says where the text is: a file that was cut
has no tail. `tools/pack.py` writes it.
"""

import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from data.sources.base import PackedStrings, Source, compare_labels, digest, is_labelled
from data.sources.binary import checksum, view

VERSION = 1
HEAD = struct.pack("<8sI52x", b"SYNCOPAK", VERSION)
_TAIL = struct.Struct("<QQI4x8s")  # where the JSON starts, its length, its checksum, magic
_MAGIC = b"KAPOCNYS"


Header: TypeAlias = dict[str, Any]  # the JSON text, as a packer wrote it


class PackIndex(NamedTuple):
    """The arrays of a pack of N images, in their order in the file."""

    offsets: np.ndarray  # int64 (N+1,): where each record starts
    labels: np.ndarray  # int64 (N,)
    names_at: np.ndarray  # int64 (N+1,): where each name starts in `names`
    sizes: np.ndarray  # uint32 (N,2): height, width
    checksums: np.ndarray  # uint32 (N,): of the records
    names: np.ndarray  # uint8: all names in a row

    def content(self, classes: Sequence[str], raw: bool) -> str:
        """Return "count:digest" of everything that a reader of the pack can see."""
        described = json.dumps([list(classes), raw]).encode()
        return digest(len(self.labels), described, np.diff(self.offsets), *self[1:])


_TYPES = {
    "offsets": "<i8",
    "labels": "<i8",
    "names_at": "<i8",
    "sizes": "<u4",
    "checksums": "<u4",
    "names": "u1",
}


def closing(index: PackIndex, described: Header) -> Iterator[bytes]:
    """Yield the bytes after the records: padding, the arrays, the JSON text and the tail.

    `described` holds at least the `classes`, the `split` and whether the records are `raw`.
    """
    end = int(index.offsets[-1])
    yield bytes(-end % 64)
    arrays = {
        name: array.astype(_TYPES[name], copy=False) for name, array in index._asdict().items()
    }
    body = b"".join(array.tobytes() for array in arrays.values())
    yield body
    header = {
        **described,
        "count": len(index.labels),
        "start": end + -end % 64,
        "lengths": {name: array.size for name, array in arrays.items()},
        "checksum": checksum(body),
        "digest": index.content(described["classes"], described["raw"]),
    }
    text = json.dumps(header).encode()
    yield text
    yield _TAIL.pack(header["start"] + len(body), len(text), checksum(text), _MAGIC)


class PackedSource(Source):
    """The images of one pack; `header` is what the packer said of them.

    The index is held in memory and a record is read when it is asked for. Nothing is mapped: the
    map of a file that is cut while it is in use ends the process without a word. Raises
    `ValueError` if the file is no whole pack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()

    def _open(self) -> None:
        self._file = self.path.open("rb")
        try:
            self.header, body = _read_header(self._file)
            self.index = _read_index(body, self.header)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise ValueError(
                f"DATA.PATH (--data-path): {self.path} is no pack, or was cut or damaged "
                f"({error}): copy it again, or write it with tools/pack.py"
            ) from error
        self.names = PackedStrings.of_arrays(self.index.names, self.index.names_at)
        super().__init__(torch.from_numpy(self.index.labels), self.header["classes"])

    def __getstate__(self) -> dict[str, object]:
        """Keep what opens the same pack again in a process that does not share memory."""
        return {
            "path": self.path,
            "digest": self.header["digest"],
            "max_pixels": self.max_pixels,
            "pixels": self.pixels,
        }

    def __setstate__(self, state: Header) -> None:
        """Open the pack again; `ValueError` if it has been replaced meanwhile."""
        self.path, self.max_pixels = state["path"], state["max_pixels"]
        self.pixels = state["pixels"]
        self._open()
        if self.header["digest"] != state["digest"]:
            raise ValueError(f"{self.path} was replaced by another pack while it was in use")

    def name(self, index: int) -> str:
        """Return "train.pack@/class/image.jpg", with the path that the image had."""
        return f"{self.path}@/{self.names[index]}"

    def record(self, index: int) -> bytearray:
        """Read the bytes of one image; `OSError` if they are not those that were packed."""
        start, stop = (int(place) for place in self.index.offsets[index : index + 2])
        data = bytearray(stop - start)  # torch wants memory that may be written to
        # positioned: workers share the file and its position
        if os.preadv(self._file.fileno(), [data], start) < len(data):
            raise OSError(f"the pack was cut while it was in use: copy {self.path} again")
        if checksum(data) != self.index.checksums[index]:
            raise OSError(f"damaged record in a pack: {self.name(index)}")
        return data

    @property
    def holds_files(self) -> bool:
        """Tell whether the records are files, not pixels."""
        return not self.header["raw"]

    def encoded(self, index: int) -> bytes | None:
        """Return the encoded bytes of one image, None in a pack of pixels."""
        return None if self.header["raw"] else bytes(self.record(index))

    def load(self, index: int) -> Tensor:
        """Return one image as uint8 (3,H,W) RGB."""
        if not self.header["raw"]:
            return super().load(index)
        data = self.record(index)
        height, width = (int(side) for side in self.index.sizes[index])
        return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

    def fingerprint(self) -> str:
        """Return the digest of names, labels and the images' checksums, as the file has it."""
        return self.header["digest"]


# What a reader takes from the JSON text. It may come from a stranger.
_HEADER_TYPES = {
    "classes": list,
    "split": str,
    "raw": bool,
    "count": int,
    "start": int,
    "lengths": dict,
    "checksum": int,
    "digest": str,
}


def _read_header(file: BinaryIO) -> tuple[Header, bytearray]:
    """Return the JSON text and the bytes of the arrays; `ValueError` if the pack is not whole."""
    size = file.seek(0, os.SEEK_END)
    if size < len(HEAD) + _TAIL.size or _read(file, 0, 12) != HEAD[:12]:
        raise ValueError("it does not begin as a pack of this version does")
    end, length, expected, magic = _TAIL.unpack(_read(file, size - _TAIL.size, _TAIL.size))
    # a cut file ends anywhere but in a tail
    if magic != _MAGIC or end + length + _TAIL.size != size:
        raise ValueError("its end is missing")
    # Each checksum is read before what it covers is believed.
    text = _read(file, end, length)
    if checksum(text) != expected:
        raise ValueError("its header does not match its checksum")
    header = json.loads(text)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    for name, kind in _HEADER_TYPES.items():
        if not isinstance(header.get(name), kind):
            raise ValueError(f"its header has no {name!r} of type {kind.__name__}")
    if not all(isinstance(name, str) for name in header["classes"]):
        raise ValueError("its header has a class whose name is no text")
    if not len(HEAD) <= header["start"] <= end:
        raise ValueError("its index does not stand between the records and the header")
    return header, bytearray(_read(file, header["start"], end - header["start"]))


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    return file.read(count)


def _read_index(body: bytearray, header: Header) -> PackIndex:
    if checksum(body) != header["checksum"]:
        raise ValueError("its index does not match its checksum")
    position, arrays = 0, {}
    for name, dtype in _TYPES.items():
        arrays[name] = view(memoryview(body), dtype, position, header["lengths"][name])
        position += arrays[name].nbytes
    arrays["sizes"] = arrays["sizes"].reshape(-1, 2)
    index = PackIndex(**arrays)
    _check_index(index, header)
    return index


def _check_index(index: PackIndex, header: Header) -> None:
    """Raise `ValueError` if a later look into the index could fail or mislead."""
    count = header["count"]
    if [len(array) for array in index[:5]] != [count + 1, count, count + 1, count, count]:
        raise ValueError("the arrays of its index have other lengths than its count of images says")
    for cuts, first, last in (
        (index.offsets, len(HEAD), header["start"]),
        (index.names_at, 0, len(index.names)),
    ):
        # views of the index are not checked again when images are read
        if cuts[0] != first or cuts[-1] > last or (cuts[1:] < cuts[:-1]).any():
            raise ValueError("its index points outside of the file, or backwards")
    if count and not -1 <= index.labels.min() <= index.labels.max() < len(header["classes"]):
        raise ValueError("its index has a label without a class")
    if index.content(header["classes"], header["raw"]) != header["digest"]:
        raise ValueError("its digest is that of another content")


def packed(path: str, split: str) -> PackedSource:
    """Read <path>/<split>.pack; `path` may also be a pack, with the other split beside it."""
    source = _open_split(Path(path), split)
    train = source.path.parent / "train.pack"
    if split == "val" and train.is_file():
        _compare_with_train(source, PackedSource(train))
    return source


def _compare_with_train(val: PackedSource, train: PackedSource) -> None:
    if not is_labelled(val) or not is_labelled(train):
        return
    if val.classes != train.classes:
        other = sorted(set(val.classes) ^ set(train.classes))[:5] or "the same, in another order"
        raise ValueError(
            f"DATA.PATH (--data-path): {val.path} and {train.path} have different classes "
            f"({other}): pack both splits of one data set"
        )
    compare_labels(val.path, val.labels.numpy(), train.labels.numpy(), val.classes)


def _open_split(place: Path, split: str) -> PackedSource:
    if place.is_file():
        source = PackedSource(place)
        if source.header["split"] == split:
            return source
        place = place.parent
    file = place / f"{split}.pack"
    if not file.is_file():
        raise ValueError(
            f"DATA.PATH (--data-path): {file} does not exist; DATA.DATASET 'packed' needs it: "
            f"write it with tools/pack.py --split {split}"
        )
    return PackedSource(file)
