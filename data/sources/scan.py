"""Find the images below folders: what is one, what is left out, and each real folder once."""

import errno
import logging
import os
import re
import stat
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.sources.base import PackedStrings, digest

logger = logging.getLogger("synco")

# Those of data.decode.FORMATS. Not .pfm: its pixels are floats, which are not supported.
IMG_EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip

# What systems leave behind under names of images, or in folders that would count as classes.
_LEFT_BEHIND = re.compile(
    r"""
    \. (?! \.?$ )                                                  # hidden; not "." and ".."
    | ( __MACOSX | PaxHeaders?(\.\d+)? | pax_global_header | @LongLink    # archives
      | Thumbs\.db | ehthumbs(_vista)?\.db | desktop\.ini          # Windows
      | \$RECYCLE\.BIN | RECYCLER | System\ Volume\ Information | FOUND\.\d{3}
      | Icon\r | Network\ Trash\ Folder | Temporary\ Items         # macOS
      | @eaDir | @tmp | \#recycle | \#snapshot | @Recycle | @Recently-Snapshot   # network storage
      | lost\+found | LOST\.DIR | __pycache__
      ) $
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EXTENSION = re.compile(r"\.[a-z][a-z0-9]{0,7}")
_SHOWN = 8  # extensions in a line

LEFT_BEHIND = "hidden files and what systems leave behind"
OUTSIDE = "images outside of the class folders"
_LISTED = "links to folders that are listed anyway"
_NOWHERE = "links that lead nowhere"
_SPECIAL = "pipes, sockets and devices"
_OTHERS = ".others"

Group = tuple[str, int]  # a folder below the root, and the label of the images in it


def left_behind(name: str) -> bool:
    """Tell whether a file or folder of this name is hidden or a system's."""
    return _LEFT_BEHIND.match(name) is not None


class PassedOver(dict[str, tuple[int, str]]):
    """What a listing left out: kind -> count and first path; a kind with "." is an extension."""

    def add(self, kind: str, path: str, count: int = 1) -> None:
        """Count one or more, of which `path` is the first."""
        before, first = self.get(kind, (0, path))
        self[kind] = before + count, min(first, path)

    def joined(self, others: "PassedOver") -> "PassedOver":
        """Return the counts of both."""
        both = PassedOver(self)
        for kind, (count, path) in others.items():
            both.add(kind, path, count)
        return both

    def add_extension(self, path: str) -> None:
        """Count a file by its extension."""
        extension = os.path.splitext(path)[1].lower()
        self.add(extension if _EXTENSION.fullmatch(extension) else _OTHERS, path)

    def say(self, place: Path) -> None:
        """Log all that was left out below `place` in one line, if there is any."""
        parts = [
            f"{kind}: {count} (such as {path})"
            for kind, (count, path) in sorted(self.items())
            if not kind.startswith(".")
        ]
        extensions = sorted(
            (-count, kind[1:]) for kind, (count, _) in self.items() if kind.startswith(".")
        )
        if extensions:
            shown = ", ".join(f"{kind} {-count}" for count, kind in extensions[:_SHOWN])
            more = ", ..." if len(extensions) > _SHOWN else ""
            parts.append(f"files of other extensions: {shown}{more}")
        if parts:
            logger.info("%s: left out: %s", place, "; ".join(parts))


class Entries(NamedTuple):
    """The names in a folder that matter."""

    images: list[str]
    folders: list[str]  # real ones
    linked: list[str]  # links to folders
    links: list[str]  # other links, which would matter if they led elsewhere one day


def read_folder(
    folder: str | Path, passed: PassedOver, extensions: tuple[str, ...] = IMG_EXTENSIONS
) -> Entries:
    """Sort what is in a folder and count what is not in the data set.

    Raises ValueError if any of it cannot be read.
    """
    found = Entries([], [], [], [])
    images = found.images
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                # Nearly all entries. The type comes from the folder itself, without a stat, and
                # no name in _LEFT_BEHIND ends like an image unless it starts with a dot.
                if (
                    name[0] != "."
                    and name.lower().endswith(extensions)
                    and entry.is_file(follow_symlinks=False)
                ):
                    images.append(name)
                else:
                    _sort(entry, found, passed, extensions)
    except OSError as error:  # otherwise images would be missing without a word
        raise unreadable(error.filename or folder, error) from error
    return found


def unreadable(path: str | Path, error: OSError) -> ValueError:
    """Return the error of a data set of which a part cannot be read."""
    return ValueError(
        f"DATA.PATH (--data-path): {path} cannot be read ({error.strerror or error}): mend its "
        "permissions or the storage, or remove it from the data set"
    )


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder; ValueError if that cannot be found out."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error


def _sort(
    entry: os.DirEntry[str], found: Entries, passed: PassedOver, extensions: tuple[str, ...]
) -> None:
    if left_behind(entry.name):
        passed.add(LEFT_BEHIND, entry.path)
        return
    if entry.is_dir(follow_symlinks=False):
        found.folders.append(entry.name)
    elif entry.is_symlink():
        _sort_link(entry, found, passed, extensions)
    elif entry.is_file(follow_symlinks=False):
        passed.add_extension(entry.path)
    else:
        passed.add(_SPECIAL, entry.path)


def _sort_link(
    entry: os.DirEntry[str], found: Entries, passed: PassedOver, extensions: tuple[str, ...]
) -> None:
    image = entry.name.lower().endswith(extensions)
    mode = _mode_of_target(entry, image)
    regular = stat.S_ISREG(mode)
    if stat.S_ISDIR(mode):
        found.linked.append(entry.name)
        return
    if not (image and regular):
        found.links.append(entry.name)
    if image and (regular or not mode):  # one that leads nowhere is an image that cannot be read
        found.images.append(entry.name)
    elif not mode:
        passed.add(_NOWHERE, entry.path)
    elif regular:
        passed.add_extension(entry.path)
    else:
        passed.add(_SPECIAL, entry.path)


def _mode_of_target(entry: os.DirEntry[str], image: bool) -> int:
    """Return the type bits of what a link leads to, 0 if it leads nowhere."""
    try:
        return entry.stat().st_mode
    except OSError as error:
        if not image and error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise  # it may well lead to a folder of images
        return 0


class Listing(NamedTuple):
    """The images below a folder in their order."""

    paths: PackedStrings
    labels: np.ndarray  # int64 (N,)
    counts: list[int]  # images of each group
    fingerprint: str
    passed: PassedOver


class Tree:
    """What a scan found: packed paths, and the state of all folders that they depend on."""

    def __init__(
        self, root: Path, groups: Sequence[Group], extensions: tuple[str, ...] = IMG_EXTENSIONS
    ) -> None:
        self.root, self.groups, self.extensions = root, groups, extensions
        self.started = time.time_ns()
        self.folders: list[tuple[str, int, int, int]] = []  # [path, mtime_ns, ctime_ns, inode]
        self.links: list[str] = []  # that would matter if they led to a folder, or an image
        self.devices: set[int] = set()
        self.passed = PassedOver()
        self._real_root = os.path.realpath(root)
        self._seen: set[str] = set()  # real paths of folders
        # By number of the group and path from its folder: "" or "/a/b", sorted as full paths are.
        self._packed: dict[tuple[int, str], tuple[bytes, np.ndarray]] = {}

    def walk(self) -> None:
        """Find the images: first those in real folders, then those behind links elsewhere."""
        waiting = self._tops()
        while waiting:
            links: list[tuple[int, str]] = []
            for number, inside, real in waiting:
                links += self._walk(number, inside, real)
            waiting = []
            for number, inside in sorted(links):
                path = self._path(number, inside)
                real = os.path.realpath(self.root / path)
                # Such a link would list images again, under another label or without end.
                if real in self._seen or self._is_around(real):
                    self._listed(path)
                else:
                    self._seen.add(real)
                    waiting.append((number, inside, real))

    def _tops(self) -> list[tuple[int, str, str]]:
        """Return number, "" and real path of each group's folder; ValueError if two are one."""
        known: dict[str, str] = {}
        for folder, _ in self.groups:
            real = os.path.realpath(self.root / folder)
            if folder and self._is_around(real):
                raise ValueError(
                    f"DATA.PATH (--data-path): {self.root / folder} is a link to a folder around "
                    "it: remove the link"
                )
            if real in known:
                raise ValueError(
                    f"DATA.PATH (--data-path): {self.root / known[real]} and {self.root / folder} "
                    "are the same folder, whose images would be in two classes: remove one of them"
                )
            known[real] = folder
        self._seen.update(known)
        return [(number, "", real) for number, real in enumerate(known)]

    def _is_around(self, real: str) -> bool:
        return os.path.commonpath([real, self._real_root]) == real

    def _path(self, number: int, inside: str) -> str:
        folder = self.groups[number][0]
        return folder + inside if folder else inside[1:]

    def _walk(self, number: int, inside: str, real: str) -> list[tuple[int, str]]:
        """Pack the images in a folder and the real folders below; return the links to folders."""
        waiting, links = [(inside, real)], []
        while waiting:
            inside, real = waiting.pop()
            path = self._path(number, inside)
            entries = self._read(path)
            self._packed[number, inside] = _pack(path, sorted(entries.images))
            links += [(number, f"{inside}/{name}") for name in entries.linked]
            for name in entries.folders:
                below = os.path.join(real, name)
                if below in self._seen:
                    self._listed(os.path.join(path, name))
                else:
                    self._seen.add(below)
                    waiting.append((f"{inside}/{name}", below))
        return links

    def _read(self, path: str) -> Entries:
        self._note(path)  # first: an entry that comes while it is read makes the folder newer
        entries = read_folder(self.root / path, self.passed, self.extensions)
        self.links += [os.path.join(path, name) for name in entries.links]
        return entries

    def _note(self, path: str) -> None:
        """Remember the state of a folder."""
        try:
            status = os.stat(self.root / path)
        except OSError as error:
            raise unreadable(self.root / path, error) from error
        self.folders.append((path, *state(status)))
        self.devices.add(status.st_dev)

    def _listed(self, path: str) -> None:
        self._note(path)  # another folder may come in its place
        self.passed.add(_LISTED, str(self.root / path))

    def listing(self) -> Listing:
        """Return the images of all groups."""
        counts = [0] * len(self.groups)
        parts, lengths = [], [np.zeros(0, dtype=np.int64)]
        for place in sorted(self._packed):
            part, of_part = self._packed[place]
            parts.append(part)
            lengths.append(of_part)
            counts[place[0]] += len(of_part)
        blob = np.frombuffer(b"".join(parts), dtype=np.uint8)
        offsets = np.zeros(sum(counts) + 1, dtype=np.int64)
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        labels = np.repeat(np.array([label for _, label in self.groups], dtype=np.int64), counts)
        fingerprint = digest(len(labels), blob, offsets, labels)
        paths = PackedStrings.of_arrays(blob, offsets)
        return Listing(paths, labels, counts, fingerprint, self.passed)


def state(status: os.stat_result) -> tuple[int, int, int]:
    """Return the times and number of a folder, which change with its entries or its place."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _pack(folder: str, names: Iterable[str]) -> tuple[bytes, np.ndarray]:
    """Return the paths of images as bytes in one piece, and the length of each."""
    paths = [f"{folder}/{name}" for name in names] if folder else list(names)
    joined = "".join(paths)
    if joined.isascii():
        return joined.encode(), np.array([len(path) for path in paths], dtype=np.int64)
    encoded = [os.fsencode(path) for path in paths]
    return b"".join(encoded), np.array([len(path) for path in encoded], dtype=np.int64)


def scan(root: Path, groups: Sequence[Group], extensions: tuple[str, ...] = IMG_EXTENSIONS) -> Tree:
    """Look for the images below each group's folder."""
    tree = Tree(root, groups, extensions)
    tree.walk()
    return tree
