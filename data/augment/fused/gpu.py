"""The photometric operations of a view in four kernels for a GPU; importing this imports Triton.

Same draws, formulas and order as the batched torch operations of `ops.py`, which take hundreds of
kernels. A view moves its bytes once in, once out and, where it is blurred, once more between the
passes.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from data.augment.base import BatchOp, Draws, send
from data.augment.fused.opcodes import BLUR, CONTRAST, END, SCALE, SHIFT, Programs, programs
from data.augment.fused.triton_kernels import HEADER, blur_columns, blur_rows, grey_sums, points

BLOCK = 1024  # pixels of a program: eight of each channel a thread


def run_on_gpu(images: Tensor, ops: tuple[BatchOp, ...], draws: Draws) -> Tensor:
    """Apply `ops` (see `opcodes.can_run`) as drawn, and normalise.

    `images` uint8 (N,3,H,W) of any strides; returns float32 (N,3,H,W), planar.
    """
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3
    count, _, height, width = images.shape
    out = torch.empty((count, 3, height, width), device=images.device)
    if not out.numel():
        return out
    ints, floats, blurred = tables(programs(ops, draws, count))
    plane, blocks = height * width, -(-height * width // BLOCK)
    sizes = {
        "K": ints.shape[1] - HEADER,
        "INTS": ints.shape[1],
        "FLOATS": floats.shape[1],
        "BLOCK": BLOCK,
        "enable_fp_fusion": True,  # Triton's default changes with its version
    }
    table, numbers = send(ints, images.device), send(floats, images.device)
    sums = torch.empty((count, blocks), device=images.device)
    grid, shape = (count, blocks), (width, plane, *images.stride())
    constants = _constants(images.device)
    # a batch without a contrast needs no means
    if np.any(ints[:, sizes["K"]] >= 0):
        grey_sums[grid](images, table, numbers, sums, *shape, **sizes)
    power = 1 << (blocks - 1).bit_length()  # Triton's ranges are powers of two
    points[grid](images, table, numbers, sums, constants, out, *shape, **sizes, BLOCKS=power)
    if blurred:
        between = torch.empty((blurred, 3, height, width), device=images.device)
        blur_rows[(count, blocks, 3)](table, numbers, out, between, width, plane, **sizes)
        blur_columns[grid](table, numbers, between, constants, out, width, plane, **sizes)
    return out


def tables(plan: Programs) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the programs as `ints` and `floats` of `triton_kernels.py`, and the blurred count."""
    codes = plan.codes
    contrast = np.where((codes == CONTRAST).any(axis=1), (codes == CONTRAST).argmax(axis=1), -1)
    end = (codes == END).argmax(axis=1)
    blurs = (codes == BLUR).any(axis=1)
    blur = np.where(blurs, (codes == BLUR).argmax(axis=1), end)
    row = np.where(blurs, np.cumsum(blurs) - 1, -1)
    header = np.stack([contrast, blur, end, plan.flips, plan.reaches, row], axis=1)
    ints = np.concatenate([codes, header], axis=1).astype(np.int32)
    return ints, np.concatenate([plan.values, plan.taps], axis=1), int(blurs.sum())


@functools.lru_cache  # a copy at each batch would wait for the device
def _constants(device: torch.device) -> Tensor:
    """Return scale (3) and shift (3)."""
    return torch.from_numpy(np.concatenate([SCALE, SHIFT])).to(device)
