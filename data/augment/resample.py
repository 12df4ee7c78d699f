"""Crop and resize a batch as two matrix products, blur it as two grouped convolutions."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # of the filters, in output pixels when shrinking
_CHUNK_BYTES = 1 << 22  # float32 work of one piece on a CPU: larger pieces fall out of its caches


def crop_resize(
    images: Tensor, boxes: np.ndarray, size: int | tuple[int, int], interpolation: str
) -> Tensor:
    """Cut `boxes` (N,4) from uint8 `images` (N,3,H,W) and resize them to uint8 (N,3,h,w).

    The filter is PIL's and torchvision's: an antialiased triangle or cubic (a = -0.5). Pixels
    outside the box are never read.
    """
    height, width = (size, size) if isinstance(size, int) else size
    box = torch.from_numpy(np.ascontiguousarray(boxes, dtype=np.float32))
    top, left, rows, cols = box.to(images.device, non_blocking=True).unbind(1)
    # Crop and resize are linear, so both are one matrix for each axis and image.
    by_column = box_weights(left, cols, images.shape[3], width, interpolation)
    by_row = box_weights(top, rows, images.shape[2], height, interpolation)
    length = chunk_length(images.device, *images.shape[1:])
    out = images.new_empty((*images.shape[:2], height, width))
    for start in range(0, len(images), length):
        part = slice(start, start + length)
        # Columns first and the levels rounded between the passes, as PIL does.
        levels = images[part].to(torch.float32).flatten(1, 2) @ by_column[part].transpose(1, 2)
        levels = levels.add_(0.5).floor_().clamp_(0, 255).unflatten(1, images.shape[1:3])
        resized = by_row[part].unsqueeze(1) @ levels
        out[part] = resized.add_(0.5).clamp_(0, 255)  # the cast to uint8 rounds down
    return out


def chunk_length(device: torch.device, *shape: int) -> int:
    """Return how many samples of `shape` to work on at once."""
    return max(1, _CHUNK_BYTES // (4 * int(np.prod(shape)))) if device.type == "cpu" else 1 << 30


def box_weights(
    start: Tensor, length: Tensor, source: int, target: int, interpolation: str
) -> Tensor:
    """Return resampling matrices (N,target,source) of intervals [start, start+length) (N,)."""
    scale = (length / target)[:, None, None]
    stretch = scale.clamp(min=1.0)  # the filter widens when shrinking: antialiasing
    pixel = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    centre = torch.arange(target, device=start.device, dtype=torch.float32)[:, None] + 0.5
    first = start[:, None, None]
    distance = (pixel - first - centre * scale).div_(stretch).abs_()
    weights = _triangle(distance) if interpolation == "bilinear" else _cubic(distance)
    # pixels outside the crop have no weight, so that the crop is as if cut out first
    inside = (pixel > first) & (pixel < first + length[:, None, None])
    weights *= inside
    return weights.div_(weights.sum(dim=2, keepdim=True))


def _triangle(distance: Tensor) -> Tensor:
    return distance.neg_().add_(1.0).clamp_(min=0.0)


def _cubic(distance: Tensor) -> Tensor:
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
    return torch.where(distance < 1.0, near, torch.where(distance < 2.0, far, 0.0))


def gaussian_blur(images: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur float images (N,C,H,W) with a Gaussian of `sigma` (N,) pixels, borders replicated.

    `max_sigma` bounds `sigma` and sets the kernel's width: four of it on each side.
    """
    reach = math.ceil(4.0 * max_sigma)
    taps = torch.arange(-reach, reach + 1, device=sigma.device, dtype=torch.float32)
    kernels = torch.exp(taps.square() * (-0.5 / sigma.square())[:, None])
    # a CPU is five times slower on denormal numbers
    kernels = torch.where(kernels > 1e-12, kernels, 0.0)
    # a blur keeps the brightness: the weights sum to 1
    kernels = (kernels / kernels.sum(dim=1, keepdim=True)).repeat_interleave(images.shape[1], dim=0)
    # One group per channel of every sample: each has its own kernel.
    x = F.pad(images.flatten(0, 1)[None], [reach] * 4, mode="replicate")
    # A Gaussian is separable: rows, then columns.
    x = F.conv2d(x, kernels[:, None, None, :], groups=len(kernels))
    return F.conv2d(x, kernels[:, None, :, None], groups=len(kernels)).view_as(images)


@functools.lru_cache  # a copy at each batch would wait for the device
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return per-channel constants (C,1,1)."""
    return torch.tensor(values, device=device)[:, None, None]
