"""What happens to a training image and its objects: keyed crops, resizes and flips."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from yacs.config import CfgNode

from detection.sources.annotations import Objects, Polygons
from utils.randomness import uniform

# streams of draws, see utils.randomness
_FLIP, _SIZE, _CROP, _CROP_SIZE, _HEIGHT, _WIDTH, _TOP, _LEFT = range(1, 9)
_FINER = 3  # odd, so that a pixel's centre is one of the finer pixels' centre
_LEAST_SIDE = 0.01  # pixels of a box; less may round to nothing, which torchvision refuses

Target = dict[str, Tensor]


@dataclass(frozen=True)
class Resizing:
    """How images are resized: the shorter side to one of `sizes`, the longer at most `longest`."""

    sizes: tuple[int, ...]
    longest: int
    flip: float = 0.0

    @staticmethod
    def for_training(node: CfgNode) -> "Resizing":
        """Read a `DETECTION` section."""
        return Resizing(tuple(node.MIN_SIZES), node.MAX_SIZE, node.FLIP)

    @staticmethod
    def for_test(node: CfgNode) -> "Resizing":
        """Read a `DETECTION` section."""
        return Resizing((node.TEST_SIZE,), node.MAX_SIZE)

    def shape(self, height: int, width: int, choice: float = 0.0) -> tuple[int, int]:
        """Return (height, width) after resizing; `choice` in [0, 1) picks the size."""
        size = self.sizes[int(choice * len(self.sizes))]
        scale = min(size / min(height, width), self.longest / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize uint8 (3,H,W) with antialiasing, as PIL does."""
    if tuple(image.shape[1:]) == shape:
        return image
    return F.interpolate(image[None], size=shape, mode="bilinear", antialias=True)[0]


def resized_target(
    objects: Objects, old: tuple[int, int], new: tuple[int, int], flipped: bool, masks: bool
) -> Target:
    """Return the target of an image resized from (height, width) `old` to `new`, maybe mirrored.

    Objects that become thinner than a hundredth of a pixel are left out.
    """
    scale = np.array([new[1] / old[1], new[0] / old[0]] * 2, dtype=np.float32)
    boxes = objects.boxes * scale
    keep = _has_size(boxes)
    objects, boxes = objects.chosen(keep), boxes[keep]
    if flipped:
        # mirrored, a right border is a left one
        boxes = np.stack(
            [new[1] - boxes[:, 2], boxes[:, 1], new[1] - boxes[:, 0], boxes[:, 3]], axis=1
        )
    target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(objects.labels)}
    if masks:
        # filled row by row: an image without objects has masks (0,H,W), which np.stack cannot make
        stacked = np.zeros((len(objects.polygons), *new), dtype=np.uint8)
        for row, polygons in zip(stacked, objects.polygons, strict=True):
            row[:] = rasterise(polygons, scale[:2], new)
        stacked = stacked[:, :, ::-1] if flipped else stacked
        target["masks"] = torch.from_numpy(np.ascontiguousarray(stacked))
    return target


def _has_size(boxes: np.ndarray) -> np.ndarray:
    """Tell which boxes (n,4) have a width and a height."""
    return (boxes[:, 2:] - boxes[:, :2]).min(axis=1) >= _LEAST_SIDE


def rasterise(polygons: Polygons, scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Fill polygons, x and y times `scale` (2,): uint8 (H,W), 1 where a pixel's centre is inside.

    Always PIL, whatever else is installed: the same run has the same masks on every machine. PIL
    fills a polygon's border too, hence the finer grid.
    """
    mask = np.zeros(shape, dtype=np.uint8)
    for polygon in polygons:
        corners = polygon.reshape(-1, 2) * scale
        left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, shape[::-1])
        right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, shape[::-1])
        if right <= left or bottom <= top:
            continue
        # only the polygon's own rectangle: most objects are small beside their image
        canvas = Image.new("1", (int(right - left) * _FINER, int(bottom - top) * _FINER))
        # a pixel spans [i, i + 1), PIL's is centred at i
        finer = (corners - (left, top)) * _FINER - 0.5
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in finer], fill=1)
        # several polygons are one object, of which something else hides a part
        mask[top:bottom, left:right] |= np.array(canvas, dtype=np.uint8)[1::_FINER, 1::_FINER]
    return mask


@dataclass(frozen=True)
class Cropping:
    """The crops that Swin's detectors train on (Liu et al. 2021, after DETR, arXiv:2005.12872).

    An image is thought of as resized by `resizing`; each side of the crop is drawn from `least` to
    `most` pixels of that, or the whole side where it is shorter.
    """

    probability: float
    resizing: Resizing
    least: int
    most: int

    @staticmethod
    def for_training(node: CfgNode) -> "Cropping":
        """Read a `DETECTION` section."""
        resizing = Resizing(tuple(node.CROP_SIZES), node.MAX_SIZE)
        return Cropping(node.CROP, resizing, *node.CROP_RANGE)

    def draw(self, key: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) in pixels of the image itself."""
        resized = self.resizing.shape(height, width, float(uniform(key, _CROP_SIZE)[0]))
        top, tall = self._side(key, (_TOP, _HEIGHT), resized[0], height)
        left, wide = self._side(key, (_LEFT, _WIDTH), resized[1], width)
        return top, left, tall, wide

    def _side(
        self, key: np.ndarray, streams: tuple[int, int], resized: int, original: int
    ) -> tuple[int, int]:
        """Return start and length; both are integers of the resized image, as published."""
        start, length = (float(uniform(key, stream)[0]) for stream in streams)
        least, most = min(resized, self.least), min(resized, self.most)
        side = least + int(length * (most - least + 1))
        first = int(start * (resized - side + 1))
        # back to whole pixels of the image, so that it is resized once and not twice
        begin, end = (round(place * original / resized) for place in (first, first + side))
        begin = min(begin, original - 1)
        return begin, max(end - begin, 1)


def cropped(objects: Objects, top: int, left: int, height: int, width: int) -> Objects:
    """Return the objects in a crop, which may be none, in its pixels; boxes end at its border."""
    boxes = objects.boxes - np.array([left, top, left, top], dtype=np.float32)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], dtype=np.float32))
    polygons = []
    # Corners outside the crop stay: what they span is cut off when it is filled.
    for parts in objects.polygons:
        polygons.append(tuple((part.reshape(-1, 2) - (left, top)).flatten() for part in parts))
    inside = Objects(boxes, objects.labels, objects.ignored, tuple(polygons))
    return inside.chosen(_has_size(boxes))


@dataclass(frozen=True)
class Augmentation:
    """Crop, resize and flip a training image with its objects, drawn by the sample's key."""

    resizing: Resizing
    cropping: Cropping
    masks: bool

    def __call__(self, image: Tensor, objects: Objects, key: np.ndarray) -> tuple[Tensor, Target]:
        """Return the image, uint8, and its target."""
        # first of all, so that only the crop's pixels are resized
        if uniform(key, _CROP)[0] < self.cropping.probability:
            box = self.cropping.draw(key, image.shape[1], image.shape[2])
            top, left, height, width = box
            image = image[:, top : top + height, left : left + width]
            objects = cropped(objects, *box)
        old = (image.shape[1], image.shape[2])
        new = self.resizing.shape(*old, choice=float(uniform(key, _SIZE)[0]))
        flipped = bool(uniform(key, _FLIP)[0] < self.resizing.flip)
        pixels = resize(image, new)
        target = resized_target(objects, old, new, flipped, self.masks)
        return (pixels.flip(2) if flipped else pixels), target
