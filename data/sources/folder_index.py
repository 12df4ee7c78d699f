"""The images below a folder: scanned once, then read from an index in milliseconds.

An index is kept outside of the data set, in a folder of the user. It is used only while every
folder that was scanned still has the times and the inode that it had: adding, removing or renaming
a file sets a folder's ctime, which no program can set back. In all other cases the folders are
scanned again.
"""

import hashlib
import json
import logging
import math
import os
import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import utils.distributed as distributed
from data.sources.base import PackedStrings
from data.sources.binary import checksum, file_systems, view
from data.sources.scan import IMG_EXTENSIONS, Group, Listing, PassedOver, Tree, scan, state
from utils.checkpoints.atomic import removed_on_error, write_synced

logger = logging.getLogger("synco")

Header: TypeAlias = dict[str, Any]  # the JSON of an index

_VERSION = 2
# magic, version, checksum of the JSON, its length; then the JSON, the arrays
_HEAD = struct.Struct("<8sIIQ")
_MAGIC = b"SYNCOIDX"
# a folder may change twice within one tick of its clock (two seconds on the worst)
_RACY_NS = 2_000_000_000
_KEPT = 16  # indexes, the last used ones: jobs that unpack to a new path each would fill the disk
_ABANDONED = 86400  # seconds after which a temporary file has no writer any more
# Where a folder's times need not change with its entries: made up (FUSE), or fixed when an image
# was built.
_TIMELESS = ("fuse.", "squashfs", "erofs", "iso9660", "cramfs", "romfs", "vfat", "msdos", "exfat")


def list_images(
    root: Path,
    groups: Sequence[Group],
    cache: str = "off",
    passed: PassedOver | None = None,
    extensions: tuple[str, ...] = IMG_EXTENSIONS,
) -> Listing:
    """List the images below each group's folder, in the order of torchvision's ImageFolder.

    What is left out is logged in one line, together with what the caller has `passed` over.

    `cache` is the folder of the indexes, "" for the user's own, "off" to scan. The main process
    scans and writes; a process that cannot use what it wrote scans for itself.
    """
    listing = _list(root, groups, cache, extensions)
    listing.passed.joined(passed or PassedOver()).say(root)
    return listing


def _list(root: Path, groups: Sequence[Group], cache: str, extensions: tuple[str, ...]) -> Listing:
    place = _place(cache)
    if place is None:
        return scan(root, groups, extensions).listing()
    question = (root, groups, extensions)
    file = place / f"{_asked(*question)}.index"
    mine: list[Listing] = []
    distributed.on_main(lambda: mine.append(_open_or_scan(file, *question, store=True)))
    return mine[0] if mine else _open_or_scan(file, *question, store=False)


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


def _asked(root: Path, groups: Sequence[Group], extensions: tuple[str, ...]) -> str:
    """Return the digest that names the index of these folders and groups."""
    question = json.dumps([os.path.abspath(root), groups, extensions, _VERSION])
    return hashlib.blake2b(question.encode(), digest_size=16).hexdigest()


def _open_or_scan(
    file: Path, root: Path, groups: Sequence[Group], extensions: tuple[str, ...], store: bool
) -> Listing:
    asked = _asked(root, groups, extensions)
    found = _open(file, asked, root, extensions)
    if found is not None:
        return found
    tree = scan(root, groups, extensions)
    listing = tree.listing()
    reason = _untrusted(tree)
    if reason:
        logger.info("%s: no index of its images is kept: %s", root, reason)
    elif store:
        _store(file, asked, tree, listing)
    return listing


def _untrusted(tree: Tree) -> str:
    """Return why a later look at the folders could miss a change, "" if it could not."""
    types = file_systems()
    timeless = {types.get(device, "") for device in tree.devices}
    for kind in sorted(timeless):
        if kind.startswith(_TIMELESS):
            return f"the folders' times mean nothing on {kind}"
    # a change in the tick of the clock in which the scan began would not move the times
    newest = max((max(changed, modified) for _, modified, changed, _ in tree.folders), default=0)
    return "a folder has just changed" if newest > tree.started - _RACY_NS else ""


# ---- the index -----------------------------------------------------------------------------------


def _open(file: Path, asked: str, root: Path, extensions: tuple[str, ...]) -> Listing | None:
    """Return what an index holds if it is whole and nothing has changed since; log why not."""
    try:
        data = _load(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("index of images %s cannot be read (%s): scanning %s", file, error, root)
        return None
    try:
        header, start = _read_header(data, asked)
        changed = next(_changes(root, header, extensions), "")
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


def _load(file: Path) -> memoryview:
    """Read a file, into memory that torch may write to.

    It is not mapped: the map of a file that is cut while it is in use ends the process without a
    word.
    """
    with file.open("rb") as source:
        data = bytearray(os.fstat(source.fileno()).st_size)
        return memoryview(data)[: source.readinto(data)]


def _read_header(data: memoryview, asked: str) -> tuple[Header, int]:
    """Return the header and where the arrays start; `ValueError` if it is damaged or not ours."""
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


def _read_body(data: memoryview, start: int, header: Header) -> Listing:
    count, size = header["count"], header["bytes"]
    if len(data) != start + 8 * (2 * count + 1) + size:
        raise ValueError(f"{len(data)} bytes")
    if checksum(data[start:]) != header["checksum"]:
        raise ValueError("its content does not match its checksum")
    labels = view(data, "<i8", start, count)
    offsets = view(data, "<i8", start + 8 * count, count + 1)
    blob = view(data, "u1", start + 8 * (2 * count + 1), size)
    paths = PackedStrings.of_arrays(blob, offsets)
    passed = PassedOver({kind: (count, path) for kind, (count, path) in header["passed"].items()})
    return Listing(paths, labels, header["counts"], header["fingerprint"], passed)


def _changes(root: Path, header: Header, extensions: tuple[str, ...]) -> Iterator[str]:
    """Yield the folders and links that are no longer what they were."""
    for path, *known in header["folders"]:
        try:
            now = state(os.stat(os.path.join(root, path)))
        except OSError as error:
            yield str(error)
        else:
            if list(now) != known:
                yield path or "."
    for link in header["links"]:
        full = os.path.join(root, link)
        if os.path.isdir(full) or (link.lower().endswith(extensions) and os.path.isfile(full)):
            yield link


def _store(file: Path, asked: str, tree: Tree, listing: Listing) -> None:
    """Write an index in one step; where that fails, the next run scans again."""
    head, text, body = _parts(asked, tree, listing)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.tmp")  # two runs may write at once
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with removed_on_error(temporary):
            write_synced(temporary, lambda out: [out.write(part) for part in (head, text, body)])
            # a reader finds a whole index or none
            os.replace(temporary, file)
        _prune(file.parent)
    except OSError as error:
        hint = "DATA.INDEX_CACHE chooses another folder"
        logger.warning("no index of images is kept: %s (%s)", error, hint)


def _parts(asked: str, tree: Tree, listing: Listing) -> tuple[bytes, bytes, bytes]:
    """Return head, JSON and arrays of an index."""
    paths = listing.paths
    body = b"".join(part.tobytes() for part in (listing.labels, paths.offsets, paths.blob))
    header = {
        "asked": asked,
        "count": len(listing.labels),
        "bytes": len(paths.blob),
        "counts": listing.counts,
        "fingerprint": listing.fingerprint,
        "folders": tree.folders,
        "links": tree.links,
        "passed": tree.passed,
        "checksum": checksum(body),
    }
    text = json.dumps(header).encode()
    text += b" " * (-(_HEAD.size + len(text)) % 64)  # the arrays start where numpy likes them to
    return _HEAD.pack(_MAGIC, _VERSION, checksum(text), len(text)), text, body


def _prune(place: Path) -> None:
    """Leave the last used indexes, and no temporary file of a process that was killed."""
    indexes = sorted(place.glob("*.index"), key=_changed_at, reverse=True)
    before = time.time() - _ABANDONED
    abandoned = [path for path in place.glob("*.tmp") if _changed_at(path) < before]
    for path in [*indexes[_KEPT:], *abandoned]:
        with suppress(OSError):
            path.unlink()


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another run has just renamed or removed it
        return math.inf
