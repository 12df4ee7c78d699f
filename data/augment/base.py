"""What an operation is and what a view is: a tuple of operations, spatial ones first.

docs/augmentation.md shows how to add an operation.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor

from utils.randomness import hashed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Draws: TypeAlias = dict[str, np.ndarray]  # arrays whose first dimension is the sample

Box: TypeAlias = Sequence[int] | np.ndarray  # top, left, height, width

_COPY_SHIFT = np.uint64(40)  # a sample's index takes fewer bits


class Operation:
    """One step of a view: a frozen dataclass of its parameters.

    `streams` numbers its random draws. A number belongs to a draw and not to a place in the view,
    so moving an operation does not change its draws. Two operations of a view may not share a
    number.
    """

    streams: ClassVar[tuple[int, ...]] = ()


@dataclass(frozen=True)
class SpatialOp(Operation, ABC):
    """An operation that changes the image's size, to `size` x `size` unless it says otherwise."""

    size: int

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) that an image of (height, width) gets."""
        return self.size, self.size

    def draw(self, keys: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray | None:
        """Draw boxes (N,4) int64 (top, left, height, width); None if not random."""
        return None

    @abstractmethod
    def on_batch(self, images: Tensor, boxes: np.ndarray | None) -> Tensor:
        """Apply to equally large uint8 images (N,3,H,W), `boxes` as drawn."""

    @abstractmethod
    def on_image(self, image: Tensor, box: Box | None) -> Tensor:
        """Apply to one uint8 image (3,H,W), `box` as drawn."""


class PhotometricOp(Operation):
    """An operation that keeps the image's size."""


class BatchOp(PhotometricOp, ABC):
    """An operation on a batch of float images, where the network runs.

    `name` is the draw (N,) of bool that says which samples the operation changes.
    """

    name: ClassVar[str]
    after_normalisation: ClassVar[bool] = False  # else it gets levels in [0,1]

    @abstractmethod
    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw all parameters for samples `keys` (N,) of images of `size` pixels; `name` is one."""

    @abstractmethod
    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Return the changed images; `x` (M,3,S,S) and `draws` are of the chosen samples."""


class HostOp(PhotometricOp, ABC):
    """An operation on one uint8 crop, in the process that read the image."""

    @abstractmethod
    def on_host(self, crop: Tensor, key: np.ndarray, interpolation: str) -> Tensor:
        """Return the changed crop (3,S,S); `key` (1,) is the sample's."""


View: TypeAlias = tuple[SpatialOp | PhotometricOp, ...]
Recipe: TypeAlias = tuple[View, ...]


def sample_keys(
    seed: int, epoch: int, indices: np.ndarray, view: int, copies: np.ndarray | int = 0
) -> np.ndarray:
    """Return the uint64 keys (N,) of samples `indices` (N,) in `epoch` for view number `view`.

    `copies` (N,) tells the repetitions of a sample in an epoch apart; copy 0 has the key of a
    sample that is not repeated.
    """
    numbered = np.asarray(copies, dtype=np.uint64) << _COPY_SHIFT
    numbered = numbered + np.asarray(indices, dtype=np.uint64)
    return hashed(numbered, "view", seed, epoch, view)


def send(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy a host array to `device` without waiting for it; floats become float32."""
    tensor = torch.from_numpy(values.astype(np.float32) if values.dtype.kind == "f" else values)
    if device.type == "cuda":  # only from pinned memory a copy runs beside the host
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def spatial_ops(view: View) -> tuple[SpatialOp, ...]:
    """Return the leading operations that change the image's size."""
    return tuple(op for op in view if isinstance(op, SpatialOp))


def photometric_ops(view: View) -> tuple[PhotometricOp, ...]:
    """Return the operations that keep the image's size, in order."""
    return tuple(op for op in view if isinstance(op, PhotometricOp))


def host_ops(view: View) -> tuple[PhotometricOp, ...]:
    """Return the operations that run on one crop where it was read: those up to the last HostOp."""
    # A flip before RandAugment stays before it: shear is anchored at a corner, so flipping
    # afterwards changes the distribution. A flip without RandAugment runs on the batch.
    ops = photometric_ops(view)
    last = 0
    for place, op in enumerate(ops, start=1):
        if not isinstance(op, BatchOp):
            last = place
    return ops[:last]


def device_ops(view: View) -> tuple[BatchOp, ...]:
    """Return the operations that run on a batch: all that keep the size but those of `host_ops`."""
    rest = photometric_ops(view)[len(host_ops(view)) :]
    return tuple(op for op in rest if isinstance(op, BatchOp))  # host_ops has taken all others


def view_size(view: View) -> int:
    """Return the side in pixels of the images that `view` makes."""
    return spatial_ops(view)[-1].size


def is_random(recipe: Recipe) -> bool:
    """Tell whether any operation of the recipe draws random numbers."""
    return any(op.streams for view in recipe for op in view)


def needs_pil(recipe: Recipe) -> bool:
    """Tell whether any view has operations that run on single images on the host."""
    return any(host_ops(view) for view in recipe)
