"""Draw and apply the operations of a view to a whole batch, on any device."""

import functools
import importlib.util
import logging

import numpy as np
import torch
from torch import Tensor

from data.augment.base import (
    BatchOp,
    Draws,
    HostOp,
    View,
    device_ops,
    host_ops,
    photometric_ops,
    send,
    spatial_ops,
    view_size,
)
from data.augment.fused.opcodes import can_run
from data.augment.resample import chunk_length, constant
from data.pixels import PLAIN, Pixels

logger = logging.getLogger("synco")


def draw_photometric(view: View, keys: np.ndarray) -> Draws:
    """Draw all parameters of the batched operations of `view`: arrays whose first dimension is N.

    Each operation's `draw` says which. RandAugment draws for itself.
    """
    draws: Draws = {}
    for op in photometric_ops(view):
        if isinstance(op, BatchOp):
            # only RandomErasing needs the size, and a view of batched operations alone has none
            draws |= op.draw(keys, view_size(view) if spatial_ops(view) else 0)
    return draws


def host_augment(crop: Tensor, view: View, key: np.ndarray) -> Tensor:
    """Run the host's operations of `view` on a uint8 crop (3,S,S); `key` (1,) is the sample's."""
    for op in host_ops(view):
        assert isinstance(op, HostOp)  # check_view
        crop = op.on_host(crop, key, view_interpolation(view))
    return crop


def view_interpolation(view: View) -> str:
    """Return how the view's crop is resized, which is also how RandAugment turns and shears."""
    for op in spatial_ops(view):
        if hasattr(op, "interpolation"):
            return op.interpolation
    return "bicubic"


def photometric(
    images: Tensor, view: View, draws: Draws, backend: str = "auto", pixels: Pixels = PLAIN
) -> Tensor:
    """Apply the batched operations of `view` and normalise: uint8 (N,3,S,S) -> float32 (N,3,S,S).

    What a view does on the host (`host_ops`) was done where the image was read. `draws` come from
    `draw_photometric`; values stay in [0,1] between operations. `backend` is that of
    `choose_backend`: both agree to 1e-4 except where a level meets the threshold of Solarize. A
    view that has an operation without an opcode runs by torch, whatever `backend` says.
    """
    ops = device_ops(view)
    before = tuple(op for op in ops if not op.after_normalisation)
    fused = bool(before) and choose_backend(backend, images.device, pixels) == "fused"
    x = _fused(images, before, draws) if fused else _in_chunks(images, before, draws, pixels)
    for op in ops[len(before) :]:  # check_view: these come last
        apply_(op, x, draws)
    return x


def choose_backend(backend: str, device: torch.device, pixels: Pixels = PLAIN) -> str:
    """Return "fused" (compiled by numba for a CPU, by Triton for a GPU) or "torch".

    "auto" is "fused" on a CPU that has numba, else "torch": the kernels for a GPU have been
    interpreted and compiled, but not yet run on one. A ValueError where "fused" is asked for and
    cannot run.
    """
    # The kernels are compiled for uint8, three colours and ImageNet's mean and deviation.
    if backend == "torch" or (backend == "auto" and (device.type != "cpu" or pixels != PLAIN)):
        return "torch"
    if pixels != PLAIN:
        raise ValueError(
            "AUG.BACKEND 'fused' is for 8-bit RGB with ImageNet's mean and deviation: with "
            "DATA.CHANNELS, RANGE, MEAN or STD use 'auto' or 'torch'"
        )
    package = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if package is None:
        raise ValueError(
            f"AUG.BACKEND 'fused' runs on a CPU or a GPU, not on {device}: use 'torch'"
        )
    if _has(package):
        return "fused"
    if backend == "fused":
        raise ValueError(
            f"AUG.BACKEND 'fused' needs {package}: pip install {package}, or use 'auto' or 'torch'"
        )
    return "torch"


@functools.cache
def _has(package: str) -> bool:
    found = importlib.util.find_spec(package) is not None
    if not found:
        slower = "the augmentation is several times slower without it"
        logger.info("%s is not installed: %s", package, slower)
    return found


def _fused(images: Tensor, ops: tuple[BatchOp, ...], draws: Draws) -> Tensor:
    if not can_run(ops, images.device.type):
        return _in_chunks(images, ops, draws)
    if images.device.type == "cpu":
        from data.augment.fused.cpu import run_on_cpu  # numba is an optional package

        return run_on_cpu(images, ops, draws)
    from data.augment.fused.gpu import run_on_gpu  # Triton is an optional package

    return run_on_gpu(images, ops, draws)


def _in_chunks(
    images: Tensor, ops: tuple[BatchOp, ...], draws: Draws, pixels: Pixels = PLAIN
) -> Tensor:
    # A CPU works on pieces that stay in its caches; their results are the same.
    length = chunk_length(images.device, *images.shape[1:])
    if len(images) <= length:
        return _plain(images, ops, draws, pixels)
    parts = []
    for start in range(0, len(images), length):
        part = slice(start, start + length)
        drawn = {name: values[part] for name, values in draws.items()}
        parts.append(_plain(images[part], ops, drawn, pixels))
    return torch.cat(parts)


def _plain(images: Tensor, ops: tuple[BatchOp, ...], draws: Draws, pixels: Pixels) -> Tensor:
    # a decoder may give channels last; the operations are written for planes
    x = images.to(torch.float32, memory_format=torch.contiguous_format)
    if images.dtype == torch.uint8:
        x = x.div_(255.0)
    else:
        x = x.clamp(0.0, 1.0)  # a copy; a cubic filter leaves the range, as uint8 cannot
    for op in ops:
        apply_(op, x, draws)
    return normalise_(x, pixels)


def apply_(op: BatchOp, x: Tensor, draws: Draws) -> None:
    """Apply one operation in place to the samples of `x` (N,3,S,S) that drew it."""
    chosen = np.flatnonzero(draws[op.name])  # on the host: no wait for the device
    if not len(chosen):
        return
    index = send(chosen, x.device)
    part = x
    if len(chosen) < len(x):
        part = x.index_select(0, index)
        draws = {name: values[chosen] for name, values in draws.items()}
    # only for those that drew it: half a batch costs half
    x[index] = op.apply(part, draws)


def normalise_(x: Tensor, pixels: Pixels = PLAIN) -> Tensor:
    """Normalise `x` (N,C,H,W) in [0,1] in place, by ImageNet's mean and deviation unless told."""
    return x.sub_(constant(pixels.mean, x.device)).div_(constant(pixels.std, x.device))
