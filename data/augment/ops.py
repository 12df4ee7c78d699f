"""The operations on a batch, one class each, with its parameters, draw and application.

Draws are keyed by the sample (`utils.randomness`); application is deterministic and runs on any
device. An operation may have fused kernels as well: `data.augment.fused.opcodes`.
"""

import math
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from data.augment.base import BatchOp, Draws, HostOp, send
from data.augment.resample import constant, gaussian_blur
from utils.randomness import keyed_normal, stream_keys, uniform, uniform_between

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in torchvision
JITTER_OPS = ("brightness", "contrast", "saturation", "hue")  # numbers in `order` count along this
_HUE = JITTER_OPS.index("hue")
_ORDERS = np.array(list(permutations(range(4))), dtype=np.int64)
_ATTEMPTS = 10  # of RandomErasing, as in timm


@dataclass(frozen=True)
class HorizontalFlip(BatchOp, HostOp):
    """Mirror left-right with probability `p`."""

    name: ClassVar[str] = "flip"
    # A stream's number keys its draws (utils.randomness): another number is another run.
    streams: ClassVar[tuple[int, ...]] = (1,)
    p: float = 0.5

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw flip (N,)."""
        return {"flip": uniform(keys, 1) < self.p}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Mirror."""
        return x.flip(-1)

    def on_host(self, crop: Tensor, key: np.ndarray, interpolation: str) -> Tensor:
        """Mirror one crop if drawn: the draw is that of the batch."""
        return crop.flip(-1) if self.draw(key, crop.shape[-1])["flip"][0] else crop


@dataclass(frozen=True)
class ColorJitter(BatchOp):
    """Change brightness, contrast, saturation and hue in random order with probability `p`."""

    name: ClassVar[str] = "jitter"
    streams: ClassVar[tuple[int, ...]] = (2, 3, 10, 11, 12, 13)
    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw jitter (N,), order (N,4), three factors (N,) and hue (N,) in turns."""
        draws = {"jitter": uniform(keys, 2) < self.p}
        # one of the 24 orders, each equally likely
        draws["order"] = _ORDERS[np.floor(uniform(keys, 3) * len(_ORDERS)).astype(np.int64)]
        strengths = (self.brightness, self.contrast, self.saturation)
        for name, stream, strength in zip(JITTER_OPS, (10, 11, 12), strengths, strict=False):
            draws[name] = uniform_between(keys, stream, max(0.0, 1.0 - strength), 1.0 + strength)
        draws["hue"] = uniform_between(keys, 13, -self.hue, self.hue)
        return draws

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Apply the four to every sample in its own order."""
        return color_jitter(x, {name: draws[name] for name in ("order", *JITTER_OPS)})


@dataclass(frozen=True)
class Grayscale(BatchOp):
    """Replace all channels by the luma with probability `p`."""

    name: ClassVar[str] = "gray"
    streams: ClassVar[tuple[int, ...]] = (4,)
    p: float = 0.2

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw gray (N,)."""
        return {"gray": uniform(keys, 4) < self.p}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Replace."""
        return luma(x).expand_as(x)


@dataclass(frozen=True)
class GaussianBlur(BatchOp):
    """Blur with a Gaussian of standard deviation U(`sigma`) pixels, with probability `p`."""

    name: ClassVar[str] = "blur"
    streams: ClassVar[tuple[int, ...]] = (5, 6)
    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw blur (N,) and sigma (N,) in pixels."""
        return {"blur": uniform(keys, 5) < self.p, "sigma": uniform_between(keys, 6, *self.sigma)}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Blur."""
        # one kernel width for the batch, that of the largest sigma
        return gaussian_blur(x, send(draws["sigma"], x.device), self.sigma[1])


@dataclass(frozen=True)
class Solarize(BatchOp):
    """Invert the levels from `threshold` (0 to 255) on, with probability `p`."""

    name: ClassVar[str] = "solarize"
    streams: ClassVar[tuple[int, ...]] = (7,)
    threshold: int = 128
    p: float = 0.2

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw solarize (N,)."""
        return {"solarize": uniform(keys, 7) < self.p}

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Invert."""
        # a lerp with weights 0 and 1 is faster on a CPU than a choice by a mask
        return x.lerp(1.0 - x, (x >= self.threshold / 255).to(x.dtype))


@dataclass(frozen=True)
class RandomErasing(BatchOp):
    """Replace a random rectangle of the normalised image by normal noise, with probability `p`.

    Zhong et al. 2020, "Random erasing data augmentation", in timm's mode "pixel": area U(0.02, 1/3)
    of the image, aspect ratio log-uniform in [0.3, 1/0.3], one rectangle.
    """

    name: ClassVar[str] = "erase"
    # Each attempt has its own area and ratio: 400 to 409 and 500 to 509. 701 seeds the noise.
    streams: ClassVar[tuple[int, ...]] = (8, 400, 500, 600, 601, 701)
    after_normalisation: ClassVar[bool] = True
    p: float = 0.25

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw erase (N,), erase_box (N,4) of (top, left, height, width), and erase_key (N,).

        A box is smaller than the image both ways; ten attempts, then the sample is not erased.
        """
        attempts, column = np.arange(_ATTEMPTS), keys[:, None]
        area = size * size * uniform_between(column, 400 + attempts, 0.02, 1 / 3)
        # log-uniform: a rectangle is upright as often as it lies
        edge = math.log(0.3)
        ratio = np.exp(uniform_between(column, 500 + attempts, edge, -edge))
        h = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        w = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (h < size) & (w < size)
        # argmax of booleans: the first attempt that fits, 0 if none does
        first = fits.argmax(axis=1)[:, None]
        h, w = np.take_along_axis(h, first, 1)[:, 0], np.take_along_axis(w, first, 1)[:, 0]
        top = np.floor(uniform(keys, 600) * (size - h + 1)).astype(np.int64)
        left = np.floor(uniform(keys, 601) * (size - w + 1)).astype(np.int64)
        return {
            "erase": (uniform(keys, 8) < self.p) & fits.any(axis=1),
            "erase_box": np.stack([top, left, h, w], axis=1),
            "erase_key": stream_keys(keys, 701),
        }

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Put the noise into the rectangles."""
        top, left, height, width = send(draws["erase_box"], x.device)[:, :, None].unbind(1)
        row, col = (torch.arange(side, device=x.device) for side in x.shape[-2:])
        rows = (row >= top) & (row < top + height)
        cols = (col >= left) & (col < left + width)
        # The noise is made on the device: torch knows no uint64, so the keys go as int64.
        keys = send(draws["erase_key"].view(np.int64), x.device)
        noise = keyed_normal(keys, tuple(x.shape[1:]))
        return torch.where((rows[:, :, None] & cols[:, None, :])[:, None], noise, x)


def luma(x: Tensor) -> Tensor:
    """Return the grey image (N,1,H,W) of RGB `x` (N,3,H,W)."""
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def color_jitter(x: Tensor, draws: Draws) -> Tensor:
    """Apply the four changes to every sample of `x` (N,3,S,S) in its own order."""
    # Hue costs most and cannot be written as the others are. So the samples are sorted by the place
    # of hue in their order and aligned on it: three slots before hue and three after, in each of
    # which a contiguous part of the batch is active.
    hue_place = np.argmax(draws["order"] == _HUE, axis=1)
    ranking = np.argsort(-hue_place, kind="stable")
    # how many samples have 3, 2, 1 operations before hue
    before = [int((hue_place > slot).sum()) for slot in (2, 1, 0)]
    ranked = {name: values[ranking] for name, values in draws.items()}
    factors = send(_slot_factors(ranked), x.device)
    index = send(ranking, x.device)
    y = x.index_select(0, index)
    for slot, count in enumerate(before):
        _affine_(y[:count], factors[slot, :, :count])
    # hue is the dearest of the four; recipes without it skip it
    if np.any(ranked["hue"]):
        y = adjust_hue(y, send(ranked["hue"], x.device))
    for slot, count in enumerate(before, start=3):
        _affine_(y[count:], factors[slot, :, count:])
    return torch.empty_like(y).index_copy_(0, index, y)


def _slot_factors(draws: Draws) -> np.ndarray:
    """Return (6,3,N): each slot's factors of the image, its grey image and the grey mean.

    `clamp(f*x + s*gray + c*mean(gray))` is brightness (s = c = 0), contrast (c = 1-f), saturation
    (s = 1-f).
    """
    order = draws["order"]
    count, places = order.shape
    kinds = np.full((count, 2 * places - 1), _HUE)
    shift = places - 1 - np.argmax(order == _HUE, axis=1)
    kinds[np.arange(count)[:, None], shift[:, None] + np.arange(places)] = order
    kinds = np.delete(kinds, places - 1, axis=1).T
    known = [draws[name] for name in JITTER_OPS[:_HUE]]
    factor = np.select([kinds == k for k in range(_HUE)], known, 1.0)
    contrast, saturation = (kinds == JITTER_OPS.index(name) for name in ("contrast", "saturation"))
    return np.stack([factor, (1.0 - factor) * saturation, (1.0 - factor) * contrast], axis=1)


def _affine_(x: Tensor, factors: Tensor) -> None:
    """Set `x` (N,3,S,S) to clamp(f*x + s*luma(x) + c*mean(luma(x))), `factors` f, s, c (3,N)."""
    if not len(x):
        return
    scale, grey, mean = factors[:, :, None, None, None]
    offset = luma(x)
    average = offset.mean(dim=(2, 3), keepdim=True).mul_(mean)
    x.mul_(scale).add_(offset.mul_(grey).add_(average)).clamp_(0.0, 1.0)


def adjust_hue(x: Tensor, shift: Tensor, saturation: Tensor | None = None) -> Tensor:
    """Turn the hue of RGB `x` (N,3,H,W) in [0,1] by `shift` (N,) turns, exactly through HSV.

    `saturation` (N,) multiplies the S of HSV, which stays at most 1. With the hue in sextants,
    channel = value - chroma * clamp(2 - |r|, 0, 1) where r = hue + (3 | 1 | -1) wrapped to [-3, 3].
    """
    # In-place arithmetic instead of comparisons: masks are several times slower on a CPU.
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    inverse = chroma.clamp(min=1e-8).reciprocal_()  # the hue of grey pixels does not matter
    if_blue = (red - green).mul_(inverse).add_(4.0)
    if_green = (blue - red).mul_(inverse).add_(2.0)
    hue = (green - blue).mul_(inverse)
    if_green.lerp_(if_blue, (value - green).sign_())  # weight 0 where green is the largest, else 1
    hue.lerp_(if_green, (value - red).sign_()).add_(6.0 * shift[:, None, None])
    turned = hue[:, None] + constant((3.0, 1.0, -1.0), x.device)
    if saturation is not None:
        # S is chroma / value
        chroma = torch.minimum(chroma.mul_(saturation[:, None, None]), value)
    turned.sub_((turned * (1 / 6)).round_(), alpha=6.0).abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    return torch.sub(value[:, None], turned.mul_(chroma[:, None]), out=turned)
