"""What a worker does for one micro-batch of files: decode once, crop every view, replace bad images."""

import logging
from typing import Any, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data.augment import center_crop, resized_shape, spatial
from data.parameters import draw_crop, hashed, sample_keys
from data.sampler import Request
from data.source import Source
from data.views import CenterCrop, RandomResizedCrop, Recipe, Resize, View, spatial_ops

logger = logging.getLogger("synco")

_ATTEMPTS = 20  # replacements for one image before giving up
_MIN_TOLERATED = 10  # bad images per process and epoch, however small the data set


class BadImagesError(ValueError):
    """Too many images could not be read, or one of an evaluation."""


class Fetched(TypedDict):
    """A micro-batch on the host; a dict, because the loader's pinning understands it."""

    views: list[Tensor]  # uint8 (N,3,S,S) each, cropped
    epoch: int
    wanted: Tensor  # (N,) indices that the sampler asked for: keys of all draws
    indices: Tensor  # (N,) indices that were loaded: differs where a bad image was replaced
    failures: list[tuple[str, str]]  # (name, reason) of the images that could not be read


def draw_boxes(view: View, keys: np.ndarray, shape: tuple[int, int] | torch.Size) -> np.ndarray | None:
    """Draw the crops (N,4) of `view` for images of one (height, width); None if the crop is not random."""
    first = spatial_ops(view)[0]
    if not isinstance(first, RandomResizedCrop):
        return None
    return draw_crop(first, keys, np.full(len(keys), shape[0]), np.full(len(keys), shape[1]))


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
            samples = [self._sample(request.epoch, int(index), failures) for index in request.indices]
            loaded = [index for index, _ in samples]
            views = [torch.stack(crops) for crops in zip(*(crops for _, crops in samples), strict=True)]
        return {
            "views": views,
            "epoch": request.epoch,
            "wanted": torch.from_numpy(request.indices),
            "indices": torch.tensor(loaded),
            "failures": failures,
        }

    def _rows(self, request: Request, images: Tensor) -> list[Tensor]:
        rows = images[torch.from_numpy(request.indices)]
        return [spatial(rows, view, None) for view in self.recipe]

    def _sample(self, epoch: int, wanted: int, failures: list[tuple[str, str]]) -> tuple[int, list[Tensor]]:
        """Return the index that was loaded and its views (3,S,S)."""
        index = wanted
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                image = self.source.load(index)
            except Exception as error:  # whatever a decoder may raise: the file is bad
                failures.append((self.source.name(index), f"{type(error).__name__}: {error}"))
            else:
                return index, [self._crop(image, number, epoch, wanted) for number in range(len(self.recipe))]
            if self.seed is None:
                size = self._placeholder_size()
                return index, [torch.zeros((3, size, size), dtype=torch.uint8)] * len(self.recipe)
            index = replacement(self.seed, epoch, wanted, attempt, len(self.source))
        raise BadImagesError(f"{_ATTEMPTS} images in a row cannot be read, the last is {failures[-1]}")

    def _placeholder_size(self) -> int:
        return spatial_ops(self.recipe[0])[-1].size

    def _crop(self, image: Tensor, number: int, epoch: int, wanted: int) -> Tensor:
        view = self.recipe[number]
        boxes = None
        if self.seed is not None:
            boxes = draw_boxes(
                view, sample_keys(self.seed, epoch, np.array([wanted]), number), image.shape[-2:]
            )
        return crop_one(image, view, None if boxes is None else boxes[0])


def crop_one(image: Tensor, view: View, box: np.ndarray | None) -> Tensor:
    """Run the crop and resize operations of `view` on one uint8 image (3,H,W) -> (3,S,S)."""
    first, *rest = spatial_ops(view)
    if isinstance(first, RandomResizedCrop):
        assert box is not None
        top, left, height, width = (int(v) for v in box)
        window = image[:, top : top + height, left : left + width]
        return resize_one(window, (first.size, first.size), first.interpolation)
    assert isinstance(first, Resize)
    image = resize_one(image, resized_shape(image.shape[1], image.shape[2], first), first.interpolation)
    return center_crop(image, rest[0].size) if rest and isinstance(rest[0], CenterCrop) else image


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
