"""The operations that crop and resize: parameters, draw and application."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.base import Box, SpatialOp, View, send, spatial_ops
from data.augment.resample import crop_resize
from utils.randomness import uniform, uniform_between

_ATTEMPTS = 10  # of RandomResizedCrop, as in torchvision
_THINNEST = 32  # the longest side that is resized, in shorter sides


@dataclass(frozen=True)
class RandomResizedCrop(SpatialOp):
    """Crop a random area and aspect ratio, resize it to `size` with antialiasing."""

    # Each attempt has its own area and ratio: 100 to 109 and 200 to 209.
    streams: ClassVar[tuple[int, ...]] = (100, 200, 300, 301)
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def draw(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Draw boxes (N,4) int64 with the distribution of torchvision's RandomResizedCrop."""
        draws = CropDraws(self, keys)
        sizes = zip(heights.tolist(), widths.tolist(), strict=True)
        # A box depends on its image's size. So it is found image by image.
        boxes = [draws.box(sample, *size) for sample, size in enumerate(sizes)]
        return np.array(boxes, dtype=np.int64).reshape(-1, 4)

    def on_batch(self, images: Tensor, boxes: np.ndarray | None) -> Tensor:
        """Resize the windows `boxes` (N,4)."""
        assert boxes is not None
        return crop_resize(images, boxes, self.size, self.interpolation)

    def on_image(self, image: Tensor, box: Box | None) -> Tensor:
        """Resize the window `box`."""
        assert box is not None
        return resize_one(window(image, box), (self.size, self.size), self.interpolation)


class CropDraws:
    """The draws of a RandomResizedCrop for samples `keys` (N,), before image sizes are known."""

    def __init__(self, op: RandomResizedCrop, keys: np.ndarray) -> None:
        attempts, column = np.arange(_ATTEMPTS), keys[:, None]
        area, ratio, top, left = op.streams
        self.op = op
        # All attempts of all samples at once, as lists: `box` reads them one by one.
        self._shares = uniform_between(column, area + attempts, *op.scale).tolist()
        self._ratios = np.exp(uniform_between(column, ratio + attempts, *np.log(op.ratio))).tolist()
        self._corners = np.stack([uniform(keys, top), uniform(keys, left)], axis=1).tolist()

    def box(self, sample: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return a sample's crop (top, left, height, width), drawn as torchvision does."""
        # The first of ten attempts that fits, else the central crop.
        # Plain numbers: for one image arrays are twenty times slower.
        for share, ratio in zip(self._shares[sample], self._ratios[sample], strict=True):
            area = height * width * share
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = self._corners[sample]
                # + 1: a window of h rows has height - h + 1 places
                return math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w
        return _central(self.op, height, width)


def _central(op: RandomResizedCrop, height: int, width: int) -> tuple[int, int, int, int]:
    shape = width / height
    h = round(width / min(op.ratio)) if shape < min(op.ratio) else height
    w = round(height * max(op.ratio)) if shape > max(op.ratio) else width
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class Resize(SpatialOp):
    """Resize the shorter side to `size`.

    Of an image thinner than 1:32 only the middle is resized: at 256 pixels the whole of 1 x 3000
    pixels would have 590 million values.
    """

    interpolation: str = "bilinear"

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image gets."""
        return shorter_side_to(self.size, *_kept(height, width))

    def on_batch(self, images: Tensor, boxes: np.ndarray | None) -> Tensor:
        """Resize the whole images."""
        images = _middle(images)
        height, width = images.shape[-2:]
        size = self.shape(height, width)
        # a CIFAR image at its own size stays bit-exact
        if size == (height, width):
            return images
        whole = np.tile([0, 0, height, width], (len(images), 1))
        return crop_resize(images, whole, size, self.interpolation)

    def on_image(self, image: Tensor, box: Box | None) -> Tensor:
        """Resize the whole image."""
        image = _middle(image)
        return resize_one(image, self.shape(image.shape[1], image.shape[2]), self.interpolation)


def shorter_side_to(size: int, height: int, width: int) -> tuple[int, int]:
    """Return (height, width) with the shorter side `size`, rounded down as in torchvision."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def _kept(height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) of what `Resize` keeps of an image."""
    return min(height, _THINNEST * width), min(width, _THINNEST * height)


def _middle(images: Tensor) -> Tensor:
    """Cut images (...,H,W) thinner than 1:32 to the middle of their longer side."""
    height, width = images.shape[-2:]
    tall, wide = _kept(height, width)
    top, left = (height - tall) // 2, (width - wide) // 2
    return images[..., top : top + tall, left : left + wide]


@dataclass(frozen=True)
class CenterCrop(SpatialOp):
    """Keep the central `size` x `size` window."""

    def on_batch(self, images: Tensor, boxes: np.ndarray | None) -> Tensor:
        """Cut the window of (..., H, W), rounded as in torchvision."""
        top, left = (round((length - self.size) / 2.0) for length in images.shape[-2:])
        return images[..., top : top + self.size, left : left + self.size]

    def on_image(self, image: Tensor, box: Box | None) -> Tensor:
        """Cut the window of one image."""
        return self.on_batch(image, None)


@dataclass(frozen=True)
class RandomCropPad(SpatialOp):
    """Cut a random `size` x `size` window out of the image with a black border of `padding`."""

    streams: ClassVar[tuple[int, ...]] = (300, 301)
    padding: int = 4

    def draw(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Draw boxes (N,4) int64 in the padded images, as torchvision's RandomCrop does.

        Raises ValueError if a padded image is smaller than the window.
        """
        corners = []
        for stream, lengths in zip(self.streams, (heights, widths), strict=True):
            room = lengths + 2 * self.padding - self.size
            if np.any(room < 0):
                small = int(np.argmin(room))
                raise ValueError(
                    f"an image of {heights[small]} x {widths[small]} pixels with {self.padding} "
                    f"around it is smaller than the crop of {self.size}: lower DATA.IMG_SIZE"
                )
            corners.append(np.floor(uniform(keys, stream) * (room + 1)).astype(np.int64))
        side = np.full(len(keys), self.size)
        return np.stack([corners[0], corners[1], side, side], axis=1)

    def on_batch(self, images: Tensor, boxes: np.ndarray | None) -> Tensor:
        """Cut the windows `boxes` (N,4) with one indexing operation for the whole batch."""
        assert boxes is not None
        padded = F.pad(images, [self.padding] * 4)
        # Row and column numbers (N,1,S,1) and (N,1,1,S): indexing broadcasts them to the windows.
        corner = send(np.ascontiguousarray(boxes[:, :2]), images.device)
        side = torch.arange(self.size, device=images.device)
        row = (corner[:, :1] + side)[:, None, :, None]
        col = (corner[:, 1:] + side)[:, None, None, :]
        sample, channel = (torch.arange(n, device=images.device) for n in padded.shape[:2])
        return padded[sample[:, None, None, None], channel[None, :, None, None], row, col]

    def on_image(self, image: Tensor, box: Box | None) -> Tensor:
        """Cut the window `box` of one padded image."""
        assert box is not None
        return window(F.pad(image, [self.padding] * 4), box)


def window(image: Tensor, box: Box) -> Tensor:
    """Return the window `box` of an image (3,H,W), a view of its memory."""
    top, left, height, width = (int(value) for value in box)
    # no copy: only the resize reads the pixels
    return image[:, top : top + height, left : left + width]


def resize_one(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 (3,H,W) with antialiasing, the kernel of torchvision, to (3,*size)."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size=size, mode=interpolation, antialias=True)[0]


def draw_boxes(
    view: View, keys: np.ndarray, shape: tuple[int, int] | torch.Size
) -> np.ndarray | None:
    """Draw the crops (N,4) of `view` for images of one (height, width); None if none is random."""
    height, width = shape
    for op in spatial_ops(view):
        boxes = op.draw(keys, np.full(len(keys), height), np.full(len(keys), width))
        if boxes is not None:
            return boxes
        # a random crop after a resize sees the resized image
        height, width = op.shape(height, width)
    return None


def crop_batch(images: Tensor, view: View, boxes: np.ndarray | None) -> Tensor:
    """Crop and resize equally large images as `view` says: uint8 (N,3,H,W) -> (N,3,S,S).

    `boxes` (N,4) are the drawn windows of a random crop, None where there is none.
    """
    for op in spatial_ops(view):
        images = op.on_batch(images, boxes)
    return images


def crop_one(image: Tensor, view: View, box: Box | None) -> Tensor:
    """Crop and resize one uint8 image as `view` says: (3,H,W) -> (3,S,S)."""
    for op in spatial_ops(view):
        image = op.on_image(image, box)
    return image
