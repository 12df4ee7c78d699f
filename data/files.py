"""Image files: decoding to RGB, compact listings, and sources that read a folder."""

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.source import Source, digest

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def decode_rgb(data: bytes) -> Tensor:
    """Decode an encoded image to uint8 (3,H,W) RGB like PIL's `.convert("RGB")`; raise on any defect.

    EXIF orientation is not applied, truncated files and decompression bombs are refused (PIL's limits).
    """
    try:
        opened = Image.open(io.BytesIO(data))  # reads the header only; refuses bombs
    except UnidentifiedImageError:
        raise OSError(f"not an image ({len(data)} bytes)") from None
    with opened as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            return _decode_jpeg(data)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_jpeg(data: bytes) -> Tensor:
    """Decode with torchvision: the same libjpeg result as PIL's, a third faster."""
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


class PackedStrings:
    """Strings in two arrays: a million paths cost no Python objects that every worker would copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(s) for s in strings]
        self.offsets = np.cumsum([0, *(len(s) for s in encoded)], dtype=np.int64)
        self.blob = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> str:
        """Return one string."""
        return os.fsdecode(self.blob[self.offsets[index] : self.offsets[index + 1]].tobytes())


class FileSource(Source):
    """Images in files below `root`; `paths` are relative to it."""

    def __init__(self, root: Path, paths: list[str], labels: list[int], classes: list[str]) -> None:
        super().__init__(torch.tensor(labels, dtype=torch.int64), classes)
        self.root, self.paths = root, PackedStrings(paths)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.root / self.paths[index])

    def load(self, index: int) -> Tensor:
        """Read and decode one image as uint8 (3,H,W) RGB."""
        return decode_rgb((self.root / self.paths[index]).read_bytes())

    def fingerprint(self) -> str:
        """Digest the relative paths and the labels."""
        return digest(len(self), self.paths.blob, self.paths.offsets, self.labels.numpy())


def image_paths(folder: Path) -> Iterator[str]:
    """Yield the images below `folder`, relative to it, in the order of torchvision's ImageFolder."""
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        inside = os.path.relpath(root, folder)
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield name if inside == "." else os.path.join(inside, name)


def imagefolder(path: str, split: str) -> FileSource:
    """Read <path>/<split>/<class>/**: the class index is the rank of the class folder's name in train/."""
    folder = Path(path) / split
    found = _class_names(folder)
    train = Path(path) / "train"
    classes = _class_names(train) if split != "train" and train.is_dir() else found
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f"DATA.PATH (--data-path): {folder} has classes that {train} lacks: {unknown[:5]}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = [os.path.join(name, image) for image in image_paths(folder / name)] if name in found else []
        if not inside and split == "train":
            refuse_empty(folder / name, "remove the folder: it would count as a class")
        paths += inside
        labels += [label] * len(inside)
    if not paths:
        refuse_empty(folder, "expected <class>/<image> below it")
    return FileSource(folder, paths, labels, classes)


def _class_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(
            f"DATA.PATH (--data-path): {folder} does not exist; DATA.DATASET 'imagefolder' expects "
            f"{folder.name}/<class>/<image> there (use 'folder' for images without classes)"
        )
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        refuse_empty(folder, "it has no class folders; use DATA.DATASET 'folder' for images without classes")
    return names


def refuse_empty(folder: Path, remedy: str) -> None:
    """Raise the ValueError of a folder without images."""
    raise ValueError(
        f"DATA.PATH (--data-path): no images in {folder}: {remedy} (extensions: {' '.join(IMG_EXTENSIONS)})"
    )


def folder(path: str, split: str) -> FileSource:
    """Read all images below <path>/<split>, or below <path> itself as train: unlabelled, for pretraining."""
    root = Path(path)
    inside = root / split
    if not inside.is_dir() and split != "train":
        raise ValueError(
            f"DATA.PATH (--data-path): {inside} does not exist: DATA.DATASET 'folder' has no val split"
        )
    if inside.is_dir():
        root = inside
    if not root.is_dir():
        raise ValueError(f"DATA.PATH (--data-path): folder {path!r} does not exist")
    paths = list(image_paths(root))
    if not paths:
        refuse_empty(root, "expected image files below it")
    return FileSource(root, paths, [-1] * len(paths), [])
