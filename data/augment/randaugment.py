"""timm's RandAugment on one uint8 crop, drawn from the sample's key."""

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.augment.parameters import RAND_AUGMENT, draw_photometric
from data.augment.recipes import (
    IMAGENET_MEAN,
    HorizontalFlip,
    RandAugment,
    RandomResizedCrop,
    Resize,
    View,
    host_ops,
    spatial_ops,
    view_size,
)
from utils.randomness import stream_keys


def host_augment(crop: Tensor, view: View, key: np.ndarray) -> Tensor:
    """Run the operations of `view` up to RandAugment on a uint8 crop (3,S,S); `key` (1,) is the sample's."""
    for op in host_ops(view):
        if isinstance(op, HorizontalFlip) and draw_photometric((op,), key)["flip"][0]:
            crop = crop.flip(-1)
        elif isinstance(op, RandAugment):
            augment = rand_augmenter(op.config, view_size(view), view_interpolation(view))
            image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
            with seeded_globals(int(stream_keys(key, RAND_AUGMENT)[0])):
                image = augment(image)
            crop = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return crop


@functools.lru_cache
def rand_augmenter(config: str, size: int, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """Build timm's transform with the settings of its `create_transform`: shifts and grey by the image."""
    from timm.data.auto_augment import rand_augment_transform

    hparams = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    transform = rand_augment_transform(config, hparams)
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = functools.partial(_posterize, op.aug_fn)
    return transform


def _posterize(
    original: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any
) -> Image.Image:
    """Return black where timm asks for 0 bits, as Pillow did before 12: it now raises an error."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return original(image, bits, **options)


def view_interpolation(view: View) -> str:
    """Return how the view's crop is resized, which is also how RandAugment turns and shears."""
    resizing = [op for op in spatial_ops(view) if isinstance(op, RandomResizedCrop | Resize)]
    return resizing[0].interpolation if resizing else "bicubic"


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed `random` and NumPy's global generator, which timm draws from, and put both back afterwards.

    Nothing else in the process notices; only for code that runs in one thread.
    """
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
