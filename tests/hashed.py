"""How the golden values were made: weights and images from an exact integer hash, and a small backbone."""

import numpy as np
import torch
from torch import Tensor, nn


class Trunk(nn.Module):
    """The goldens' backbone: conv 3x3 stride 2, batch norm, ReLU, global mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        return self.bn(self.conv(images)).relu().mean((2, 3))


def grad_norm(module: nn.Module) -> float:
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])))


def det(shape: tuple[int, ...], stream: int) -> Tensor:
    """The goldens' exact integer hash, in [-1, 1)."""
    mask = np.uint64(0xFFFFFFFF)
    h = (
        np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(2654435761)
        + np.uint64(stream * 40503 + 12345)
    ) & mask
    for shift, factor in ((15, 2246822519), (13, 3266489917)):
        h ^= h >> np.uint64(shift)
        h = (h * np.uint64(factor)) & mask
    h ^= h >> np.uint64(16)
    return torch.from_numpy(h.astype(np.float64) / 2.0**31 - 1.0).view(shape)


def fill(module: nn.Module, first_stream: int) -> None:
    for index, (name, parameter) in enumerate(module.named_parameters()):
        value = det(tuple(parameter.shape), first_stream + index)
        if parameter.ndim > 1:
            value = value / np.sqrt(np.prod(parameter.shape[1:]))
        else:
            value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
        parameter.data.copy_(value)


def checksum(module: nn.Module) -> tuple[float, float]:
    values = [p.detach().double() for p in module.parameters()]
    return sum(float(v.sum()) for v in values), sum(float(v.square().sum()) for v in values)
