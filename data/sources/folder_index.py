"""The images below a folder: scanned once, then opened in milliseconds as a mapped index that is never stale.

An index stands outside of the data set, in a folder of the user's. It is used only while every folder that
was scanned still has the times and the inode that it had: adding, removing or renaming a file sets a folder's
ctime, which no program can set back. What cannot be vouched for is scanned again.
"""

import hashlib
import json
import logging
import os
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import utils.distributed as distributed
from data.sources.base import digest
from data.sources.mmap import checksum, file_systems, load_file, view
from utils.checkpoints.atomic import removed_on_error, write_synced

logger = logging.getLogger("synco")

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_VERSION = 1
_HEAD = struct.Struct("<8sIIQ")  # magic, version, checksum of the JSON, its length; then the JSON, the arrays
_MAGIC = b"SYNCOIDX"
_RACY_NS = 2_000_000_000  # a folder may change twice within one tick of its clock (two seconds on the worst)
_KEPT = 16  # indexes, the last used ones: jobs that unpack to a new path each would fill the disk
_ABANDONED = 86400  # seconds after which a temporary file has no writer any more
# Where a folder's times need not change with its entries: made up (FUSE), or fixed when an image was built.
_TIMELESS = ("fuse.", "squashfs", "erofs", "iso9660", "cramfs", "romfs", "vfat", "msdos", "exfat")

Group = tuple[str, int]  # a folder below the root, and the label of the images in it


class PackedStrings:
    """Strings in two arrays: a million paths cost no Python objects that every worker would copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(s) for s in strings]
        self.offsets = np.cumsum([0, *(len(s) for s in encoded)], dtype=np.int64)
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of_arrays(cls, blob: np.ndarray, offsets: np.ndarray) -> "PackedStrings":
        """Take all bytes, and the int64 (N+1,) offsets that cut them."""
        made = cls.__new__(cls)
        made.blob, made.offsets = blob, offsets
        return made

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        """Return one string."""
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


class Listing(NamedTuple):
    """The images below a folder in their order; the arrays may be mapped."""

    paths: PackedStrings
    labels: np.ndarray  # int64 (N,)
    counts: list[int]  # images of each group
    fingerprint: str


def list_images(root: Path, groups: Sequence[Group], cache: str = "off") -> Listing:
    """List the images below each group's folder, group by group, each in the order of torchvision's.

    `cache` is the folder of the indexes, "" for the user's own, "off" to scan. The main process scans and
    writes; a process that cannot use what it wrote scans for itself.
    """
    place = _place(cache)
    if place is None:
        return _scan(root, groups).listing(groups)
    asked = _asked(root, groups)
    file = place / f"{asked}.index"
    mine: list[Listing] = []
    distributed.on_main(lambda: mine.append(_open_or_scan(file, asked, root, groups, store=True)))
    return mine[0] if mine else _open_or_scan(file, asked, root, groups, store=False)


def _place(cache: str) -> Path | None:
    """Return the folder of the indexes, None for "off" or where there is no home."""
    if cache:
        return None if cache == "off" else Path(cache)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # others are to be ignored, says the specification
        return Path(base) / "synco"
    try:
        return Path.home() / ".cache" / "synco"
    except RuntimeError:
        return None


def _asked(root: Path, groups: Sequence[Group]) -> str:
    """Digest what was asked for; an index answers one question."""
    question = json.dumps([os.path.abspath(root), groups, IMG_EXTENSIONS, _VERSION])
    return hashlib.blake2b(question.encode(), digest_size=16).hexdigest()


def _open_or_scan(file: Path, asked: str, root: Path, groups: Sequence[Group], store: bool) -> Listing:
    found = _open(file, asked, root)
    if found is not None:
        return found
    tree = _scan(root, groups)
    listing = tree.listing(groups)
    reason = tree.untrusted()
    if reason:
        logger.info("%s: no index of its images is kept: %s", root, reason)
    elif store:
        _store(file, asked, tree, listing)
    return listing


# ---- scanning -------------------------------------------------------------------------------------------


@dataclass
class _Tree:
    """What a scan met: packed paths, and all that must stay as it is for them to stay true."""

    started: int = field(default_factory=time.time_ns)
    folders: list[list[Any]] = field(default_factory=list)  # [path, mtime_ns, ctime_ns, inode]
    links: list[str] = field(default_factory=list)  # symbolic links that would matter if they led to a folder
    devices: set[int] = field(default_factory=set)
    unreadable: str = ""
    parts: list[bytes] = field(default_factory=list)
    lengths: list[np.ndarray] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def walk(self, root: Path, folder: str) -> None:
        """Add the images below one group's folder."""
        found: dict[str, list[str]] = {}
        waiting = [""]  # paths from the group's folder: "" or "/a/b", which sort as full paths do
        while waiting:
            inside = waiting.pop()
            names, folders = self._read(root, folder + inside if folder else inside[1:])
            found[inside] = names
            waiting += [f"{inside}/{name}" for name in folders]
        count = 0
        for inside in sorted(found):
            count += self._pack(folder + inside if folder else inside[1:], sorted(found[inside]))
        self.counts.append(count)

    def _read(self, root: Path, path: str) -> tuple[list[str], list[str]]:
        """Return the names of the images and of the folders in a folder; none if it cannot be read."""
        names: list[str] = []
        folders: list[str] = []
        full = os.path.join(root, path)
        try:
            status = os.stat(full)  # first: an entry that comes while it is read makes the folder newer
            with os.scandir(full) as entries:
                for entry in entries:
                    image = entry.name.lower().endswith(IMG_EXTENSIONS)
                    if image and _is_regular(entry):  # nearly always
                        names.append(entry.name)
                    elif _holds(entry.is_dir):
                        folders.append(entry.name)
                    else:
                        if image:
                            names.append(entry.name)
                        if entry.is_symlink() and not (image and _holds(entry.is_file)):
                            self.links.append(os.path.join(path, entry.name))
        except OSError as error:
            self.unreadable = self.unreadable or str(error)
            return [], []
        self.folders.append([path, *_state(status)])
        self.devices.add(status.st_dev)
        return names, folders

    def _pack(self, folder: str, names: list[str]) -> int:
        paths = [f"{folder}/{name}" for name in names] if folder else names
        joined = "".join(paths)
        if joined.isascii():
            self.parts.append(joined.encode())
            lengths = [len(path) for path in paths]
        else:
            encoded = [os.fsencode(path) for path in paths]
            self.parts.append(b"".join(encoded))
            lengths = [len(path) for path in encoded]
        self.lengths.append(np.array(lengths, dtype=np.int64))
        return len(names)

    def listing(self, groups: Sequence[Group]) -> Listing:
        """Return the images of all groups."""
        blob = np.frombuffer(b"".join(self.parts), dtype=np.uint8)
        offsets = np.zeros(sum(self.counts) + 1, dtype=np.int64)
        np.cumsum(np.concatenate([np.zeros(0, dtype=np.int64), *self.lengths]), out=offsets[1:])
        labels = np.repeat(np.array([label for _, label in groups], dtype=np.int64), self.counts)
        fingerprint = digest(len(labels), blob, offsets, labels)
        return Listing(PackedStrings.of_arrays(blob, offsets), labels, self.counts, fingerprint)

    def untrusted(self) -> str:
        """Return why a later look at the folders could miss a change, "" if it could not."""
        if self.unreadable:
            return f"a folder cannot be read ({self.unreadable})"
        types = file_systems()
        timeless = {types.get(device, "") for device in self.devices}
        for kind in sorted(timeless):
            if kind.startswith(_TIMELESS):
                return f"the folders' times mean nothing on {kind}"
        newest = max((max(changed, modified) for _, modified, changed, _ in self.folders), default=0)
        return "a folder has just changed" if newest > self.started - _RACY_NS else ""


def _is_regular(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file(follow_symlinks=False)
    except OSError:
        return False


def _holds(question: Any) -> bool:
    try:
        return bool(question())
    except OSError:  # a loop of links, or a target that may not be looked at
        return False


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _scan(root: Path, groups: Sequence[Group]) -> _Tree:
    tree = _Tree()
    for folder, _ in groups:
        tree.walk(root, folder)
    return tree


# ---- the index ------------------------------------------------------------------------------------------


def _open(file: Path, asked: str, root: Path) -> Listing | None:
    """Return what an index holds if it is whole and nothing has changed since; log why not."""
    try:
        data = load_file(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("index of images %s cannot be read (%s): scanning %s", file, error, root)
        return None
    try:
        header, start = _read_header(data, asked)
        changed = next(_changes(root, header), "")
        if changed:
            logger.info("%s has changed since it was indexed (%s): scanning it", root, changed)
            return None
        listing = _read_body(data, start, header)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        logger.warning("index of images %s is damaged (%s): scanning %s", file, error, root)
        return None
    with suppress(OSError):
        os.utime(file)  # the last used ones are kept
    return listing


def _read_header(data: memoryview, asked: str) -> tuple[dict[str, Any], int]:
    """Return the header and where the arrays start; ``ValueError`` if it is damaged or not ours."""
    magic, version, expected, length = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise ValueError("another format or version")
    text = data[_HEAD.size : _HEAD.size + length]
    if len(text) != length or checksum(text) != expected:
        raise ValueError("its header does not match its checksum")
    header = json.loads(bytes(text))
    if header["asked"] != asked:
        raise ValueError("of another folder")
    return header, _HEAD.size + length


def _read_body(data: memoryview, start: int, header: dict[str, Any]) -> Listing:
    count, size = header["count"], header["bytes"]
    if len(data) != start + 8 * (2 * count + 1) + size:
        raise ValueError(f"{len(data)} bytes")
    if checksum(data[start:]) != header["checksum"]:
        raise ValueError("its content does not match its checksum")
    labels = view(data, "<i8", start, count)
    offsets = view(data, "<i8", start + 8 * count, count + 1)
    blob = view(data, "u1", start + 8 * (2 * count + 1), size)
    paths = PackedStrings.of_arrays(blob, offsets)
    return Listing(paths, labels, header["counts"], header["fingerprint"])


def _changes(root: Path, header: dict[str, Any]) -> Iterator[str]:
    """Yield the folders and links that are no longer what they were."""
    for path, *state in header["folders"]:
        try:
            now = _state(os.stat(os.path.join(root, path)))
        except OSError as error:
            yield str(error)
        else:
            if list(now) != state:
                yield path or "."
    yield from (link for link in header["links"] if os.path.isdir(os.path.join(root, link)))


def _store(file: Path, asked: str, tree: _Tree, listing: Listing) -> None:
    """Write an index in one step; where that fails, the next run scans again."""
    body = b"".join(part.tobytes() for part in (listing.labels, listing.paths.offsets, listing.paths.blob))
    header = {
        "asked": asked,
        "count": len(listing.labels),
        "bytes": len(listing.paths.blob),
        "counts": listing.counts,
        "fingerprint": listing.fingerprint,
        "folders": tree.folders,
        "links": tree.links,
    }
    text = json.dumps({**header, "checksum": checksum(body)}).encode()
    text += b" " * (-(_HEAD.size + len(text)) % 64)  # the arrays start where numpy likes them to
    head = _HEAD.pack(_MAGIC, _VERSION, checksum(text), len(text))
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")  # two runs may write at once
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with removed_on_error(temporary):
            write_synced(temporary, lambda out: [out.write(part) for part in (head, text, body)])
            os.replace(temporary, file)
        _prune(file.parent)
    except OSError as error:
        logger.warning("no index of images is kept: %s (DATA.INDEX_CACHE chooses another folder)", error)


def _prune(place: Path) -> None:
    """Leave the last used indexes, and no temporary file of a process that was killed."""
    indexes = sorted(place.glob("*.index"), key=lambda path: path.stat().st_mtime, reverse=True)
    abandoned = [path for path in place.glob("*.tmp") if time.time() - path.stat().st_mtime > _ABANDONED]
    for path in [*indexes[_KEPT:], *abandoned]:
        with suppress(OSError):
            path.unlink()
