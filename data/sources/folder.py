"""Sources that read the image files of a folder."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.sources.base import PackedStrings, Source, compare_labels, digest
from data.sources.folder_index import list_images
from data.sources.scan import IMG_EXTENSIONS, OUTSIDE, PassedOver, is_folder, read_folder
from utils.distributed import is_main
from utils.reading import read_bytes

logger = logging.getLogger("synco")

_BYTES_PER_PIXEL = 8  # of a file: no format that is read needs more
_SPLIT = re.compile(r"(train|val|valid|validation|test)\d*", re.IGNORECASE)  # also val2017
_NAMED = 5  # of what is left out
_SAMPLED = 100  # images whose bytes are compared
_BESIDE_PIXELS = 1 << 24  # bytes of colour profiles, previews and the like


class FileSource(Source):
    """Images in files below `root`; `paths` are relative to it.

    `paths` and `labels` may be arrays of an index, whose `fingerprint` is then known.
    """

    def __init__(
        self,
        root: Path,
        paths: PackedStrings | Sequence[str],
        labels: np.ndarray | Sequence[int],
        classes: Sequence[str],
        fingerprint: str = "",
    ) -> None:
        numbers = labels if isinstance(labels, np.ndarray) else np.array(labels, dtype=np.int64)
        super().__init__(torch.from_numpy(numbers), classes)
        self.root = root
        self.paths = paths if isinstance(paths, PackedStrings) else PackedStrings(paths)
        self._fingerprint = fingerprint

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.paths[index])

    def encoded(self, index: int) -> bytes:
        """Read the file of one image; `OSError` if it is much larger than its pixels may be."""
        most = _BYTES_PER_PIXEL * self.max_pixels + _BESIDE_PIXELS
        return read_bytes(self.root / self.paths[index], most)

    def fingerprint(self) -> str:
        """Digest the relative paths and the labels."""
        if not self._fingerprint:
            paths, labels = self.paths, self.labels.numpy()
            self._fingerprint = digest(len(self), paths.blob, paths.offsets, labels)
        return self._fingerprint

    def content(self) -> str:
        """Digest the bytes of up to 100 images, spread evenly: another folder has other ones."""
        files = []
        for index in np.linspace(0, len(self) - 1, min(len(self), _SAMPLED), dtype=np.int64):
            try:
                files.append(self.encoded(int(index)))
            except OSError:  # whoever needs the image says so
                files.append(b"")
        return digest(len(files), *files)


def imagefolder(
    path: str,
    split: str,
    index_cache: str = "off",
    extensions: tuple[str, ...] = IMG_EXTENSIONS,
) -> FileSource:
    """Read <path>/<split>/<class>/**; class numbers are the ranks of the folders in train/."""
    folder, passed = Path(path) / split, PassedOver()
    found = _class_names(folder, passed)
    train = Path(path) / "train"
    has_train = split != "train" and is_folder(train)
    # The numbers of train for both splits, also where val lacks a class.
    classes = _class_names(train, PassedOver()) if has_train else found
    if unknown := sorted(set(found) - set(classes)):
        wrong = f"{folder} has classes that {train} lacks: {unknown[:5]}"
        raise ValueError(f"DATA.PATH (--data-path): {wrong}")
    number = {name: label for label, name in enumerate(classes)}
    groups = [(name, number[name]) for name in found]  # both are sorted
    listing = list_images(folder, groups, index_cache, passed, extensions)
    for (name, _), count in zip(groups, listing.counts, strict=True):
        if not count and split == "train":
            refuse_empty(folder / name, "remove the folder: it would count as a class")
    if not len(listing.paths):
        refuse_empty(folder, "expected <class>/<image> below it")
    if has_train:
        compare_labels(folder, listing.labels, np.arange(len(classes)), classes)
    return FileSource(folder, listing.paths, listing.labels, classes, listing.fingerprint)


def _class_names(folder: Path, passed: PassedOver) -> list[str]:
    if not is_folder(folder):
        raise ValueError(
            f"DATA.PATH (--data-path): {folder} does not exist; DATA.DATASET 'imagefolder' expects "
            f"{folder.name}/<class>/<image> there (use 'folder' for images without classes)"
        )
    entries = read_folder(folder, passed)
    for name in entries.images:
        # An image beside the class folders has no class.
        passed.add(OUTSIDE, str(folder / name))
    names = sorted(entries.folders + entries.linked)
    if not names:
        remedy = "it has no class folders; use DATA.DATASET 'folder' for images without classes"
        refuse_empty(folder, remedy)
    return names


def refuse_empty(folder: Path, remedy: str) -> None:
    """Raise the ValueError of a folder without images."""
    raise ValueError(
        f"DATA.PATH (--data-path): no images in {folder}: {remedy} (extensions: "
        f"{' '.join(IMG_EXTENSIONS)}; with DATA.CHANNELS or DATA.RANGE .npy too)"
    )


def _say_what_is_beside(split: Path, extensions: tuple[str, ...]) -> None:
    """Warn of images and folders beside a split that are not read with it."""
    # most will be other splits, which are beside it on purpose
    try:
        entries = read_folder(split.parent, PassedOver(), extensions)
    except ValueError:  # only what is in the split is needed
        return
    others = [name for name in entries.folders + entries.linked if not _SPLIT.fullmatch(name)]
    found = sorted(others + entries.images)
    if found and is_main():
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        shown = ", ".join(found[:_NAMED]) + more
        logger.warning(
            "DATA.PATH (--data-path): only %s is read; beside it are %s. To read all, rename %s",
            split,
            shown,
            split.name,
        )


def folder(
    path: str,
    split: str,
    index_cache: str = "off",
    extensions: tuple[str, ...] = IMG_EXTENSIONS,
) -> FileSource:
    """Read all images below <path>/<split>, or <path> itself as train, without labels."""
    root = Path(path)
    inside = root / split
    has_split = is_folder(inside)
    if not has_split and split != "train":
        raise ValueError(
            f"DATA.PATH (--data-path): {inside} does not exist: DATA.DATASET 'folder' has no val "
            "split"
        )
    if has_split:
        _say_what_is_beside(inside, extensions)
        root = inside
    if not is_folder(root):
        raise ValueError(f"DATA.PATH (--data-path): folder {path!r} does not exist")
    listing = list_images(root, [("", -1)], index_cache, extensions=extensions)
    if not len(listing.paths):
        refuse_empty(root, "expected image files below it")
    return FileSource(root, listing.paths, listing.labels, [], listing.fingerprint)
