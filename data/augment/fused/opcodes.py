"""What a view does to each sample of a batch, as a short program: the input of the fused paths.

`data.augment.fused.cpu` runs the programs on a CPU, `data.augment.fused.gpu` on a GPU.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.augment.parameters import JITTER_OPS, Draws
from data.augment.recipes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    PhotometricOp,
    Solarize,
)

# The operations; those of ColorJitter have their numbers in JITTER_OPS. `numba_kernels.py` and
# `triton_kernels.py` repeat this line: their compilers cannot import numbers (a test compares).
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR, NOTHING, END = range(9)
PAIR = 2  # taps of a blur come in pairs on each side

# x * SCALE - SHIFT is ImageNet's normalisation.
SCALE = np.array([1 / std for std in IMAGENET_STD], dtype=np.float32)
SHIFT = np.array([mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], np.float32)


@dataclass(frozen=True)
class Programs:
    """The programs of N samples: at most K operations, the last of which is END, after the flip."""

    flips: np.ndarray  # (N,) bool
    codes: np.ndarray  # (N,K) int64, NOTHING after END
    values: np.ndarray  # (N,K) float32: factor, turns or threshold
    taps: np.ndarray  # (N,R+1) float32: half of a symmetric kernel, centre first
    reaches: np.ndarray  # (N,) int64: taps that count on each side


def programs(ops: tuple[PhotometricOp, ...], draws: Draws, count: int) -> Programs:
    """Write down `ops` (RandomErasing is none of them) as drawn for `count` samples."""
    flips = np.zeros(count, dtype=np.bool_)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    taps, reaches = np.ones((count, 1), dtype=np.float32), np.zeros(count, dtype=np.int64)

    def add(mask: np.ndarray, code: np.ndarray | int, value: np.ndarray | float = 0.0) -> None:
        steps.append((np.where(mask, code, NOTHING), np.broadcast_to(value, count)))

    for op in ops:
        match op:
            case HorizontalFlip():
                # done first: it commutes with all others, blurs being symmetric
                flips = np.ascontiguousarray(draws["flip"])
            case ColorJitter():
                factors = np.stack([draws[name] for name in JITTER_OPS], axis=1)
                for kinds in draws["order"].T:
                    value = np.take_along_axis(factors, kinds[:, None], axis=1)[:, 0]
                    changes = value != (kinds != HUE)  # factors of 1 and 0 turns do not
                    add(draws["jitter"] & changes, kinds, value)
            case Grayscale():
                add(draws["gray"], GRAY)
            case GaussianBlur():
                add(draws["blur"], BLUR)
                taps, reaches = _taps(draws["sigma"], op.sigma[1])
            case Solarize():  # a little lower: the level at the threshold may round to below it
                add(draws["solarize"], SOLARIZE, op.threshold / 255 - 1e-6)
            case _:
                raise AssertionError(f"{op} is not an operation of the fused paths")
    add(np.ones(count, dtype=np.bool_), END)
    codes, values = (np.stack(columns, axis=1) for columns in zip(*steps, strict=True))
    order = np.argsort(codes == NOTHING, axis=1, kind="stable")
    codes = np.take_along_axis(codes, order, axis=1).astype(np.int64)
    return Programs(flips, codes, np.take_along_axis(values, order, axis=1).astype(np.float32), taps, reaches)


def _taps(sigma: np.ndarray, max_sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return half of the Gaussians (N,R+1) of `sigma` (N,), centre first, cut at four sigma, and reaches."""
    distance = np.arange(math.ceil(4.0 * max_sigma) + PAIR)
    weights = np.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights[(distance > np.ceil(4.0 * sigma)[:, None]) | (weights < 1e-12)] = 0.0  # denormals are slow
    reaches = np.count_nonzero(weights, axis=1) - 1
    weights /= weights[:, :1] + 2.0 * weights[:, 1:].sum(axis=1, keepdims=True)
    return weights.astype(np.float32), np.maximum(PAIR, -(-reaches // PAIR) * PAIR)
