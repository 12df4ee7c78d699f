"""What a view does to each sample of a batch, as a short program: the input of the fused paths.

`data.augment.fused.cpu` runs the programs on a CPU, `data.augment.fused.gpu` on a GPU.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD, BatchOp, Draws
from data.augment.ops import (
    JITTER_OPS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Solarize,
)

# The operations; those of ColorJitter have their numbers in JITTER_OPS. `numba_kernels.py` and
# `triton_kernels.py` repeat this line: their compilers cannot import numbers (a test compares).
BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SOLARIZE, BLUR, NOTHING, END = range(9)
OFFSET, VIVID = 9, 10  # brightness by a sum, saturation of HSV: of `numba_kernels.py` alone
PAIR = 2  # taps of a blur come in pairs on each side

# x * SCALE - SHIFT is ImageNet's normalisation.
SCALE = np.array([1 / std for std in IMAGENET_STD], dtype=np.float32)
SHIFT = np.array(
    [mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], np.float32
)


Ops: TypeAlias = tuple[BatchOp, ...]


@dataclass(frozen=True)
class Programs:
    """The programs of N samples: at most K operations, the last of which is END, after the flip."""

    flips: np.ndarray  # (N,) bool
    codes: np.ndarray  # (N,K) int64, NOTHING after END
    values: np.ndarray  # (N,K) float32: factor, turns or threshold
    taps: np.ndarray  # (N,R+1) float32: half of a symmetric kernel, centre first
    reaches: np.ndarray  # (N,) int64: taps that count on each side


class Writer:
    """The programs while they are written: the functions of `WRITERS` add to them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.flips = np.zeros(count, dtype=np.bool_)
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []  # codes and values, each (N,)
        self.taps = np.ones((count, 1), dtype=np.float32)
        self.reaches = np.zeros(count, dtype=np.int64)

    def add(
        self, mask: np.ndarray, code: np.ndarray | int, value: np.ndarray | float = 0.0
    ) -> None:
        """Add one operation to the samples in `mask`."""
        self.steps.append((np.where(mask, code, NOTHING), np.broadcast_to(value, self.count)))


def _flip(op: BatchOp, draws: Draws, writer: Writer) -> None:
    # The kernels do it first: it commutes with all others, because the blur is symmetric.
    writer.flips = np.ascontiguousarray(draws["flip"])


def _jitter(op: BatchOp, draws: Draws, writer: Writer) -> None:
    factors = np.stack([draws[name] for name in JITTER_OPS], axis=1)
    for kinds in draws["order"].T:
        value = np.take_along_axis(factors, kinds[:, None], axis=1)[:, 0]
        changes = value != (kinds != HUE)  # factors of 1 and 0 turns do not
        writer.add(draws["jitter"] & changes, kinds, value)


def _gray(op: BatchOp, draws: Draws, writer: Writer) -> None:
    writer.add(draws["gray"], GRAY)


def _blur(op: BatchOp, draws: Draws, writer: Writer) -> None:
    assert isinstance(op, GaussianBlur)
    writer.add(draws["blur"], BLUR)
    writer.taps, writer.reaches = _taps(draws["sigma"], op.sigma[1])


def _solarize(op: BatchOp, draws: Draws, writer: Writer) -> None:
    assert isinstance(op, Solarize)
    # A little lower: the level at the threshold may round to below it.
    writer.add(draws["solarize"], SOLARIZE, op.threshold / 255 - 1e-6)


# The one table of the fused paths: an operation that is not in it runs by torch. Rooms above `data`
# add their own.
WRITERS: dict[type, Callable[[BatchOp, Draws, Writer], None]] = {
    HorizontalFlip: _flip,
    ColorJitter: _jitter,
    Grayscale: _gray,
    GaussianBlur: _blur,
    Solarize: _solarize,
}


# operations whose codes Triton's kernels lack
CPU_ONLY: set[type] = set()


def can_run(ops: Ops, device_type: str = "cpu") -> bool:
    """Tell whether the fused path of a device ("cpu" or "cuda") can run `ops`; else torch has to.

    The GPU's kernels take the grey mean of a contrast before any blur, so a blur may not come
    first.
    """
    kinds = [type(op) for op in ops]
    if not all(kind in WRITERS for kind in kinds):
        return False
    if device_type != "cpu" and CPU_ONLY & set(kinds):
        return False
    if device_type == "cpu" or not {ColorJitter, GaussianBlur} <= set(kinds):
        return True
    return kinds.index(ColorJitter) < kinds.index(GaussianBlur)


def programs(ops: Ops, draws: Draws, count: int) -> Programs:
    """Write down `ops` (see `can_run`) as drawn for `count` samples."""
    writer = Writer(count)
    for op in ops:
        WRITERS[type(op)](op, draws, writer)
    writer.add(np.ones(count, dtype=np.bool_), END)
    codes = np.stack([codes for codes, _ in writer.steps], axis=1)
    values = np.stack([values for _, values in writer.steps], axis=1)
    # Move NOTHING behind END: the kernels stop at END. A stable sort keeps the order of the rest.
    order = np.argsort(codes == NOTHING, axis=1, kind="stable")
    codes = np.take_along_axis(codes, order, axis=1).astype(np.int64)
    values = np.take_along_axis(values, order, axis=1).astype(np.float32)
    return Programs(writer.flips, codes, values, writer.taps, writer.reaches)


def _taps(sigma: np.ndarray, max_sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return half kernels (N,R+1) of `sigma` (N,), centre first, and the taps that count."""
    distance = np.arange(math.ceil(4.0 * max_sigma) + PAIR)
    weights = np.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    # Cut at four sigma. Denormal numbers are slow.
    weights[(distance > np.ceil(4.0 * sigma)[:, None]) | (weights < 1e-12)] = 0.0
    reaches = np.count_nonzero(weights, axis=1) - 1
    weights /= weights[:, :1] + 2.0 * weights[:, 1:].sum(axis=1, keepdims=True)
    return weights.astype(np.float32), np.maximum(PAIR, -(-reaches // PAIR) * PAIR)
