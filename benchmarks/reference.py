"""The pipeline of torchvision and timm that a view stands for: one PIL image at a time, to compare with."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD, PhotometricOp, SpatialOp, View, view_size
from data.augment.crops import CenterCrop, RandomCropPad, RandomResizedCrop, Resize
from data.augment.ops import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomErasing,
    Solarize,
)
from data.augment.pipeline import view_interpolation
from data.augment.randaugment import RandAugment, rand_augmenter


def reference_transform(view: View) -> transforms.Compose:
    """Build the pipeline from PIL images to normalised (3,S,S) that `view` stands for.

    It draws from the global generators of torch, `random` and NumPy, as the originals do.
    """
    normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    before = [_reference_op(op, view) for op in view if not isinstance(op, RandomErasing)]
    after = [_reference_op(op, view) for op in view if isinstance(op, RandomErasing)]
    return transforms.Compose([*before, *normalise, *after])


def _reference_op(op: SpatialOp | PhotometricOp, view: View) -> Callable[[Any], Any]:
    modes = transforms.InterpolationMode
    match op:
        case RandomResizedCrop():
            return transforms.RandomResizedCrop(
                op.size, op.scale, op.ratio, modes(op.interpolation)
            )
        case Resize():
            return transforms.Resize(op.size, modes(op.interpolation))
        case CenterCrop():
            return transforms.CenterCrop(op.size)
        case RandomCropPad():
            return transforms.RandomCrop(op.size, padding=op.padding)
        case HorizontalFlip():
            return transforms.RandomHorizontalFlip(op.p)
        case ColorJitter():
            jitter = transforms.ColorJitter(op.brightness, op.contrast, op.saturation, op.hue)
            return transforms.RandomApply([jitter], op.p)
        case Grayscale():
            return transforms.RandomGrayscale(op.p)
        case GaussianBlur():
            return transforms.RandomApply([_PILBlur(op.sigma)], op.p)
        case Solarize():
            return transforms.RandomSolarize(op.threshold, op.p)
        case RandAugment():
            return rand_augmenter(op.config, view_size(view), view_interpolation(view))
        case RandomErasing():
            return _erasing(op.p)
    raise TypeError(f"torchvision and timm have no {type(op).__name__}")


def _erasing(p: float) -> Callable[[Any], Any]:
    from timm.data.random_erasing import RandomErasing as TimmErasing

    return TimmErasing(p, mode="pixel", max_count=1, num_splits=0, device="cpu")


class _PILBlur:
    """Blur a PIL image with radius = sigma, as every published pipeline of this family does."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(1).uniform_(*self.sigma))
        return image.filter(ImageFilter.GaussianBlur(radius=radius))
