"""The named views as data: what is done to an image, in which order, with which parameters.

One recipe drives the batched pipeline (`data.augment.pipeline`), the pipeline of torchvision and
timm that tests and benchmarks compare with (`benchmarks.input.views`), the preview and the docs.
"""

import difflib
import logging
from dataclasses import replace

from data.augment.base import (
    BatchOp,
    HostOp,
    PhotometricOp,
    Recipe,
    SpatialOp,
    View,
    host_ops,
    needs_pil,
    spatial_ops,
)
from data.augment.crops import CenterCrop, RandomCropPad, RandomResizedCrop, Resize
from data.augment.ops import ColorJitter, GaussianBlur, Grayscale, HorizontalFlip, Solarize
from data.pixels import Pixels

logger = logging.getLogger("synco")

SMALL_IMAGE = 96  # up to this size an evaluation image is resized straight to the input size

_CROPS = ((RandomResizedCrop,), (RandomCropPad,), (Resize,))
_SHAPES = (*_CROPS, (Resize, CenterCrop), (Resize, RandomCropPad))


def check_view(view: View) -> None:
    """Refuse a view that the batched pipeline cannot run: bad order, or draws used twice."""
    # The workers crop, the device does the rest: a batch has to be of one size by then.
    spatial = spatial_ops(view)
    if view[: len(spatial)] != spatial:
        raise ValueError(f"view {view}: crop and resize must come before all other operations")
    if tuple(type(op) for op in spatial) not in _SHAPES:
        names = ", ".join(" + ".join(op.__name__ for op in shape) for shape in _SHAPES)
        raise ValueError(f"view {view}: must start with one of {names}")
    # draws are kept by name: a second one would overwrite the first
    if len({type(op) for op in view}) != len(view):
        raise ValueError(f"view {view}: each kind of operation may appear only once")
    if not all(isinstance(op, HostOp) for op in host_ops(view)):
        raise ValueError(f"view {view}: only a flip may come between the crop and RandAugment")
    late = False
    for op in view:
        if late and not (isinstance(op, BatchOp) and op.after_normalisation):
            raise ValueError(f"view {view}: RandomErasing must come last, after the normalisation")
        late = isinstance(op, BatchOp) and op.after_normalisation
    _check_draws(view)


def _check_draws(view: View) -> None:
    """Refuse two operations whose draws would be the same numbers or overwrite each other."""
    owners: dict[int | str, str] = {}
    for op in view:
        kind = type(op).__name__
        claims: list[int | str] = list(op.streams)
        if isinstance(op, BatchOp):
            claims.append(op.name)
        for claim in claims:
            if claim in owners:
                raise ValueError(
                    f"{kind} and {owners[claim]} both use the stream or name {claim!r}: give "
                    f"{kind} its own"
                )
            owners[claim] = kind


_MOCO_JITTER = ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
# BYOL (arXiv:2006.07733) changes the saturation half as much as the brightness
_BYOL_JITTER = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)


def _moco_crop(size: int, interpolation: str = "bilinear") -> RandomResizedCrop:
    return RandomResizedCrop(size, (0.2, 1.0), interpolation=interpolation)


def _moco_v1(size: int) -> Recipe:
    # MoCo v1: always applied, and hue as strong as the others
    jitter = ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)
    return ((_moco_crop(size), Grayscale(), jitter, HorizontalFlip()),) * 2


def _moco_v2(size: int) -> Recipe:
    return ((_moco_crop(size), _MOCO_JITTER, Grayscale(), GaussianBlur(), HorizontalFlip()),) * 2


def _simclr(size: int) -> Recipe:
    return ((_moco_crop(size), HorizontalFlip(), _MOCO_JITTER, Grayscale(), GaussianBlur()),) * 2


def _byol(size: int) -> Recipe:
    return _byol_pair(RandomResizedCrop(size))


def _gmml(size: int) -> Recipe:
    """The student's and the teacher's view of SiT's code."""
    return _byol_pair(_moco_crop(size, "bicubic"))


def _byol_pair(crop: RandomResizedCrop) -> Recipe:
    # unequal views, as published: one always blurred, the other rarely and sometimes solarised
    base = (crop, HorizontalFlip(), _BYOL_JITTER, Grayscale())
    return ((*base, GaussianBlur(p=1.0)), (*base, GaussianBlur(p=0.1), Solarize()))


def _mocov3(size: int) -> Recipe:
    # BYOL's views in MoCo v3's order: the flip is last
    base = (RandomResizedCrop(size), _BYOL_JITTER, Grayscale())
    return (
        (*base, GaussianBlur(p=1.0), HorizontalFlip()),
        (*base, GaussianBlur(p=0.1), Solarize(), HorizontalFlip()),
    )


def _sit(size: int) -> Recipe:
    return _sit_pair(RandomResizedCrop(size, interpolation="bicubic"))


def _sit_fork(size: int) -> Recipe:
    crop = RandomResizedCrop(size, (0.75, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")
    return _sit_pair(crop)


def _sit_pair(crop: RandomResizedCrop) -> Recipe:
    # timm's jitter, which SiT uses: no hue, and always applied
    return ((crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0)),) * 2


def _cifar(size: int) -> Recipe:
    return ((_moco_crop(size), HorizontalFlip(), _MOCO_JITTER, Grayscale()),) * 2


def _digits(size: int) -> Recipe:
    """No flip and no colour: mirrored digits are other digits, and digits are grey."""
    crop = RandomResizedCrop(size, (0.5, 1.0), ratio=(2 / 3, 3 / 2))
    return ((crop, ColorJitter(0.4, 0.4, 0.0, 0.0, p=0.8), GaussianBlur((0.1, 1.0), p=0.2)),) * 2


def _linear(size: int) -> Recipe:
    return ((RandomResizedCrop(size), HorizontalFlip()),)


def _eval(size: int) -> Recipe:
    # a crop would cut away a large part of a small image
    margin = 0 if size <= SMALL_IMAGE else 32
    return ((Resize(size + margin), CenterCrop(size)),)


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
    """Return the recipe `name` for `img_size` pixels; `crop_min` is the smallest crop area."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"AUG.RECIPE {name!r} is unknown; did you mean {near!r}? Known: {', '.join(RECIPES)}"
        )
    if img_size < 1:
        raise ValueError(f"DATA.IMG_SIZE {img_size} must be at least 1")
    recipe = RECIPES[name](img_size)
    return recipe if crop_min is None else _with_crop_min(recipe, name, crop_min)


def for_pixels(recipe: Recipe, pixels: Pixels) -> Recipe:
    """Return the recipe without the operations on colours where the channels are no colours.

    Raises `ValueError` where it has RandAugment and images are not 8-bit RGB.
    """
    if not pixels.plain and needs_pil(recipe):
        raise ValueError("DATA.CHANNELS, DATA.RANGE: RandAugment works on 8-bit RGB; turn it off")
    if pixels.rgb:
        return recipe
    kept = []
    for view in recipe:
        kept.append(tuple(op for op in view if not isinstance(op, (ColorJitter, Grayscale))))
    if tuple(kept) != recipe:
        logger.info("DATA.CHANNELS %d: no colour jitter, no random grey", pixels.channels)
    return tuple(kept)


def add_local_views(recipe: Recipe, number: int, size: int, scale: tuple[float, float]) -> Recipe:
    """Append `number` views of `size` pixels, crops of the share `scale` of an image's area.

    Multi-crop: Caron et al. 2020 (SwAV, arXiv:2006.09882), section 3.2. Else a local view is made
    as the first view of the recipe.
    """
    if not number:
        return recipe
    first, *rest = recipe[0]
    if not isinstance(first, RandomResizedCrop):
        raise ValueError(
            f"AUG.LOCAL_CROPS.NUMBER {number}: the views of AUG.RECIPE start with no random "
            "resized crop that a local view could copy; set it to 0"
        )
    if not 1 <= size <= first.size:
        raise ValueError(
            f"AUG.LOCAL_CROPS.SIZE {size} must be between 1 and the other views' size, {first.size}"
        )
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"AUG.LOCAL_CROPS.SCALE {[low, high]} must rise and lie in (0, 1]")
    local: list[SpatialOp | PhotometricOp] = [replace(first, size=size, scale=(low, high))]
    for op in rest:
        # BYOL's first view is always blurred. DINO (arXiv:2104.14294) blurs half of the local ones.
        local.append(replace(op, p=min(op.p, 0.5)) if isinstance(op, GaussianBlur) else op)
    return (*recipe, *[tuple(local)] * number)


def _with_crop_min(recipe: Recipe, name: str, crop_min: float) -> Recipe:
    if not 0 < crop_min <= 1:
        raise ValueError(f"AUG.CROP_MIN {crop_min} must be in (0, 1]")
    if not all(isinstance(view[0], RandomResizedCrop) for view in recipe):
        raise ValueError(
            f"AUG.CROP_MIN {crop_min} has no effect: recipe {name!r} has no random crop; unset it"
        )
    views = []
    for crop, *rest in recipe:
        assert isinstance(crop, RandomResizedCrop)
        views.append((replace(crop, scale=(crop_min, 1.0)), *rest))
    return tuple(views)
