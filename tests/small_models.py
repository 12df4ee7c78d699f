"""Small transformers for tests of weights: every option of timm's can be given too."""

from typing import Any

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer


def small_vit(**options: Any) -> VisionTransformer:
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 0,
    }
    return VisionTransformer(**{**settings, **options})


def small_swin(**options: Any) -> SwinTransformer:
    """Return a Swin of four stages whose windows of 4 fit every stage."""
    settings = {
        "img_size": 64,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
        "num_classes": 0,
    }
    return SwinTransformer(**{**settings, **options})
