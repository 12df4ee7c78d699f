"""Batched augmentation on any device: the drawn parameters are applied to a whole batch at once.

Everything random was drawn before (`parameters.py`); these functions are deterministic. Samples that an
operation does not touch are not computed: the host knows their indices, so this costs no synchronisation.
"""

import functools
import importlib.util
import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment.parameters import JITTER_OPS, Draws
from data.augment.recipes import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    PhotometricOp,
    RandomCropPad,
    RandomErasing,
    RandomResizedCrop,
    Resize,
    Solarize,
    View,
    device_ops,
    spatial_ops,
)
from data.augment.resample import chunk_length, crop_resize, gaussian_blur
from utils.randomness import keyed_normal

logger = logging.getLogger("synco")

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in torchvision


def photometric(images: Tensor, view: View, draws: Draws, backend: str = "auto") -> Tensor:
    """Apply the batched operations of `view` and normalise: uint8 (N,3,S,S) -> float32 (N,3,S,S).

    What a view does on the host (`host_ops`) was done where the image was read. `draws` come from
    `draw_photometric`; values stay in [0,1] between operations. `backend` is that of `choose_backend`: both
    agree to 1e-4 but where a level meets the threshold of Solarize.
    """
    ops = device_ops(view)
    work = tuple(op for op in ops if not isinstance(op, RandomErasing))
    fused = bool(work) and choose_backend(backend, images.device) == "fused"
    x = (_fused if fused else _in_chunks)(images, work, draws)
    return erase_(x, draws) if len(work) < len(ops) else x


def choose_backend(backend: str, device: torch.device) -> str:
    """Return "fused" (compiled by numba for a CPU, by Triton for a GPU) or "torch".

    "auto" is "fused" on a CPU that has numba, else "torch": the kernels for a GPU have been interpreted and
    compiled, but not yet run on one. A ValueError where "fused" is asked for and cannot run.
    """
    if backend == "torch" or (backend == "auto" and device.type != "cpu"):
        return "torch"
    package = {"cpu": "numba", "cuda": "triton"}.get(device.type)
    if package is None:
        raise ValueError(f"AUG.BACKEND 'fused' runs on a CPU or a GPU, not on {device}: use 'torch'")
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
        logger.info("%s is not installed: the augmentation is several times slower without it", package)
    return found


def _fused(images: Tensor, ops: tuple[PhotometricOp, ...], draws: Draws) -> Tensor:
    if images.device.type == "cpu":
        from data.augment.fused.cpu import fused_photometric

        return fused_photometric(images, ops, draws)
    from data.augment.fused.gpu import can_run
    from data.augment.fused.gpu import fused_photometric as fused_on_gpu

    return (fused_on_gpu if can_run(ops) else _in_chunks)(images, ops, draws)


def _in_chunks(images: Tensor, ops: tuple[PhotometricOp, ...], draws: Draws) -> Tensor:
    length = chunk_length(images.device, *images.shape[1:])
    if len(images) <= length:
        return _photometric(images, ops, draws)
    parts = [slice(start, start + length) for start in range(0, len(images), length)]
    return torch.cat([_photometric(images[p], ops, {k: v[p] for k, v in draws.items()}) for p in parts])


def _photometric(images: Tensor, ops: tuple[PhotometricOp, ...], draws: Draws) -> Tensor:
    x = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255.0)
    for op in ops:
        _apply(op, x, draws)
    return normalise_(x)


def erase_(x: Tensor, draws: Draws) -> Tensor:
    """Put normal noise into the drawn rectangles of normalised images `x` (N,3,S,S), in place."""
    chosen = np.flatnonzero(draws["erase"])
    if not len(chosen):
        return x
    index = send(chosen, x.device)
    top, left, height, width = send(draws["erase_box"][chosen], x.device)[:, :, None].unbind(1)
    row, col = (torch.arange(side, device=x.device) for side in x.shape[-2:])
    rows, cols = ((row >= top) & (row < top + height), (col >= left) & (col < left + width))
    noise = keyed_normal(send(draws["erase_key"][chosen].view(np.int64), x.device), tuple(x.shape[1:]))
    inside = (rows[:, :, None] & cols[:, None, :])[:, None]
    return x.index_copy_(0, index, torch.where(inside, noise, x.index_select(0, index)))


def normalise_(x: Tensor) -> Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation, in place; `x` (N,3,H,W) in [0,1]."""
    return x.sub_(_constant(IMAGENET_MEAN, x.device)).div_(_constant(IMAGENET_STD, x.device))


def _apply(op: PhotometricOp, x: Tensor, draws: Draws) -> None:
    """Apply one operation in place to the samples of `x` (N,3,S,S) that drew it."""
    name = _MASKS[type(op)]
    chosen = np.flatnonzero(draws[name])
    if not len(chosen):
        return
    index = send(chosen, x.device)
    part = x if len(chosen) == len(x) else x.index_select(0, index)
    match op:
        case HorizontalFlip():
            part = part.flip(-1)
        case ColorJitter():
            part = color_jitter(part, {name: draws[name][chosen] for name in ("order", *JITTER_OPS)})
        case Grayscale():
            part = luma(part).expand_as(part)
        case GaussianBlur():
            part = gaussian_blur(part, send(draws["sigma"][chosen], x.device), op.sigma[1])
        case Solarize():
            part = part.lerp(1.0 - part, (part >= op.threshold / 255).to(part.dtype))
    x[index] = part


_MASKS: dict[type, str] = {
    HorizontalFlip: "flip",
    ColorJitter: "jitter",
    Grayscale: "gray",
    GaussianBlur: "blur",
    Solarize: "solarize",
}


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to `device` without waiting for it; floats become float32."""
    tensor = torch.from_numpy(values.astype(np.float32) if values.dtype.kind == "f" else values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def luma(x: Tensor) -> Tensor:
    """Return the grey image (N,1,H,W) of RGB `x` (N,3,H,W)."""
    red, green, blue = x.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).unsqueeze(1)


def color_jitter(x: Tensor, draws: Draws) -> Tensor:
    """Apply brightness, contrast, saturation and hue to every sample of `x` (N,3,S,S) in its own order.

    The samples are sorted by the place of hue in their order and aligned on it: three slots before it and
    three after, in each of which a contiguous part of the batch is active.
    """
    hue_place = np.argmax(draws["order"] == _HUE, axis=1)
    ranking = np.argsort(-hue_place, kind="stable")
    before = [
        int((hue_place > slot).sum()) for slot in (2, 1, 0)
    ]  # samples with 3, 2, 1 operations before hue
    factors = send(_slot_factors({name: values[ranking] for name, values in draws.items()}), x.device)
    index = send(ranking, x.device)
    y = x.index_select(0, index)
    for slot, count in enumerate(before):
        _affine_(y[:count], factors[slot, :, :count])
    if np.any(draws["hue"]):
        y = adjust_hue(y, send(draws["hue"][ranking], x.device))
    for slot, count in enumerate(before, start=3):
        _affine_(y[count:], factors[slot, :, count:])
    return torch.empty_like(y).index_copy_(0, index, y)


_HUE = JITTER_OPS.index("hue")


def _slot_factors(draws: Draws) -> np.ndarray:
    """Return (6,3,N): each slot's factors of the image, of its grey image and of the grey image's mean.

    `clamp(f*x + s*gray + c*mean(gray))` is brightness (s = c = 0), contrast (c = 1-f), saturation (s = 1-f).
    """
    order = draws["order"]
    count, places = order.shape
    kinds = np.full((count, 2 * places - 1), _HUE)
    shift = places - 1 - np.argmax(order == _HUE, axis=1)
    kinds[np.arange(count)[:, None], shift[:, None] + np.arange(places)] = order
    kinds = np.delete(kinds, places - 1, axis=1).T
    factor = np.select([kinds == k for k in range(_HUE)], [draws[name] for name in JITTER_OPS[:_HUE]], 1.0)
    contrast, saturation = (kinds == JITTER_OPS.index(name) for name in ("contrast", "saturation"))
    return np.stack([factor, (1.0 - factor) * saturation, (1.0 - factor) * contrast], axis=1)


def _affine_(x: Tensor, factors: Tensor) -> None:
    """Turn `x` (N,3,S,S) into clamp(f*x + s*luma(x) + c*mean(luma(x))) in place, `factors` f, s, c (3,N)."""
    if not len(x):
        return
    scale, grey, mean = factors[:, :, None, None, None]
    offset = luma(x)
    average = offset.mean(dim=(2, 3), keepdim=True).mul_(mean)
    x.mul_(scale).add_(offset.mul_(grey).add_(average)).clamp_(0.0, 1.0)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of RGB `x` (N,3,H,W) in [0,1] by `shift` (N,) turns, exactly through HSV.

    With the hue in sextants, channel = value - chroma * clamp(2 - |r|, 0, 1) where r = hue + (3 | 1 | -1)
    wrapped to [-3, 3]. In-place arithmetic instead of comparisons: masks are several times slower on a CPU.
    """
    red, green, blue = x.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    inverse = chroma.clamp(min=1e-8).reciprocal_()  # the hue of grey pixels does not matter
    if_blue = (red - green).mul_(inverse).add_(4.0)
    if_green = (blue - red).mul_(inverse).add_(2.0)
    hue = (green - blue).mul_(inverse)
    if_green.lerp_(if_blue, (value - green).sign_())  # weight 0 where green is the largest, else 1
    hue.lerp_(if_green, (value - red).sign_()).add_(6.0 * shift[:, None, None])
    turned = hue[:, None] + _constant((3.0, 1.0, -1.0), x.device)
    turned.sub_((turned * (1 / 6)).round_(), alpha=6.0).abs_().neg_().add_(2.0).clamp_(0.0, 1.0)
    return torch.sub(value[:, None], turned.mul_(chroma[:, None]), out=turned)


@functools.lru_cache
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return per-channel constants (C,1,1) on `device`; cached, because a copy would wait for the device."""
    return torch.tensor(values, device=device)[:, None, None]


def spatial(images: Tensor, view: View, boxes: np.ndarray | None) -> Tensor:
    """Run the crop and resize operations of `view` on equally large images: uint8 (N,3,H,W) -> (N,3,S,S).

    `boxes` (N,4) are the drawn windows of a random crop, None where there is none.
    """
    for op in spatial_ops(view):
        match op:
            case RandomResizedCrop():
                assert boxes is not None
                images = crop_resize(images, boxes, op.size, op.interpolation)
            case Resize():
                images = _resize(images, op)
            case CenterCrop():
                images = center_crop(images, op.size)
            case RandomCropPad():
                assert boxes is not None
                images = shift_crop(images, boxes, op)
    return images


def _resize(images: Tensor, op: Resize) -> Tensor:
    height, width = images.shape[-2:]
    size = resized_shape(height, width, op)
    if size == (height, width):
        return images
    whole = np.tile(np.array([[0, 0, height, width]]), (len(images), 1))
    return crop_resize(images, whole, size, op.interpolation)


def shift_crop(images: Tensor, boxes: np.ndarray, op: RandomCropPad) -> Tensor:
    """Cut the windows `boxes` (N,4) out of uint8 images (N,3,H,W) with black around them: (N,3,S,S)."""
    padded = F.pad(images, [op.padding] * 4)
    corner = send(np.ascontiguousarray(boxes[:, :2]), images.device)
    side = torch.arange(op.size, device=images.device)
    row, col = (corner[:, :1] + side)[:, None, :, None], (corner[:, 1:] + side)[:, None, None, :]
    sample, channel = (torch.arange(n, device=images.device) for n in padded.shape[:2])
    return padded[sample[:, None, None, None], channel[None, :, None, None], row, col]


def resized_shape(height: int, width: int, op: Resize) -> tuple[int, int]:
    """Return the (height, width) that `op` gives an image, rounded down as in torchvision."""
    if height <= width:
        return op.size, int(op.size * width / height)
    return int(op.size * height / width), op.size


def center_crop(images: Tensor, size: int) -> Tensor:
    """Cut the central `size` x `size` window of (..., H, W), rounded as in torchvision."""
    top, left = (round((length - size) / 2.0) for length in images.shape[-2:])
    return images[..., top : top + size, left : left + size]
