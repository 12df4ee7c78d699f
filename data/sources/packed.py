"""One file of images with an index behind them, mapped into memory and read without a copy.

A pack is a head, the records (encoded images, or uint8 pixels H x W x 3), the arrays of the index, a JSON
text that says where they are, and a tail that says where the text is: a file that was cut has no tail.
`tools/pack.py` writes it.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.decode import decode_rgb
from data.sources.base import Source
from data.sources.folder_index import PackedStrings
from data.sources.mmap import checksum, map_file, view

VERSION = 1
HEAD = struct.pack("<8sI52x", b"SYNCOPAK", VERSION)
_TAIL = struct.Struct("<QQI4x8s")  # where the JSON starts, its length, its checksum, magic
_MAGIC = b"KAPOCNYS"


class PackIndex(NamedTuple):
    """The arrays of a pack of N images, in the order in which they stand in the file."""

    offsets: np.ndarray  # int64 (N+1,): where each record starts
    labels: np.ndarray  # int64 (N,)
    names_at: np.ndarray  # int64 (N+1,): where each name starts in `names`
    sizes: np.ndarray  # uint32 (N,2): height, width
    checksums: np.ndarray  # uint32 (N,): of the records
    names: np.ndarray  # uint8: all names in a row

    def content(self, classes: Sequence[str], raw: bool) -> str:
        """Return "count:digest" of everything that a reader of the pack can see."""
        state = hashlib.blake2b(json.dumps([list(classes), raw]).encode(), digest_size=16)
        for array in (np.diff(self.offsets), *self[1:]):
            state.update(np.ascontiguousarray(array).data)
        return f"{len(self.labels)}:{state.hexdigest()}"


_TYPES = {
    "offsets": "<i8",
    "labels": "<i8",
    "names_at": "<i8",
    "sizes": "<u4",
    "checksums": "<u4",
    "names": "u1",
}


def closing(index: PackIndex, described: dict[str, Any]) -> Iterator[bytes]:
    """Yield what stands behind the records: padding, the arrays, the JSON text and the tail.

    `described` holds at least the `classes`, the `split` and whether the records are `raw`.
    """
    end = int(index.offsets[-1])
    yield bytes(-end % 64)
    arrays = {name: array.astype(_TYPES[name], copy=False) for name, array in index._asdict().items()}
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

    The memory of a raw image is the file's own. Raises `ValueError` if the file is no whole pack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open()
        except (ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(
                f"DATA.PATH (--data-path): {path} is no pack, or was cut or damaged ({error}): copy it "
                "again, or write it with tools/pack.py"
            ) from error

    def _open(self) -> None:
        self._data = map_file(self.path)
        self.header = read_header(self._data)
        self.index = _read_index(self._data, self.header)
        self.names = PackedStrings.of_arrays(self.index.names, self.index.names_at)
        super().__init__(torch.from_numpy(self.index.labels), self.header["classes"])

    def __getstate__(self) -> dict[str, Any]:
        """Keep what is needed to map the same pack again, in a process that does not share memory."""
        return {"path": self.path, "digest": self.header["digest"], "max_pixels": self.max_pixels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the pack again; ``ValueError`` if it has been replaced meanwhile."""
        self.path, self.max_pixels = state["path"], state["max_pixels"]
        self._open()
        if self.header["digest"] != state["digest"]:
            raise ValueError(f"{self.path} was replaced by another pack while it was in use")

    def name(self, index: int) -> str:
        """Return "train.pack@/class/image.jpg", with the path that the image had."""
        return f"{self.path}@/{self.names[index]}"

    def record(self, index: int) -> memoryview:
        """Return the bytes of one image, not copied; `OSError` if they are not those that were packed."""
        start, stop = self.index.offsets[index : index + 2]
        data = self._data[start:stop]
        if checksum(data) != self.index.checksums[index]:
            raise OSError(f"damaged record in a pack: {self.name(index)}")
        return data

    def encoded(self, index: int) -> bytes | None:
        """Return the encoded bytes of one image, None in a pack of pixels."""
        return None if self.header["raw"] else bytes(self.record(index))

    def load(self, index: int) -> Tensor:
        """Return one image as uint8 (3,H,W) RGB."""
        data = self.record(index)
        if not self.header["raw"]:
            return decode_rgb(data, self.max_pixels)
        height, width = (int(side) for side in self.index.sizes[index])
        return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)

    def fingerprint(self) -> str:
        """Return the digest of names, labels and the images' checksums that stands in the file."""
        return self.header["digest"]


def read_header(data: memoryview) -> dict[str, Any]:
    """Return the JSON text of a mapped pack; ``ValueError`` if it is not whole."""
    if len(data) < len(HEAD) + _TAIL.size or data[:12] != HEAD[:12]:
        raise ValueError("it does not begin as a pack of this version does")
    start, length, expected, magic = _TAIL.unpack(data[-_TAIL.size :])
    if magic != _MAGIC or start + length + _TAIL.size != len(data):
        raise ValueError("its end is missing")
    text = data[start : start + length]
    if checksum(text) != expected:
        raise ValueError("its header does not match its checksum")
    return json.loads(bytes(text))


def _read_index(data: memoryview, header: dict[str, Any]) -> PackIndex:
    position, arrays = header["start"], {}
    for name, dtype in _TYPES.items():
        arrays[name] = view(data, dtype, position, header["lengths"][name])
        position += arrays[name].nbytes
    if checksum(data[header["start"] : position]) != header["checksum"]:
        raise ValueError("its index does not match its checksum")
    arrays["sizes"] = arrays["sizes"].reshape(-1, 2)
    return PackIndex(**arrays)


def packed(path: str, split: str) -> PackedSource:
    """Read <path>/<split>.pack; `path` may also be one pack, whose other split is looked for beside it."""
    place = Path(path)
    if place.is_file():
        source = PackedSource(place)
        if source.header["split"] == split:
            return source
        place = place.parent
    file = place / f"{split}.pack"
    if not file.is_file():
        raise ValueError(
            f"DATA.PATH (--data-path): {file} does not exist; DATA.DATASET 'packed' needs it: write it with "
            f"tools/pack.py --split {split}"
        )
    return PackedSource(file)
