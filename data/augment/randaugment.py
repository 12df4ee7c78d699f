"""timm's RandAugment on one uint8 crop, drawn from the sample's key."""

import contextlib
import functools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from data.augment.base import IMAGENET_MEAN, HostOp
from utils.randomness import stream_keys

RAND_AUGMENT = 700  # the stream that seeds timm's generators

_RAND_SECTION = re.compile(
    r"m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0*)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)"
)


@dataclass(frozen=True)
class RandAugment(HostOp):
    """Run timm's RandAugment on the uint8 crop; `config` is timm's text, "rand-m9-mstd0.5-inc1"."""

    streams: ClassVar[tuple[int, ...]] = (RAND_AUGMENT,)
    config: str

    def __post_init__(self) -> None:
        """Refuse what timm would drop or fail on without a hint."""
        first, *sections = self.config.split("-")
        wrong = [section for section in sections if not _RAND_SECTION.fullmatch(section)]
        if first != "rand" or wrong:
            raise ValueError(
                f"RandAugment {self.config!r}: {(wrong or [first])[0]!r} is not understood; use "
                "timm's form, rand-m9-mstd0.5-inc1 (m magnitude, n operations, p probability, "
                "mstd, mmax, inc)"
            )

    def on_host(self, crop: Tensor, key: np.ndarray, interpolation: str) -> Tensor:
        """Run timm's transform with global generators that the sample's key seeds."""
        augment = rand_augmenter(self.config, crop.shape[-1], interpolation)
        image = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
        # timm draws from the global generators of Python and NumPy
        with seeded_globals(int(stream_keys(key, RAND_AUGMENT)[0])):
            image = augment(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@functools.lru_cache
def rand_augmenter(
    config: str, size: int, interpolation: str
) -> Callable[[Image.Image], Image.Image]:
    """Build timm's transform with the settings of its `create_transform`."""
    # as timm sets them: shifts of at most 45 % of the side, ImageNet's mean where nothing is left
    hparams = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN),
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    transform = rand_augment_transform(config, hparams)
    # Only that operation is wrapped: the draws of timm stay as they are.
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = functools.partial(_posterize, op.aug_fn)
    return transform


def _posterize(
    original: Callable[..., Image.Image], image: Image.Image, bits: int, **options: object
) -> Image.Image:
    """Keep `bits` of each level; 0 gives black."""
    # timm asks for 0 bits at one end of its magnitudes, which Pillow 13 refuses
    if bits < 1:
        return Image.new(image.mode, image.size)
    return original(image, bits, **options)


@contextlib.contextmanager
def seeded_numpy(seed: int | list[int]) -> Iterator[None]:
    """Seed NumPy's global generator and restore it afterwards."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def seeded_globals(seed: int) -> Iterator[None]:
    """Seed `random` and NumPy's global generator, and restore both; for one thread only."""
    # restored, so that nothing else in the process notices
    python = random.getstate()
    random.seed(seed)
    try:
        with seeded_numpy([seed & 0xFFFFFFFF, seed >> 32]):  # it takes words of 32 bits
            yield
    finally:
        random.setstate(python)
