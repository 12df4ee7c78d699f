"""The named views as data: what is done to an image, in which order, with which parameters.

One recipe drives the batched pipeline (`data.augment.pipeline`), the pipeline of torchvision and
timm that tests and benchmarks compare with (`benchmarks.views`), the preview and the docs.
"""

import difflib
from dataclasses import replace

from data.augment.base import BatchOp, HostOp, Recipe, View, host_ops, spatial_ops
from data.augment.crops import CenterCrop, RandomCropPad, RandomResizedCrop, Resize
from data.augment.ops import ColorJitter, GaussianBlur, Grayscale, HorizontalFlip, Solarize

SMALL_IMAGE = 96  # up to this size an evaluation image is resized straight to the input size

_SHAPES = (
    (RandomResizedCrop,),
    (Resize,),
    (Resize, CenterCrop),
    (RandomCropPad,),
    (Resize, RandomCropPad),
)


def check_view(view: View) -> None:
    """Refuse a view that the batched pipeline cannot run: bad order, or draws used twice."""
    spatial = spatial_ops(view)
    if view[: len(spatial)] != spatial:
        raise ValueError(f"view {view}: crop and resize must come before all other operations")
    if tuple(type(op) for op in spatial) not in _SHAPES:
        names = ", ".join(" + ".join(op.__name__ for op in shape) for shape in _SHAPES)
        raise ValueError(f"view {view}: must start with one of {names}")
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
                    f"{kind} and {owners[claim]} both use the stream or name {claim!r}: give {kind} its own"
                )
            owners[claim] = kind


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
    view = (
        crop,
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        Grayscale(),
        GaussianBlur(),
        HorizontalFlip(),
    )
    return (view, view)


def _simclr(size: int) -> Recipe:
    crop = RandomResizedCrop(size, (0.2, 1.0))
    view = (
        crop,
        HorizontalFlip(),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        Grayscale(),
        GaussianBlur(),
    )
    return (view, view)


def _byol(size: int) -> Recipe:
    base = (
        RandomResizedCrop(size),
        HorizontalFlip(),
        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        Grayscale(),
    )
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
    return _sit_pair(
        RandomResizedCrop(size, (0.75, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")
    )


def _sit_pair(crop: RandomResizedCrop) -> Recipe:
    view = (crop, HorizontalFlip(), ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0))
    return (view, view)


def _gmml(size: int) -> Recipe:
    """The student's and the teacher's view of SiT's code."""
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
        tuple(
            replace(op, scale=(crop_min, 1.0)) if isinstance(op, RandomResizedCrop) else op
            for op in view
        )
        for view in recipe
    )
