"""Zip archives with a map file, as in MoBY and Swin: {train,val}.zip, {train,val}_map.txt."""

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

import utils.distributed as distributed
from data.sources.base import PackedStrings, Source, compare_labels, digest
from data.sources.scan import IMG_EXTENSIONS, LEFT_BEHIND, PassedOver, left_behind
from utils.reading import read_text

CACHE_MODES = ("no", "part", "full")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field
_MOST_CLASSES = 1 << 17  # or as many as the map has lines
_MOST_HELD = 4  # times the archive's size: entries may lie about their sizes, overlap, or pack well
_MOST_UNPACKED = 1 << 28  # bytes of a deflated entry: an uncompressed image of 89 megapixels


class ZipSource(Source):
    """Images in one zip; the directory is read once, afterwards an image is one positioned read.

    `cache_mode`: "no" reads on demand, "full" holds all encoded bytes in every process, "part"
    those with index mod world == rank, reading the others on demand. A damaged entry is not held:
    it is an unreadable image. Every process opens the file for itself.
    """

    def __init__(
        self,
        path: Path,
        names: list[str],
        labels: np.ndarray,
        num_classes: int,
        cache_mode: str,
        rank: int,
        world: int,
    ) -> None:
        super().__init__(torch.from_numpy(labels), [str(number) for number in range(num_classes)])
        self.path, self.names = path, PackedStrings(names)
        self._entries, self._sizes = _read_directory(path, names)
        self._file: tuple[int, int] | None = None  # (process id, descriptor)
        self._slot = np.full(len(names), -1, dtype=np.int64)
        everything, mine = range(len(names)), range(rank, len(names), world)
        self._hold({"no": range(0), "full": everything, "part": mine}[cache_mode])

    def _hold(self, indices: range) -> None:
        """Keep the encoded bytes of images, within `_MOST_HELD` times the size of the archive."""
        room = _MOST_HELD * self.path.stat().st_size
        # one array: the counters of many objects would copy their pages into every worker
        kept, ends = bytearray(), [0]
        for index in indices:
            if room < self._sizes[index]:
                continue  # it is read on demand
            try:
                data = self.read(index)
            except (OSError, zlib.error):
                continue  # reported when the image is needed and read again
            self._slot[index] = len(ends) - 1
            kept += data
            ends.append(len(kept))
            room -= len(data)
        self._offsets = np.array(ends, dtype=np.int64)
        self._cache = np.frombuffer(kept, dtype=np.uint8)

    def name(self, index: int) -> str:
        """Return "archive.zip@/inner/path"."""
        return f"{self.path}@/{self.names[index]}"

    def encoded(self, index: int) -> bytes:
        """Return the encoded bytes of one image."""
        data = self.cached(index)
        return self.read(index) if data is None else data

    def cached(self, index: int) -> bytes | None:
        """Return the encoded bytes that this process holds, or None."""
        slot = self._slot[index]
        if slot < 0:
            return None
        return self._cache[self._offsets[slot] : self._offsets[slot + 1]].tobytes()

    def read(self, index: int) -> bytes:
        """Read and check the encoded bytes of one image; `OSError`, `zlib.error` if damaged."""
        start, packed, method, checksum = (int(value) for value in self._entries[index])
        size, descriptor = int(self._sizes[index]), self._descriptor()
        # its name and extra field may have other lengths than in the directory
        header = os.pread(descriptor, _LOCAL_HEADER.size, start)
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise OSError(f"damaged zip entry {self.name(index)}: its header is missing")
        _, name, extra = _LOCAL_HEADER.unpack(header)
        data = os.pread(descriptor, packed, start + _LOCAL_HEADER.size + name + extra)
        if method == zipfile.ZIP_DEFLATED:
            if size > _MOST_UNPACKED:
                raise OSError(
                    f"zip entry {self.name(index)} would unpack to {size} bytes: store it instead"
                )
            # At most one byte beyond what the directory declares: a bomb does not tell its size.
            data = zlib.decompressobj(wbits=-15).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise OSError(f"damaged zip entry {self.name(index)}")
        return data

    def _descriptor(self) -> int:
        # a worker that was not forked has no open file of its parent
        if self._file is None or self._file[0] != os.getpid():
            self._file = (os.getpid(), os.open(self.path, os.O_RDONLY))
        return self._file[1]

    def fingerprint(self) -> str:
        """Digest the names, labels and checksums."""
        names, labels = self.names, self.labels.numpy()
        return digest(len(self), names.blob, names.offsets, labels, self._entries)


def _read_directory(path: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (N,4) int64: header offset, packed size, method and checksum of every name.

    And (N,) int64: the sizes of what is packed.
    """
    known = _open_directory(path)
    end = path.stat().st_size
    for name in names:
        if name not in known:
            raise ValueError(
                f"{path} has no entry {name!r} that its map file lists: rebuild the map or the zip"
            )
        _check_entry(known[name], path, end)
    # numbers in arrays: a million ZipInfo objects would be copied into every worker
    infos = [known[name] for name in names]
    rows = [(i.header_offset, i.compress_size, i.compress_type, i.CRC) for i in infos]
    # a size that is a lie need not fit into int64
    sizes = [min(i.file_size, 1 << 62) for i in infos]
    return np.array(rows, dtype=np.int64), np.array(sizes, dtype=np.int64)


def _check_entry(info: zipfile.ZipInfo, path: Path, end: int) -> None:
    """Refuse an entry that one positioned read cannot give; the archive has `end` bytes."""
    encrypted = info.flag_bits & 1
    if encrypted or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"{path}: entry {info.filename!r} is encrypted or not stored/deflated: zip it again "
            "plainly"
        )
    if not 0 <= info.header_offset <= end - info.compress_size:
        raise ValueError(
            f"DATA.PATH (--data-path): {path}: entry {info.filename!r} of its directory lies past "
            "its end: it was cut or damaged, copy it again"
        )


def _open_directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.NameToInfo
    except OSError:
        raise
    except Exception as error:  # zipfile answers a damaged directory in many ways
        raise ValueError(
            f"DATA.PATH (--data-path): {path} is not a valid zip ({error}): build it again"
        ) from error


def zipped(
    path: str,
    split: str,
    cache_mode: str = "part",
    rank: int | None = None,
    world: int | None = None,
) -> ZipSource:
    """Read <path>/<split>.zip with <path>/<split>_map.txt: lines of inner path, TAB, label.

    The classes are those of train's map, where there is one.
    """
    if cache_mode not in CACHE_MODES:
        raise ValueError(
            f"DATA.CACHE_MODE (--cache-mode) {cache_mode!r} is unknown: use one of "
            f"{', '.join(CACHE_MODES)}"
        )
    archive = Path(path) / f"{split}.zip"
    listing, of_train = Path(path) / f"{split}_map.txt", Path(path) / "train_map.txt"
    for file in (archive, listing):
        if not file.is_file():
            raise ValueError(
                f"DATA.PATH (--data-path): {file} does not exist; DATA.DATASET 'zip' needs it"
            )
    passed = PassedOver()
    names, labels = _read_map(listing, passed)
    passed.say(listing)
    num_classes = int(labels.max()) + 1
    if split != "train" and of_train.is_file():
        train_labels = _read_map(of_train, PassedOver())[1]
        numbers = [str(number) for number in range(max(num_classes, int(train_labels.max()) + 1))]
        compare_labels(listing, labels, train_labels, numbers)
        num_classes = int(train_labels.max()) + 1
    rank = distributed.rank() if rank is None else rank
    world = distributed.world_size() if world is None else world
    return ZipSource(archive, names, labels, num_classes, cache_mode, rank, world)


def _label(text: str, most: int, place: str, count: int) -> int:
    """Return a label of a map of `count` lines; ValueError if it is not below `most`."""
    # The length first: Python refuses to read a number of thousands of digits.
    if len(text) > 18 or int(text) >= most:
        raise ValueError(
            f"{place}: label {text[:20]} is too large: a map of {count} lines may have labels "
            f"below {most}"
        )
    return int(text)


def _read_map(listing: Path, passed: PassedOver) -> tuple[list[str], np.ndarray]:
    """Return the names and labels that a map lists; count a system's entries in `passed`."""
    text = read_text(listing)
    lines = text.removesuffix("\n").split("\n") if text else []
    names, labels, most = [], [], max(_MOST_CLASSES, len(lines))
    for number, line in enumerate(lines, start=1):
        name, tab, label = line.partition("\t")
        if any(left_behind(part) for part in name.split("/")):
            passed.add(LEFT_BEHIND, name)
            continue
        if not tab or not name.lower().endswith(IMG_EXTENSIONS) or not label.strip().isdecimal():
            raise ValueError(
                f"{listing} line {number}: {line!r} is not <path in the zip> TAB <label>; "
                f"extensions: {' '.join(IMG_EXTENSIONS)}"
            )
        names.append(name)
        labels.append(_label(label.strip(), most, f"{listing} line {number}", len(lines)))
    if not names:
        raise ValueError(
            f"{listing} lists no images: expected lines of <path in the zip> TAB <label>"
        )
    return names, np.array(labels, dtype=np.int64)
