"""View recipes as data: what is done to an image, in which order, with which parameters.

One recipe drives the batched pipeline (`data.augment.ops`), the pipeline of torchvision and timm
(`data.augment.reference`) and the docs.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import TypeAlias

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SMALL_IMAGE = 96  # up to this size an evaluation image is resized straight to the input size
TINY_IMAGE = 32  # up to this size fine-tuning shifts the image and does not scale it (DeiT, SiT)


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
class RandomCropPad:
    """Cut a random `size` x `size` window out of the image with `padding` black pixels around it."""

    size: int
    padding: int = 4


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


@dataclass(frozen=True)
class RandAugment:
    """Run timm's RandAugment on the uint8 crop; `config` is timm's text, "rand-m9-mstd0.5-inc1"."""

    config: str


@dataclass(frozen=True)
class RandomErasing:
    """Replace a random rectangle of the normalised image by normal noise, with probability `p`.

    Zhong et al. 2020, "Random erasing data augmentation", in timm's mode "pixel": area U(0.02, 1/3) of the
    image, aspect ratio log-uniform in [0.3, 1/0.3], one rectangle.
    """

    p: float = 0.25


SpatialOp: TypeAlias = RandomResizedCrop | Resize | CenterCrop | RandomCropPad
PhotometricOp: TypeAlias = (
    HorizontalFlip | ColorJitter | Grayscale | GaussianBlur | Solarize | RandAugment | RandomErasing
)
View: TypeAlias = tuple[SpatialOp | PhotometricOp, ...]
Recipe: TypeAlias = tuple[View, ...]


def spatial_ops(view: View) -> tuple[SpatialOp, ...]:
    """Return the leading operations that change the image's size."""
    return tuple(op for op in view if isinstance(op, SpatialOp))


def photometric_ops(view: View) -> tuple[PhotometricOp, ...]:
    """Return the operations that keep the image's size, in order."""
    return tuple(op for op in view if isinstance(op, PhotometricOp))


def host_ops(view: View) -> tuple[PhotometricOp, ...]:
    """Return the operations that run on one uint8 crop where it was read: those up to RandAugment.

    A flip before RandAugment stays before it: shears turn about a corner, so flipping later is another law.
    """
    ops = photometric_ops(view)
    last = max((place for place, op in enumerate(ops, start=1) if isinstance(op, RandAugment)), default=0)
    return ops[:last]


def device_ops(view: View) -> tuple[PhotometricOp, ...]:
    """Return the operations that run on a batch: all that keep the size but those of `host_ops`."""
    return photometric_ops(view)[len(host_ops(view)) :]


_SHAPES = ((RandomResizedCrop,), (Resize,), (Resize, CenterCrop), (RandomCropPad,), (Resize, RandomCropPad))
_RAND_SECTION = re.compile(
    r"m\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0*)?)|mstd\d+(\.\d+)?|mmax\d+|inc[01]|t(weights|3aw?)"
)


def check_view(view: View) -> None:
    """Refuse a view that the batched pipeline cannot run: bad order, or an operation used twice."""
    spatial = spatial_ops(view)
    if view[: len(spatial)] != spatial:
        raise ValueError(f"view {view}: crop and resize must come before all other operations")
    if tuple(type(op) for op in spatial) not in _SHAPES:
        names = ", ".join(" + ".join(op.__name__ for op in shape) for shape in _SHAPES)
        raise ValueError(f"view {view}: must start with one of {names}")
    if len({type(op) for op in view}) != len(view):
        raise ValueError(f"view {view}: each kind of operation may appear only once")
    if not {type(op) for op in host_ops(view)} <= {HorizontalFlip, RandAugment}:
        raise ValueError(f"view {view}: only a flip may come between the crop and RandAugment")
    if any(isinstance(op, RandomErasing) for op in view[:-1]):
        raise ValueError(f"view {view}: RandomErasing must come last, after the normalisation")
    for op in view:
        if isinstance(op, RandAugment):
            _check_rand_config(op.config)


def _check_rand_config(config: str) -> None:
    """Refuse what timm would drop or fail on without a hint."""
    first, *sections = config.split("-")
    wrong = [section for section in sections if not _RAND_SECTION.fullmatch(section)]
    if first != "rand" or wrong:
        raise ValueError(
            f"RandAugment {config!r}: {(wrong or [first])[0]!r} is not understood; use timm's form, "
            "rand-m9-mstd0.5-inc1 (m magnitude, n operations, p probability, mstd, mmax, inc)"
        )


def view_size(view: View) -> int:
    """Return the side in pixels of the images that `view` makes."""
    return spatial_ops(view)[-1].size


def is_random(recipe: Recipe) -> bool:
    """Tell whether any operation of the recipe draws random numbers."""
    return any(
        isinstance(op, RandomResizedCrop | RandomCropPad | PhotometricOp) for view in recipe for op in view
    )


def needs_pil(recipe: Recipe) -> bool:
    """Tell whether any view has operations that run on single images on the host."""
    return any(host_ops(view) for view in recipe)


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
    return _sit_pair(RandomResizedCrop(size, interpolation="bicubic"))


def _sit_fork(size: int) -> Recipe:
    return _sit_pair(RandomResizedCrop(size, (0.75, 1.0), ratio=(1.0, 1.0), interpolation="bicubic"))


def _sit_pair(crop: RandomResizedCrop) -> Recipe:
    view = (crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0))
    return (view, view)


def _gmml(size: int) -> Recipe:
    """SiT's student and teacher (spec E8)."""
    crop = RandomResizedCrop(size, (0.2, 1.0), interpolation="bicubic")
    base = (crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8), Grayscale())
    return ((*base, GaussianBlur(p=1.0)), (*base, GaussianBlur(p=0.1), Solarize()))


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
    "sit_fork": _sit_fork,
    "gmml": _gmml,
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


def finetune_recipe(
    img_size: int,
    *,
    crop_min: float = 0.08,
    interpolation: str = "bicubic",
    color_jitter: float = 0.0,
    rand_augment: str = "",
    erasing: float = 0.0,
) -> Recipe:
    """Return the one training view of DeiT, Swin and SiT: crop, flip, RandAugment or jitter, erasing.

    Up to 32 pixels the crop is a shift by at most 4 (`crop_min` is then not used). As in timm, RandAugment
    stands in for the jitter: a ValueError where both are asked for.
    """
    if color_jitter and rand_augment:
        raise ValueError(
            f"color jitter {color_jitter} has no effect beside RandAugment {rand_augment!r}: set it to 0"
        )
    crop: View = (RandomResizedCrop(img_size, (crop_min, 1.0), interpolation=interpolation),)
    if img_size <= TINY_IMAGE:  # images of that size already are not resized
        crop = (Resize(img_size, interpolation), RandomCropPad(img_size))
    jitter = ColorJitter(color_jitter, color_jitter, color_jitter, 0.0, p=1.0)
    colour: View = (RandAugment(rand_augment),) if rand_augment else (jitter,) if color_jitter else ()
    erase: View = (RandomErasing(erasing),) if erasing else ()
    view = (*crop, HorizontalFlip(), *colour, *erase)
    check_view(view)
    return (view,)
