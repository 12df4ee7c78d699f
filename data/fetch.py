"""What a worker does for one micro-batch of files: decode once, crop every view, replace bad images."""

import logging
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import center_crop, resized_shape, spatial
from data.parameters import draw_crop, draw_shift, hashed, sample_keys
from data.randaugment import host_augment
from data.sampler import Request
from data.source import Source
from data.views import CenterCrop, RandomCropPad, RandomResizedCrop, Recipe, Resize, View, spatial_ops

logger = logging.getLogger("synco")

_ATTEMPTS = 20  # replacements for one image before giving up
_MIN_TOLERATED = 10  # bad images per process and epoch, however small the data set


class BadImagesError(ValueError):
    """Too many images could not be read, or one of an evaluation."""


class Fetched(TypedDict):
    """A micro-batch on the host; a dict, because the loader's pinning understands it."""

    views: list[Tensor]  # uint8 (N,3,S,S) each, cropped, the host's operations done
    epoch: int
    wanted: Tensor  # (N,) indices that the sampler asked for: with the copies the keys of all draws
    copies: Tensor  # (N,) which repetition of its sample each is
    indices: Tensor  # (N,) indices that were loaded: differs where a bad image was replaced
    failures: list[tuple[str, str]]  # (name, reason) of the images that could not be read


def draw_boxes(view: View, keys: np.ndarray, shape: tuple[int, int] | torch.Size) -> np.ndarray | None:
    """Draw the crops (N,4) of `view` for images of one (height, width); None if the crop is not random."""
    height, width = shape
    for op in spatial_ops(view):
        match op:
            case Resize():
                height, width = resized_shape(height, width, op)
            case RandomResizedCrop():
                return draw_crop(op, keys, np.full(len(keys), height), np.full(len(keys), width))
            case RandomCropPad():
                return draw_shift(op, keys, height, width)
    return None


def replacement(seed: int, epoch: int, index: int, attempt: int, count: int) -> int:
    """Return the index in [0, count) that replaces bad image `index`, fixed by the arguments."""
    return int(hashed(np.array([index]), "replacement", seed, epoch, attempt)[0] % np.uint64(count))


class Fetcher(Dataset[Fetched]):
    """Turn a request into cropped uint8 views; picklable, so that it reaches workers however they start.

    With `seed=None` (evaluation) a bad image is reported and not replaced.
    """

    def __init__(self, source: Source, recipe: Recipe, seed: int | None) -> None:
        self.source, self.recipe, self.seed = source, recipe, seed

    def __getitem__(self, request: Request) -> Fetched:
        """Load, crop and stack the images of a request."""
        failures: list[tuple[str, str]] = []
        if self.source.images is not None and self.seed is None:
            views, loaded = (self._rows(request, self.source.images), list(request.indices))
        else:
            wanted = zip(request.indices, np.broadcast_to(request.copies, len(request.indices)), strict=True)
            samples = [self._sample(request.epoch, int(i), int(copy), failures) for i, copy in wanted]
            loaded = [index for index, _ in samples]
            views = [torch.stack(crops) for crops in zip(*(crops for _, crops in samples), strict=True)]
        return {
            "views": views,
            "epoch": request.epoch,
            "wanted": torch.from_numpy(request.indices),
            "copies": torch.from_numpy(np.broadcast_to(request.copies, len(request.indices)).copy()),
            "indices": torch.tensor(loaded),
            "failures": failures,
        }

    def _rows(self, request: Request, images: Tensor) -> list[Tensor]:
        rows = images[torch.from_numpy(request.indices)]
        return [spatial(rows, view, None) for view in self.recipe]

    def _sample(
        self, epoch: int, wanted: int, copy: int, failures: list[tuple[str, str]]
    ) -> tuple[int, list[Tensor]]:
        """Return the index that was loaded and its views (3,S,S)."""
        index = wanted
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                image = self.source.load(index)
            except Exception as error:  # whatever a decoder may raise: the file is bad
                failures.append((self.source.name(index), f"{type(error).__name__}: {error}"))
            else:
                views = range(len(self.recipe))
                return index, [self._crop(image, number, epoch, wanted, copy) for number in views]
            if self.seed is None:
                size = self._placeholder_size()
                return index, [torch.zeros((3, size, size), dtype=torch.uint8)] * len(self.recipe)
            index = replacement(self.seed, epoch, wanted, attempt, len(self.source))
        raise BadImagesError(f"{_ATTEMPTS} images in a row cannot be read, the last is {failures[-1]}")

    def _placeholder_size(self) -> int:
        return spatial_ops(self.recipe[0])[-1].size

    def _crop(self, image: Tensor, number: int, epoch: int, wanted: int, copy: int) -> Tensor:
        view = self.recipe[number]
        if self.seed is None:
            return crop_one(image, view, None)
        key = sample_keys(self.seed, epoch, np.array([wanted]), number, copy)
        boxes = draw_boxes(view, key, image.shape[-2:])
        return host_augment(crop_one(image, view, None if boxes is None else boxes[0]), view, key)


def crop_one(image: Tensor, view: View, box: np.ndarray | None) -> Tensor:
    """Run the crop and resize operations of `view` on one uint8 image (3,H,W) -> (3,S,S)."""
    top, left, height, width = (0, 0, 0, 0) if box is None else (int(v) for v in box)
    for op in spatial_ops(view):
        match op:
            case RandomResizedCrop():
                assert box is not None
                window = image[:, top : top + height, left : left + width]
                image = resize_one(window, (op.size, op.size), op.interpolation)
            case Resize():
                size = resized_shape(image.shape[1], image.shape[2], op)
                image = resize_one(image, size, op.interpolation)
            case CenterCrop():
                image = center_crop(image, op.size)
            case RandomCropPad():
                assert box is not None
                image = F.pad(image, [op.padding] * 4)[:, top : top + height, left : left + width]
    return image


def resize_one(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 (3,H,W) with antialiasing, the kernel of torchvision, to (3,*size)."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size=size, mode=interpolation, antialias=True)[0]


class BadImages:
    """Counts unreadable images by epoch, logs each once, and stops the run past the budget.

    Tolerated per epoch and process: `max_fraction` of the `seen` images, but at least 10; 0 tolerates none.
    """

    def __init__(self, max_fraction: float, seen: int) -> None:
        self.limit = max(_MIN_TOLERATED, int(max_fraction * seen)) if max_fraction > 0 else 0
        self.seen = seen
        self.epoch = -1
        self.names: set[str] = set()
        self.logged: set[str] = set()

    def count(self, item: Any) -> None:
        """Note the failures of one micro-batch; raise `BadImagesError` past the limit."""
        if item["epoch"] != self.epoch:
            self.epoch, self.names = item["epoch"], set()
        for name, reason in item["failures"]:
            self.names.add(name)
            if name not in self.logged:
                self.logged.add(name)
                logger.warning("unreadable image replaced: %s (%s)", name, reason)
        if len(self.names) > self.limit:
            raise BadImagesError(
                f"{len(self.names)} unreadable images in epoch {self.epoch}, at most {self.limit} of "
                f"{self.seen} may be: repair or remove them or raise DATA.MAX_BAD_FRACTION; one is "
                f"{min(self.names)}"
            )
