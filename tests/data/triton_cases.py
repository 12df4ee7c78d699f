"""Run the GPU's kernels in Triton's interpreter: python triton_cases.py FILE, with TRITON_INTERPRET=1 set.

FILE gets {case: what the kernels made of it}; `CASES`, `images` and `drawn` are for the test as
well.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.augment.base import Draws, PhotometricOp, device_ops, sample_keys
from data.augment.ops import (
    JITTER_OPS,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Solarize,
)
from data.augment.pipeline import draw_photometric
from data.augment.recipes import RECIPES, build_recipe

COUNT, HEIGHT, WIDTH, BLOCK = 5, 21, 26, 512  # two blocks, the last not full
_JITTER = ColorJitter(0.9, 0.9, 0.9, 0.5, p=1.0)
CASES: dict[str, tuple[PhotometricOp, ...]] = {
    **{
        name: ops
        for ops, name in {
            device_ops(view): f"{name} {number}"
            for name in RECIPES
            for number, view in enumerate(build_recipe(name, HEIGHT))
        }.items()
    },
    "flip": (HorizontalFlip(1.0),),
    "jitter": (_JITTER,),
    "jitter, all contrast last": (_JITTER,),
    "jitter, all hue first": (_JITTER,),
    "grey": (Grayscale(1.0),),
    "solarize": (Solarize(37, 1.0),),
    "blur of little": (GaussianBlur((0.05, 0.2), p=1.0),),
    "blur beyond the border": (GaussianBlur((6.0, 9.0), p=0.7),),
    "blur, solarize, grey": (GaussianBlur(p=1.0), Solarize(128, 0.5), Grayscale(0.5)),
}
_ORDERS = {"jitter, all contrast last": (3, 0, 2, 1), "jitter, all hue first": (3, 1, 0, 2)}


def images(case: str) -> Tensor:
    """Return uint8 (COUNT,3,HEIGHT,WIDTH), of every second case channels last."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand((COUNT, 3, 5, 6), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
    noisy = (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)
    levels = (noisy * 255).to(torch.uint8)
    if list(CASES).index(case) % 2:
        return levels.contiguous(memory_format=torch.channels_last)
    return levels


def drawn(case: str) -> Draws:
    """Return the draws of a case."""
    keys = sample_keys(3, 0, np.arange(COUNT), list(CASES).index(case))
    draws = draw_photometric(CASES[case], keys)
    if case in _ORDERS:
        draws["order"] = np.tile(_ORDERS[case], (COUNT, 1))
        for name, value in zip(JITTER_OPS, (1.9, 0.2, 1.8, -0.4), strict=True):
            draws[name] = np.full(COUNT, value)
    return draws


def main(file: Path) -> None:
    """Run all cases."""
    from data.augment.fused import gpu as fused_cuda

    fused_cuda.BLOCK = BLOCK
    torch.save(
        {case: fused_cuda.run_on_gpu(images(case), CASES[case], drawn(case)) for case in CASES},
        file,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
