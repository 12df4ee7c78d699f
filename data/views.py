"""View recipes as data: what is done to an image, in which order, with which parameters.

One recipe drives the batched pipeline (`data.augment`), the reference pipeline of torchvision and the docs.
"""

import difflib
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from PIL import Image, ImageFilter
from torchvision import transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_IMAGE = 96  # up to this size an evaluation image is resized straight to the input size


@dataclass(frozen=True)
class RandomResizedCrop:
    """Crop a random area and aspect ratio, resize it to `size` with antialiasing."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Resize:
    """Resize the shorter side to `size`."""

    size: int
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class CenterCrop:
    """Keep the central `size` x `size` window."""

    size: int


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirror left-right with probability `p`."""

    p: float = 0.5


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue in random order, all of them with probability `p`."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float


@dataclass(frozen=True)
class Grayscale:
    """Replace all channels by the luma with probability `p`."""

    p: float = 0.2


@dataclass(frozen=True)
class GaussianBlur:
    """Blur with a Gaussian of standard deviation U(`sigma`) pixels, with probability `p`."""

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5


@dataclass(frozen=True)
class Solarize:
    """Invert the levels from `threshold` (0 to 255) on, with probability `p`."""

    threshold: int = 128
    p: float = 0.2


SpatialOp: TypeAlias = RandomResizedCrop | Resize | CenterCrop
PhotometricOp: TypeAlias = HorizontalFlip | ColorJitter | Grayscale | GaussianBlur | Solarize
View: TypeAlias = tuple[SpatialOp | PhotometricOp, ...]
Recipe: TypeAlias = tuple[View, ...]


def spatial_ops(view: View) -> tuple[SpatialOp, ...]:
    """Return the leading operations that change the image's size."""
    return tuple(op for op in view if isinstance(op, SpatialOp))


def photometric_ops(view: View) -> tuple[PhotometricOp, ...]:
    """Return the operations that keep the image's size, in order."""
    return tuple(op for op in view if isinstance(op, PhotometricOp))


def check_view(view: View) -> None:
    """Refuse a view that the batched pipeline cannot run: bad order, or an operation used twice."""
    spatial = spatial_ops(view)
    if view[: len(spatial)] != spatial:
        raise ValueError(f"view {view}: crop and resize must come before all other operations")
    shapes = {(RandomResizedCrop,), (Resize,), (Resize, CenterCrop)}
    if tuple(type(op) for op in spatial) not in shapes:
        raise ValueError(f"view {view}: must start with RandomResizedCrop, Resize, or Resize + CenterCrop")
    if len({type(op) for op in view}) != len(view):
        raise ValueError(f"view {view}: each kind of operation may appear only once")


def view_size(view: View) -> int:
    """Return the side in pixels of the images that `view` makes."""
    return spatial_ops(view)[-1].size


def is_random(recipe: Recipe) -> bool:
    """Tell whether any operation of the recipe draws random numbers."""
    return any(
        isinstance(op, RandomResizedCrop) or isinstance(op, PhotometricOp) for view in recipe for op in view
    )


def _moco_v1(size: int) -> Recipe:
    view = (
        RandomResizedCrop(size, (0.2, 1.0)),
        Grayscale(),
        ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0),
        HorizontalFlip(),
    )
    return (view, view)


def _moco_v2(size: int) -> Recipe:
    crop = RandomResizedCrop(size, (0.2, 1.0))
    view = (crop, ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(), GaussianBlur(), HorizontalFlip())
    return (view, view)


def _simclr(size: int) -> Recipe:
    crop = RandomResizedCrop(size, (0.2, 1.0))
    view = (crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(), GaussianBlur())
    return (view, view)


def _byol(size: int) -> Recipe:
    base = (RandomResizedCrop(size), HorizontalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale())
    return ((*base, GaussianBlur(p=1.0)), (*base, GaussianBlur(p=0.1), Solarize()))


def _mocov3(size: int) -> Recipe:
    base = (RandomResizedCrop(size), ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale())
    return (
        (*base, GaussianBlur(p=1.0), HorizontalFlip()),
        (*base, GaussianBlur(p=0.1), Solarize(), HorizontalFlip()),
    )


def _sit(size: int) -> Recipe:
    crop = RandomResizedCrop(size, interpolation="bicubic")
    view = (crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0))
    return (view, view)


def _cifar(size: int) -> Recipe:
    crop = RandomResizedCrop(size, (0.2, 1.0))
    view = (crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale())
    return (view, view)


def _digits(size: int) -> Recipe:
    """No flip, no colour: mirrored digits are other digits, and grey; wider or narrower ones are the same."""
    crop = RandomResizedCrop(size, (0.5, 1.0), ratio=(2 / 3, 3 / 2))
    view = (crop, ColorJitter(0.4, 0.4, 0.0, 0.0, p=0.8), GaussianBlur((0.1, 1.0), p=0.2))
    return (view, view)


def _linear(size: int) -> Recipe:
    return ((RandomResizedCrop(size), HorizontalFlip()),)


def _eval(size: int) -> Recipe:
    if size <= SMALL_IMAGE:
        return ((Resize(size), CenterCrop(size)),)
    return ((Resize(size + 32), CenterCrop(size)),)


RECIPES = {
    "moco_v1": _moco_v1,
    "moco_v2": _moco_v2,
    "simclr": _simclr,
    "byol": _byol,
    "mocov3": _mocov3,
    "sit": _sit,
    "cifar": _cifar,
    "digits": _digits,
    "linear": _linear,
    "eval": _eval,
}


def build_recipe(name: str, img_size: int, crop_min: float | None = None) -> Recipe:
    """Return the recipe called `name` for `img_size` pixels; `crop_min` replaces the smallest crop area."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"AUG.RECIPE {name!r} is unknown; did you mean {near!r}? Known: {', '.join(RECIPES)}"
        )
    if img_size < 1:
        raise ValueError(f"DATA.IMG_SIZE {img_size} must be at least 1")
    recipe = RECIPES[name](img_size)
    return recipe if crop_min is None else _with_crop_min(recipe, name, crop_min)


def _with_crop_min(recipe: Recipe, name: str, crop_min: float) -> Recipe:
    if not 0 < crop_min <= 1:
        raise ValueError(f"AUG.CROP_MIN {crop_min} must be in (0, 1]")
    if not all(isinstance(view[0], RandomResizedCrop) for view in recipe):
        raise ValueError(
            f"AUG.CROP_MIN {crop_min} has no effect: recipe {name!r} has no random crop; unset it"
        )
    return tuple(
        tuple(replace(op, scale=(crop_min, 1.0)) if isinstance(op, RandomResizedCrop) else op for op in view)
        for view in recipe
    )


class _PILBlur:
    """Blur a PIL image with radius = sigma, as every published pipeline of this family does."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(1).uniform_(*self.sigma))
        return image.filter(ImageFilter.GaussianBlur(radius=radius))


def _reference_op(op: SpatialOp | PhotometricOp) -> object:
    modes = transforms.InterpolationMode
    match op:
        case RandomResizedCrop():
            return transforms.RandomResizedCrop(op.size, op.scale, op.ratio, modes(op.interpolation))
        case Resize():
            return transforms.Resize(op.size, modes(op.interpolation))
        case CenterCrop():
            return transforms.CenterCrop(op.size)
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


def reference_transform(view: View) -> transforms.Compose:
    """Build the torchvision pipeline from PIL images to normalised (3,S,S) that `view` stands for."""
    end = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return transforms.Compose([*(_reference_op(op) for op in view), *end])
