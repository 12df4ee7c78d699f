"""What a source of images is: labels, a fingerprint, and one array or a `load`."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import utils.distributed as distributed
from data.decode import MAX_PIXELS
from data.pixels import PLAIN, Pixels, decode

logger = logging.getLogger("synco")


class Source:
    """A fixed, ordered collection of RGB images.

    `images` is the whole collection as uint8 (N,3,H,W), or None where `load` reads one image at a
    time. `labels` is int64 (N,), -1 where unlabelled. An image of more than `max_pixels` is
    unreadable.
    """

    images: Tensor | None = None
    max_pixels: int = MAX_PIXELS
    pixels: Pixels = PLAIN

    def __init__(self, labels: Tensor, classes: Sequence[str]) -> None:
        self.labels = labels
        self.classes = list(classes)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Return the number of classes, 0 where nothing is labelled."""
        return len(self.classes)

    def name(self, index: int) -> str:
        """Return the path or another readable name of an image."""
        raise NotImplementedError

    def load(self, index: int) -> Tensor:
        """Return one image: uint8 (3,H,W) RGB, or what else `pixels` says."""
        data = self.encoded(index)
        if data is None:
            raise NotImplementedError
        return self.decode(data)

    def decode(self, data: bytes | memoryview) -> Tensor:
        """Return the pixels of an encoded image as `load` does."""
        return decode(data, self.pixels, self.max_pixels)

    def encoded(self, index: int) -> bytes | None:
        """Return the encoded bytes of one image, or None where only pixels are stored."""
        return None

    @property
    def holds_files(self) -> bool:
        """Tell whether the images are encoded; no image is read for it, the first may be bad."""
        return type(self).encoded is not Source.encoded

    def fingerprint(self) -> str:
        """Return the count and a digest that changes when the listing or the pixels change."""
        raise NotImplementedError

    def content(self) -> str:
        """Return a digest of some images, where the fingerprint holds only their names; else ""."""
        return ""


class ArraySource(Source):
    """Images of one size held in memory."""

    images: Tensor

    def __init__(self, title: str, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        super().__init__(labels, classes)
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        self.title, self.images = title, images

    def name(self, index: int) -> str:
        """Return the data set's name and the index."""
        return f"{self.title}[{index}]"

    def load(self, index: int) -> Tensor:
        """Return one image as uint8 (3,H,W) RGB."""
        return self.images[index]

    def fingerprint(self) -> str:
        """Digest the pixels and the labels."""
        return digest(len(self), self.images.numpy(), self.labels.numpy())


class Subset(Source):
    """Chosen images of another source that loads them one by one."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        super().__init__(source.labels[torch.from_numpy(indices)], source.classes)
        self.source, self.indices = source, indices
        self.max_pixels, self.pixels = source.max_pixels, source.pixels

    def name(self, index: int) -> str:
        """Return the name in the full source."""
        return self.source.name(int(self.indices[index]))

    def load(self, index: int) -> Tensor:
        """Load from the full source."""
        return self.source.load(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        """Read from the full source."""
        return self.source.encoded(int(self.indices[index]))

    @property
    def holds_files(self) -> bool:
        """Return the answer of the full source."""
        return self.source.holds_files

    def fingerprint(self) -> str:
        """Digest the full source's fingerprint and the choice."""
        return digest(len(self), self.source.fingerprint().encode(), self.indices)

    def content(self) -> str:
        """Return the full source's."""
        return self.source.content()


def subset(source: Source, indices: Sequence[int] | np.ndarray | Tensor) -> Source:
    """Return the images of `source` at `indices`, in that order, with the classes unchanged."""
    chosen = np.asarray(indices, dtype=np.int64)
    if len(chosen) and not (0 <= chosen.min() and chosen.max() < len(source)):
        found = f"{chosen.min()} to {chosen.max()}"
        raise ValueError(f"subset indices must lie in [0, {len(source)}), got {found}")
    if isinstance(source, ArraySource):
        # cut at once: a loader keeps arrays on the device
        rows = torch.from_numpy(chosen)
        return ArraySource(source.title, source.images[rows], source.labels[rows], source.classes)
    return Subset(source, chosen)


class PackedStrings:
    """Strings in two arrays, which behave as a read-only list."""

    # A worker that reads a Python string changes its reference count, and so copies its page of
    # memory. A million names would soon be held once a worker.

    def __init__(self, strings: Iterable[str]) -> None:
        # a file's name may hold bytes that are no UTF-8
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


def digest(count: int, *parts: bytes | np.ndarray) -> str:
    """Return "count:hash" of the parts' bytes."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        # the memory of the array itself: `tobytes` would copy it
        state.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return f"{count}:{state.hexdigest()}"


def is_labelled(source: Source) -> bool:
    """Tell whether every image of a source has a label."""
    # stl10 has classes and yet images without a label
    return source.num_classes > 0 and not bool((source.labels < 0).any())


def compare_labels(
    split: Path, labels: np.ndarray, of_train: np.ndarray, classes: Sequence[str]
) -> None:
    """Refuse labels that no training image has; say in one line which classes only training has.

    `split` names the other split in the messages.
    """
    unknown, absent = np.setdiff1d(labels, of_train), np.setdiff1d(of_train, labels)
    if len(unknown):
        raise ValueError(
            f"DATA.PATH (--data-path): {split} has {len(unknown)} classes that train lacks: "
            f"{[classes[label] for label in unknown[:5]]}"
        )
    # once, not by every process
    if len(absent) and distributed.is_main():
        known, names = len(np.unique(of_train)), [classes[label] for label in absent[:5]]
        message = "%s has no image of %d of train's %d classes, such as %s"
        logger.warning(message, split, len(absent), known, names)
