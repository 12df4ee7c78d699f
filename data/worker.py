"""What a worker does for a micro-batch: decode once, crop every view, replace bad images."""

import logging
from collections.abc import Callable
from typing import Protocol, TypeAlias, TypedDict, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment.base import Recipe, host_ops, sample_keys, spatial_ops, view_size
from data.augment.crops import (
    CropDraws,
    RandomResizedCrop,
    crop_batch,
    crop_one,
    draw_boxes,
    resize_one,
    window,
)
from data.augment.pipeline import host_augment
from data.decode import fast_jpeg
from data.sampler import Request
from data.sources.base import Source
from utils.randomness import hashed

logger = logging.getLogger("synco")

T = TypeVar("T")

# image (3,H,W), its place, view (3,S,S)
Cropper: TypeAlias = Callable[[Tensor, int, Tensor], object]

_ATTEMPTS = 20  # replacements for one image before giving up
_MIN_TOLERATED = 10  # bad images per process and epoch, however small the data set


class BadImagesError(ValueError):
    """Too many images could not be read, or one of an evaluation."""


class Loaded(TypedDict):
    """Which images a micro-batch has."""

    # a dict: torch's loader pins the tensors of a dict, not those of our classes

    epoch: int
    wanted: Tensor  # (N,) indices that the sampler asked for: with the copies the keys of all draws
    copies: Tensor  # (N,) which repetition of its sample each is
    indices: Tensor  # (N,) indices that were loaded: differs where a bad image was replaced
    failures: list[tuple[str, str]]  # (name, reason) of the images that could not be read


class Fetched(Loaded):
    """A micro-batch on the host."""

    views: list[Tensor]  # uint8 (N,3,S,S) each, cropped, the host's operations done


def loaded_as(request: Request, indices: list[int], failures: list[tuple[str, str]]) -> Loaded:
    """Return what is known of a request whose images `indices` were loaded."""
    # a copy: torch wants memory that may be written
    copies = np.broadcast_to(request.copies, len(request.indices)).copy()
    return {
        "epoch": request.epoch,
        "wanted": torch.from_numpy(request.indices),
        "copies": torch.from_numpy(copies),
        "indices": torch.tensor(indices),
        "failures": failures,
    }


def replacement(seed: int, epoch: int, index: int, attempt: int, count: int) -> int:
    """Return the index in [0, count) that replaces bad image `index`, fixed by the arguments."""
    return int(hashed(np.array([index]), "replacement", seed, epoch, attempt)[0] % np.uint64(count))


class Named(Protocol):
    """A collection whose items have names."""

    def __len__(self) -> int:
        """Return the number of items."""

    def name(self, index: int) -> str:
        """Return a path or another readable name of an item."""


def load_or_replace(
    source: Named,
    read: Callable[[int], T],
    seed: int,
    epoch: int,
    wanted: int,
    failures: list[tuple[str, str]],
) -> tuple[int, T]:
    """Return an index and what `read` gives for it: `wanted`, or its replacement if that fails.

    Every failure is noted as (name, reason).
    """
    index = wanted
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return index, read(index)
        except Exception as error:  # whatever a decoder may raise: the file is bad
            failures.append((source.name(index), f"{type(error).__name__}: {error}"))
        index = replacement(seed, epoch, wanted, attempt, len(source))
    name, reason = failures[-1]
    raise BadImagesError(
        f"{_ATTEMPTS} images in a row cannot be read, the last is {name} ({reason})"
    )


class Fetcher(Dataset[Fetched]):
    """Turn a request into cropped uint8 views; picklable, for workers that are not forked.

    With `seed=None` (evaluation) a bad image is reported and not replaced.
    """

    def __init__(self, source: Source, recipe: Recipe, seed: int | None) -> None:
        self.source, self.recipe, self.seed = source, recipe, seed
        if source.images is None:
            fast_jpeg()  # found, or missed in the log, before any worker starts

    def shared_bytes(self, count: int) -> int:
        """Return the bytes of shared memory in which the views of `count` images travel."""
        return count * self._pixel_bytes() * sum(view_size(view) ** 2 for view in self.recipe)

    def _pixel_bytes(self) -> int:
        return self.source.pixels.channels * self.source.pixels.dtype.itemsize

    def __getitem__(self, request: Request) -> Fetched:
        """Load and crop the images of a request."""
        failures: list[tuple[str, str]] = []
        # an evaluation of images in memory: all rows at once
        if self.source.images is not None and self.seed is None:
            rows = self.source.images[torch.from_numpy(request.indices)]
            views = [crop_batch(rows, view, None) for view in self.recipe]
            loaded = request.indices.tolist()
        else:
            views, loaded = self._samples(request, failures)
        return {"views": views, **loaded_as(request, loaded, failures)}

    def _samples(
        self, request: Request, failures: list[tuple[str, str]]
    ) -> tuple[list[Tensor], list[int]]:
        """Return the views (N,3,S,S), channels last, and the indices that were loaded."""
        count, loaded = len(request.indices), []
        croppers = [self._cropper(request, number) for number in range(len(self.recipe))]
        views = []
        for size in map(view_size, self.recipe):
            # channels last, as images are decoded: a crop is then written without a copy
            pixels = self.source.pixels
            memory = torch.empty((count, size, size, pixels.channels), dtype=pixels.dtype)
            views.append(memory.permute(0, 3, 1, 2))
        for place, wanted in enumerate(request.indices.tolist()):
            index, image = self.load(request.epoch, wanted, failures)
            loaded.append(index)
            for crop, view in zip(croppers, views, strict=True):
                if image is None:
                    view[place].zero_()
                else:
                    crop(image, place, view[place])
        return views, loaded

    def load(
        self,
        epoch: int,
        wanted: int,
        failures: list[tuple[str, str]],
        read: Callable[[int], Tensor] | None = None,
    ) -> tuple[int, Tensor | None]:
        """Return the loaded index and its image (3,H,W); None for a bad one of an evaluation.

        `read` may replace the source's `load`.
        """
        read = read or self.source.load
        if self.seed is not None:
            return load_or_replace(self.source, read, self.seed, epoch, wanted, failures)
        try:
            return wanted, read(wanted)
        except Exception as error:  # whatever a decoder may raise: the file is bad
            failures.append((self.source.name(wanted), f"{type(error).__name__}: {error}"))
            return wanted, None

    def _cropper(self, request: Request, number: int) -> Cropper:
        """Return what crops an image for the sample at a place of the request into its view.

        All that can be drawn before the image's size is known is drawn here, for the whole request.
        """
        view = self.recipe[number]
        if self.seed is None:
            return lambda image, place, out: out.copy_(crop_one(image, view, None))
        keys = sample_keys(self.seed, request.epoch, request.indices, number, request.copies)
        first = spatial_ops(view)[0]
        if isinstance(first, RandomResizedCrop) and not host_ops(view):
            return _resizing_cropper(first, CropDraws(first, keys))

        def crop(image: Tensor, place: int, out: Tensor) -> None:
            key = keys[place : place + 1]
            boxes = draw_boxes(view, key, image.shape[-2:])
            box = None if boxes is None else boxes[0]
            out.copy_(host_augment(crop_one(image, view, box), view, key))

        return crop


def _resizing_cropper(op: RandomResizedCrop, draws: CropDraws) -> Cropper:
    """Return a cropper for a view that only crops: what takes a worker's time beside decoding."""
    resize = _RESIZE[op.interpolation]
    size = [op.size, op.size]

    def crop(image: Tensor, place: int, out: Tensor) -> None:
        box = draws.box(place, image.shape[1], image.shape[2])
        if image.stride(0) == out.stride(0) == 1:  # channels last, as decoded
            resize(window(image, box)[None], size, False, None, None, out=out[None])
        else:
            out.copy_(resize_one(window(image, box), (op.size, op.size), op.interpolation))

    return crop


# What F.interpolate calls, into memory that is there already: it spares an allocation and a copy.
_RESIZE = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


class BadImages:
    """Counts unreadable images by epoch, logs each once, and stops the run past the budget.

    Tolerated per epoch and process: `max_fraction` of the `seen` images, but at least 10; 0
    tolerates none.
    """

    def __init__(self, max_fraction: float, seen: int) -> None:
        self.limit = max(_MIN_TOLERATED, int(max_fraction * seen)) if max_fraction > 0 else 0
        self.seen = seen
        self.epoch = -1
        self.reasons: dict[str, str] = {}  # by name
        self.logged: set[str] = set()

    def count(self, epoch: int, failures: list[tuple[str, str]]) -> None:
        """Note the failures of one micro-batch; raise `BadImagesError` past the limit."""
        if epoch != self.epoch:
            self.epoch, self.reasons = epoch, {}
        for name, reason in failures:
            self.reasons[name] = reason
            if name not in self.logged:
                self.logged.add(name)
                logger.warning("unreadable image replaced: %s (%s)", name, reason)
        if len(self.reasons) > self.limit:
            first = min(self.reasons)
            raise BadImagesError(
                f"{len(self.reasons)} unreadable images in epoch {self.epoch}, at most "
                f"{self.limit} of {self.seen} may be: repair or remove them or raise "
                f"DATA.MAX_BAD_FRACTION; one is {first} ({self.reasons[first]})"
            )
