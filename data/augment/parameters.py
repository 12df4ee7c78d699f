"""Keyed random parameters: every draw about a sample is a pure function of (seed, epoch, sample, view).

The generator is `utils.randomness`: a 64-bit key a sample, one stream number a draw.
"""

import math
from itertools import permutations
from typing import TypeAlias

import numpy as np

from data.augment.recipes import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomCropPad,
    RandomErasing,
    RandomResizedCrop,
    Solarize,
    View,
    photometric_ops,
    view_size,
)
from utils.randomness import hashed, stream_keys, uniform, uniform_between

Draws: TypeAlias = dict[str, np.ndarray]

_ATTEMPTS = 10  # of RandomResizedCrop as in torchvision, of RandomErasing as in timm
_COPY_SHIFT = np.uint64(40)  # a sample's index takes fewer bits

# Stream numbers belong to draws, not to positions in a recipe: moving an operation does not change its draws.
_AREA, _RATIO, _TOP, _LEFT = 100, 200, 300, 301
_FLIP, _JITTER, _ORDER, _GRAY, _BLUR, _SIGMA, _SOLARIZE, _ERASE = 1, 2, 3, 4, 5, 6, 7, 8
_ERASE_AREA, _ERASE_RATIO, _ERASE_TOP, _ERASE_LEFT = 400, 500, 600, 601
RAND_AUGMENT, ERASE_NOISE = 700, 701  # streams of whole generators
_FACTORS = {"brightness": 10, "contrast": 11, "saturation": 12, "hue": 13}
JITTER_OPS = tuple(_FACTORS)  # numbers in `order` count along this
_ORDERS = np.array(list(permutations(range(4))), dtype=np.int64)


def sample_keys(
    seed: int, epoch: int, indices: np.ndarray, view: int, copies: np.ndarray | int = 0
) -> np.ndarray:
    """Return the uint64 keys (N,) of samples `indices` (N,) in `epoch` for view number `view`.

    `copies` (N,) tells the repetitions of a sample in an epoch apart; copy 0 has the key of a sample that is
    not repeated.
    """
    numbered = np.asarray(indices, dtype=np.uint64) + (np.asarray(copies, dtype=np.uint64) << _COPY_SHIFT)
    return hashed(numbered, "view", seed, epoch, view)


class CropDraws:
    """What a RandomResizedCrop draws for samples `keys` (N,) before the sizes of their images are known."""

    def __init__(self, op: RandomResizedCrop, keys: np.ndarray) -> None:
        attempts, column = np.arange(_ATTEMPTS), keys[:, None]
        self.op = op
        self._shares = uniform_between(column, _AREA + attempts, *op.scale).tolist()
        self._ratios = np.exp(uniform_between(column, _RATIO + attempts, *np.log(op.ratio))).tolist()
        self._corners = np.stack([uniform(keys, _TOP), uniform(keys, _LEFT)], axis=1).tolist()

    def box(self, sample: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return a sample's crop (top, left, height, width) of an image by torchvision's law.

        The first of ten attempts that fits, then the central crop. Plain numbers: for one image arrays are
        twenty times slower.
        """
        for share, ratio in zip(self._shares[sample], self._ratios[sample], strict=True):
            area = height * width * share
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top, left = self._corners[sample]
                return math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w
        return _central(self.op, height, width)


def draw_crop(op: RandomResizedCrop, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Draw boxes (N,4) int64 (top, left, height, width) by the law of torchvision's RandomResizedCrop.

    `heights` and `widths` (N,) are the image sizes.
    """
    draws = CropDraws(op, keys)
    sizes = zip(heights.tolist(), widths.tolist(), strict=True)
    boxes = [draws.box(sample, height, width) for sample, (height, width) in enumerate(sizes)]
    return np.array(boxes, dtype=np.int64).reshape(-1, 4)


def _central(op: RandomResizedCrop, height: int, width: int) -> tuple[int, int, int, int]:
    shape = width / height
    h = round(width / min(op.ratio)) if shape < min(op.ratio) else height
    w = round(height * max(op.ratio)) if shape > max(op.ratio) else width
    return (height - h) // 2, (width - w) // 2, h, w


def draw_shift(op: RandomCropPad, keys: np.ndarray, height: int, width: int) -> np.ndarray:
    """Draw boxes (N,4) int64 (top, left, size, size) in images of (height, width) with their padding added.

    The law of torchvision's RandomCrop; ValueError if the padded image is smaller than the window.
    """
    spare = [length + 2 * op.padding - op.size for length in (height, width)]
    if min(spare) < 0:
        raise ValueError(
            f"an image of {height} x {width} pixels with {op.padding} around it is smaller than the crop of "
            f"{op.size}: lower DATA.IMG_SIZE"
        )
    top, left = (
        np.floor(uniform(keys, stream) * (room + 1)).astype(np.int64)
        for stream, room in zip((_TOP, _LEFT), spare, strict=True)
    )
    return np.stack([top, left, *(np.full(len(keys), op.size),) * 2], axis=1)


def draw_photometric(view: View, keys: np.ndarray) -> Draws:
    """Draw all parameters of the photometric operations of `view`: arrays whose first dimension is N.

    Names: flip, jitter, gray, blur, solarize, erase (bool: applied or not), order (N,4) into `JITTER_OPS`,
    brightness, contrast, saturation (factors), hue (turns), sigma (pixels), erase_box (N,4), erase_key.
    RandAugment draws for itself.
    """
    draws: Draws = {}
    for op in photometric_ops(view):
        match op:
            case HorizontalFlip():
                draws["flip"] = uniform(keys, _FLIP) < op.p
            case ColorJitter():
                draws.update(_draw_jitter(op, keys))
            case Grayscale():
                draws["gray"] = uniform(keys, _GRAY) < op.p
            case GaussianBlur():
                draws["blur"] = uniform(keys, _BLUR) < op.p
                draws["sigma"] = uniform_between(keys, _SIGMA, *op.sigma)
            case Solarize():
                draws["solarize"] = uniform(keys, _SOLARIZE) < op.p
            case RandomErasing():
                draws.update(draw_erasing(op, keys, view_size(view)))
    return draws


def _draw_jitter(op: ColorJitter, keys: np.ndarray) -> Draws:
    draws = {"jitter": uniform(keys, _JITTER) < op.p}
    draws["order"] = _ORDERS[np.floor(uniform(keys, _ORDER) * len(_ORDERS)).astype(np.int64)]
    for name in ("brightness", "contrast", "saturation"):
        strength = getattr(op, name)
        draws[name] = uniform_between(keys, _FACTORS[name], max(0.0, 1.0 - strength), 1.0 + strength)
    draws["hue"] = uniform_between(keys, _FACTORS["hue"], -op.hue, op.hue)
    return draws


def draw_erasing(op: RandomErasing, keys: np.ndarray, size: int) -> Draws:
    """Draw the rectangles of timm's RandomErasing in square images: erase (N,), erase_box (N,4), erase_key.

    A box is (top, left, height, width) and smaller than the image both ways; ten attempts, then none.
    """
    attempts, column = np.arange(_ATTEMPTS), keys[:, None]
    area = size * size * uniform_between(column, _ERASE_AREA + attempts, 0.02, 1 / 3)
    edge = math.log(0.3)
    ratio = np.exp(uniform_between(column, _ERASE_RATIO + attempts, edge, -edge))
    h = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    w = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (h < size) & (w < size)
    first = fits.argmax(axis=1)[:, None]
    h, w = np.take_along_axis(h, first, 1)[:, 0], np.take_along_axis(w, first, 1)[:, 0]
    top = np.floor(uniform(keys, _ERASE_TOP) * (size - h + 1)).astype(np.int64)
    left = np.floor(uniform(keys, _ERASE_LEFT) * (size - w + 1)).astype(np.int64)
    return {
        "erase": (uniform(keys, _ERASE) < op.p) & fits.any(axis=1),
        "erase_box": np.stack([top, left, h, w], axis=1),
        "erase_key": stream_keys(keys, ERASE_NOISE),
    }
