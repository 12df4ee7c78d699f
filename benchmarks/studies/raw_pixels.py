"""The pixels themselves as features: what k-NN and probe reach without any backbone.

Example: python -m benchmarks.studies.raw_pixels --backbone timm/raw_pixels [more flags]

Runs main_linear.py, whose flags it takes, with a model of the name `raw_pixels` in timm's registry.
"""

import sys
from pathlib import Path

from timm.models import register_model
from torch import Tensor, nn, ones

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


class RawPixels(nn.Module):
    """Return the image as one row of numbers."""

    def __init__(self, img_size: int) -> None:
        super().__init__()
        self.num_features = 3 * img_size * img_size
        # a file of weights must hold something
        self.scale = nn.Parameter(ones(()), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return (N, 3 * H * W) of images (N, 3, H, W)."""
        return images.flatten(1) * self.scale


@register_model
def raw_pixels(img_size: int = 32, **_: object) -> RawPixels:
    """Build the model; timm gives every model more arguments than this one needs."""
    return RawPixels(img_size)


if __name__ == "__main__":
    import main_linear
    from utils.cli import run_main

    run_main(main_linear.main)
