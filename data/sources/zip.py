"""Zip archives with a map file, as in MoBY and Swin: <root>/{train,val}.zip and {train,val}_map.txt."""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils.distributed as distributed
from data.decode import decode_rgb
from data.sources.base import Source, digest
from data.sources.folder_index import PackedStrings

CACHE_MODES = ("no", "part", "full")
ZIP_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field


class ZipSource(Source):
    """Images in one zip; the directory is read once, afterwards an image is one positioned read.

    `cache_mode`: "no" reads on demand, "full" holds all encoded bytes in every process, "part" those with
    index mod world == rank, reading the others on demand. Every process opens the file for itself.
    """

    def __init__(
        self, path: Path, names: list[str], labels: list[int], cache_mode: str, rank: int, world: int
    ) -> None:
        super().__init__(torch.tensor(labels, dtype=torch.int64), [str(c) for c in range(max(labels) + 1)])
        self.path, self.names = path, PackedStrings(names)
        self._entries = _read_directory(path, names)
        self._file: tuple[int, int] | None = None  # (process id, descriptor)
        held = {"no": [], "full": range(len(names)), "part": range(rank, len(names), world)}[cache_mode]
        encoded = [self.read(index) for index in held]
        self._slot = np.full(len(names), -1, dtype=np.int64)
        self._slot[list(held)] = np.arange(len(held))
        self._offsets = np.cumsum([0, *(len(data) for data in encoded)], dtype=np.int64)
        self._cache = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def name(self, index: int) -> str:
        """Return "archive.zip@/inner/path"."""
        return f"{self.path}@/{self.names[index]}"

    def encoded(self, index: int) -> bytes:
        """Return the encoded bytes of one image."""
        return self.cached(index) or self.read(index)

    def load(self, index: int) -> Tensor:
        """Read and decode one image as uint8 (3,H,W) RGB."""
        return decode_rgb(self.encoded(index), self.max_pixels)

    def cached(self, index: int) -> bytes | None:
        """Return the encoded bytes that this process holds, or None."""
        slot = self._slot[index]
        return None if slot < 0 else self._cache[self._offsets[slot] : self._offsets[slot + 1]].tobytes()

    def read(self, index: int) -> bytes:
        """Read the encoded bytes of one image from the archive and check them."""
        start, packed, method, checksum = (int(value) for value in self._entries[index])
        descriptor = self._descriptor()
        signature, name, extra = _LOCAL_HEADER.unpack(os.pread(descriptor, _LOCAL_HEADER.size, start))
        data = os.pread(descriptor, packed, start + _LOCAL_HEADER.size + name + extra)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompress(data, wbits=-15)
        if signature != b"PK\x03\x04" or zlib.crc32(data) != checksum:
            raise OSError(f"damaged zip entry {self.name(index)}")
        return data

    def _descriptor(self) -> int:
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return self._file[1]

    def fingerprint(self) -> str:
        """Digest the names, labels and checksums."""
        return digest(len(self), self.names.blob, self.names.offsets, self.labels.numpy(), self._entries)


def _read_directory(path: Path, names: list[str]) -> np.ndarray:
    """Return (N,4) int64: offset of the local header, packed size, method and checksum of every name."""
    with zipfile.ZipFile(path) as archive:
        known = archive.NameToInfo
        for name in names:
            if name not in known:
                raise ValueError(
                    f"{path} has no entry {name!r} that its map file lists: rebuild the map or the zip"
                )
            if (
                known[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                or known[name].flag_bits & 1
            ):
                raise ValueError(
                    f"{path}: entry {name!r} is encrypted or not stored/deflated: zip it again plainly"
                )
        infos = [known[name] for name in names]
    return np.array(
        [(i.header_offset, i.compress_size, i.compress_type, i.CRC) for i in infos], dtype=np.int64
    )


def zipped(
    path: str, split: str, cache_mode: str = "part", rank: int | None = None, world: int | None = None
) -> ZipSource:
    """Read <path>/<split>.zip with <path>/<split>_map.txt: lines of inner path, TAB, label."""
    if cache_mode not in CACHE_MODES:
        raise ValueError(
            f"DATA.CACHE_MODE (--cache-mode) {cache_mode!r} is unknown: use one of {', '.join(CACHE_MODES)}"
        )
    archive, listing = Path(path) / f"{split}.zip", Path(path) / f"{split}_map.txt"
    for file in (archive, listing):
        if not file.is_file():
            raise ValueError(f"DATA.PATH (--data-path): {file} does not exist; DATA.DATASET 'zip' needs it")
    names, labels = _read_map(listing)
    rank = distributed.rank() if rank is None else rank
    world = distributed.world_size() if world is None else world
    try:
        return ZipSource(archive, names, labels, cache_mode, rank, world)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"DATA.PATH (--data-path): {archive} is not a valid zip ({error}): build it again"
        ) from error


def _read_map(listing: Path) -> tuple[list[str], list[int]]:
    names, labels = [], []
    for number, line in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
        name, tab, label = line.partition("\t")
        if not tab or not label.strip().isdecimal() or name.lower().rpartition(".")[2] not in ZIP_EXTENSIONS:
            raise ValueError(
                f"{listing} line {number}: {line!r} is not <path in the zip> TAB <label>; "
                f"extensions: {' '.join(ZIP_EXTENSIONS)}"
            )
        names.append(name)
        labels.append(int(label))
    if not names:
        raise ValueError(f"{listing} lists no images: expected lines of <path in the zip> TAB <label>")
    return names, labels
