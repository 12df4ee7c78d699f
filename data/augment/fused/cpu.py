"""The operations of a view fused for a CPU; needs numba, an optional package.

Same draws, formulas and order as the batched torch operations of `ops.py`. A sample is the work of
one thread, in a fixed order. Its bits depend neither on the batch around it nor on the
threads.
"""

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from data.augment.base import BatchOp, Draws
from data.augment.fused.numba_kernels import compiled
from data.augment.fused.opcodes import SCALE, SHIFT, programs

logger = logging.getLogger("synco")

_SMALL_BATCH = 1 << 20  # pixels; starting threads for fewer costs more than it saves
_PATIENCE = 1.5  # seconds to get the compiled kernel before it is logged that this takes longer


def run_on_cpu(images: Tensor, ops: tuple[BatchOp, ...], draws: Draws) -> Tensor:
    """Apply `ops` (see `opcodes.can_run`) as drawn, and normalise.

    `images` uint8 (N,3,H,W) on the CPU, planar or channels last; returns float32 (N,3,H,W), planar.
    """
    assert images.shape[1] == 3
    assert images.dtype == torch.uint8
    count, _, height, width = images.shape
    interleaved = images.stride(1) == 1 and images.is_contiguous(memory_format=torch.channels_last)
    levels = images.permute(0, 2, 3, 1) if interleaved else images.contiguous()
    levels = levels.reshape(count, -1)  # no copy: the kernel reads both layouts
    out = _aligned(count * 3 * height * width).reshape(count, 3, height, width)
    plan = programs(ops, draws, count)
    work = (plan.flips, plan.codes, plan.values, plan.taps, plan.reaches)
    run = functools.partial(_kernel(), levels.numpy(), interleaved, *work, SCALE, SHIFT, out)
    threads = 1 if count * height * width < _SMALL_BATCH else min(count, torch.get_num_threads())
    if threads == 1:
        run(0, count)
    else:
        edges = [count * part // threads for part in range(threads + 1)]
        # made anew each time: threads do not survive a fork
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, edges[:-1], edges[1:]))
    return torch.from_numpy(out)


def _aligned(count: int) -> np.ndarray:
    """Return `count` float32 numbers, the first at the start of a cache line."""
    # NumPy, unlike torch, asks for large pages.
    raw = np.empty(count + 16, dtype=np.float32)
    skipped = (-raw.ctypes.data % 64) // 4
    return raw[skipped : skipped + count]


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
