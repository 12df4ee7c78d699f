"""The photometric operations of a view fused for a CPU; importing this imports numba, an optional package.

Same draws, laws and order as the batched operations of `data.augment`, the plain twin. A sample is the work
of one thread, in an order of its own: its bits depend neither on the batch around it nor on the threads.
"""

import functools
import logging
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.kernels import BLUR, END, GRAY, HUE, NOTHING, PAIR, SOLARIZE, compiled
from data.parameters import JITTER_OPS, Draws
from data.views import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    PhotometricOp,
    Solarize,
)

logger = logging.getLogger("synco")

_SMALL_BATCH = 1 << 20  # pixels; starting threads for fewer costs more than it saves
_PATIENCE = 1.5  # seconds to get the compiled kernel before it is logged that this takes longer
_SCALE = np.array([1 / std for std in IMAGENET_STD], dtype=np.float32)
_SHIFT = np.array([mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)], np.float32)


def fused_photometric(images: Tensor, ops: tuple[PhotometricOp, ...], draws: Draws) -> Tensor:
    """Apply `ops` (RandomErasing is none of them) as drawn, and normalise.

    `images` uint8 (N,3,H,W) on the CPU, planar or channels last; returns float32 (N,3,H,W), planar.
    """
    assert images.shape[1] == 3
    assert images.dtype == torch.uint8
    count, _, height, width = images.shape
    interleaved = images.stride(1) == 1 and images.is_contiguous(memory_format=torch.channels_last)
    levels = (images.permute(0, 2, 3, 1) if interleaved else images.contiguous()).reshape(count, -1).numpy()
    out = _aligned(count * 3 * height * width).reshape(count, 3, height, width)
    plan = _plan(ops, draws, count)
    run = functools.partial(_kernel(), levels, interleaved, *plan, _SCALE, _SHIFT, out)
    threads = 1 if count * height * width < _SMALL_BATCH else min(count, torch.get_num_threads())
    if threads == 1:
        run(0, count)
    else:
        edges = [count * part // threads for part in range(threads + 1)]
        with ThreadPoolExecutor(threads) as pool:  # made anew each time: threads do not survive a fork
            list(pool.map(run, edges[:-1], edges[1:]))
    return torch.from_numpy(out)


def _aligned(count: int) -> np.ndarray:
    """Return float32 numbers, the first on a cache line; NumPy, unlike torch, asks for large pages."""
    raw = np.empty(count + 16, dtype=np.float32)
    skipped = (-raw.ctypes.data % 64) // 4
    return raw[skipped : skipped + count]


def _plan(ops: tuple[PhotometricOp, ...], draws: Draws, count: int) -> tuple[np.ndarray, ...]:
    """Return flips (N,), codes (N,K) and their values (N,K), taps (N,R+1) of the blurs and reaches (N,)."""
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
                raise AssertionError(f"{op} is not an operation of the fused path")
    add(np.ones(count, dtype=np.bool_), END)
    codes, values = (np.stack(columns, axis=1) for columns in zip(*steps, strict=True))
    order = np.argsort(codes == NOTHING, axis=1, kind="stable")
    codes = np.take_along_axis(codes, order, axis=1).astype(np.int64)
    return flips, codes, np.take_along_axis(values, order, axis=1).astype(np.float32), taps, reaches


def _taps(sigma: np.ndarray, max_sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return half of the Gaussians (N,R+1) of `sigma` (N,), centre first, cut at four sigma, and reaches."""
    distance = np.arange(math.ceil(4.0 * max_sigma) + PAIR)
    weights = np.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights[(distance > np.ceil(4.0 * sigma)[:, None]) | (weights < 1e-12)] = 0.0  # denormals are slow
    reaches = np.count_nonzero(weights, axis=1) - 1
    weights /= weights[:, :1] + 2.0 * weights[:, 1:].sum(axis=1, keepdims=True)
    return weights.astype(np.float32), np.maximum(PAIR, -(-reaches // PAIR) * PAIR)


@functools.cache
def _kernel() -> Callable[..., None]:
    """Return the compiled kernel; compiling it takes a while and is logged, once for a machine."""
    notice = threading.Timer(_PATIENCE, logger.info, ["compiling the fused augmentation, once"])
    notice.daemon = True
    notice.start()
    try:
        return compiled(cache=True)
    except Exception as error:  # a folder that cannot be written, a full disk, a spoilt file
        logger.info("the compiled augmentation cannot be kept on disk (%s)", error)
        return compiled(cache=False)
    finally:
        notice.cancel()
