"""Recipes: the published order of operations, and errors."""

import pytest
from torchvision import transforms

from benchmarks.input.views import reference_transform
from data.augment.base import Recipe, view_size
from data.augment.crops import RandomResizedCrop
from data.augment.recipes import RECIPES, build_recipe, check_view

CROP, FLIP, JITTER, GRAY, BLUR, SOLARIZE = (
    "RandomResizedCrop",
    "HorizontalFlip",
    "ColorJitter",
    "Grayscale",
    "GaussianBlur",
    "Solarize",
)
PUBLISHED = {
    "moco_v1": [[CROP, GRAY, JITTER, FLIP]] * 2,
    "moco_v2": [[CROP, JITTER, GRAY, BLUR, FLIP]] * 2,
    "simclr": [[CROP, FLIP, JITTER, GRAY, BLUR]] * 2,
    "byol": [[CROP, FLIP, JITTER, GRAY, BLUR], [CROP, FLIP, JITTER, GRAY, BLUR, SOLARIZE]],
    "mocov3": [[CROP, JITTER, GRAY, BLUR, FLIP], [CROP, JITTER, GRAY, BLUR, SOLARIZE, FLIP]],
    "sit": [[CROP, FLIP, JITTER]] * 2,
    "sit_fork": [[CROP, FLIP, JITTER]] * 2,
    "gmml": [[CROP, FLIP, JITTER, GRAY, BLUR], [CROP, FLIP, JITTER, GRAY, BLUR, SOLARIZE]],
    "cifar": [[CROP, FLIP, JITTER, GRAY]] * 2,
    "digits": [[CROP, JITTER, BLUR]] * 2,
    "linear": [[CROP, FLIP]],
    "eval": [["Resize", "CenterCrop"]],
}
JITTERS = {  # brightness, contrast, saturation, hue, p
    "moco_v1": (0.4, 0.4, 0.4, 0.4, 1.0),
    "moco_v2": (0.4, 0.4, 0.4, 0.1, 0.8),
    "simclr": (0.4, 0.4, 0.4, 0.1, 0.8),
    "byol": (0.4, 0.4, 0.2, 0.1, 0.8),
    "mocov3": (0.4, 0.4, 0.2, 0.1, 0.8),
    "gmml": (0.4, 0.4, 0.2, 0.1, 0.8),
    "cifar": (0.4, 0.4, 0.4, 0.1, 0.8),
}


def _op(recipe: Recipe, view: int, name: str) -> object:
    return next(op for op in recipe[view] if type(op).__name__ == name)


@pytest.mark.parametrize("name", RECIPES)
def test_order_is_the_published_one(name: str) -> None:
    recipe = build_recipe(name, 224)
    assert [[type(op).__name__ for op in view] for view in recipe] == PUBLISHED[name]
    for view in recipe:
        check_view(view)
        assert view_size(view) == 224


@pytest.mark.parametrize("name", JITTERS)
def test_jitter_strengths_are_the_published_ones(name: str) -> None:
    recipe = build_recipe(name, 224)
    for view in range(2):
        jitter = _op(recipe, view, JITTER)
        found = tuple(
            getattr(jitter, key) for key in ("brightness", "contrast", "saturation", "hue", "p")
        )
        assert found == JITTERS[name]
        assert _op(recipe, view, GRAY).p == 0.2


@pytest.mark.parametrize("name", ["byol", "mocov3", "gmml"])
def test_asymmetric_pairs_have_the_published_probabilities(name: str) -> None:
    recipe = build_recipe(name, 224)
    assert [_op(recipe, view, BLUR).p for view in range(2)] == [1.0, 0.1]
    assert (_op(recipe, 1, SOLARIZE).p, _op(recipe, 1, SOLARIZE).threshold) == (0.2, 128)


@pytest.mark.parametrize(
    ("name", "low"), [("moco_v2", 0.2), ("simclr", 0.2), ("byol", 0.08), ("linear", 0.08)]
)
def test_crop_scale_is_published_and_can_be_changed(name: str, low: float) -> None:
    assert build_recipe(name, 64)[0][0].scale == (low, 1.0)
    assert all(view[0].scale == (0.33, 1.0) for view in build_recipe(name, 64, crop_min=0.33))


def test_small_evaluation_images_keep_their_shape_and_lose_no_border() -> None:
    (view,) = build_recipe("eval", 32)
    assert [(type(op).__name__, op.size) for op in view] == [("Resize", 32), ("CenterCrop", 32)]
    assert [op.size for op in build_recipe("eval", 224)[0]] == [256, 224]


def test_reference_transform_keeps_the_order() -> None:
    steps = reference_transform(build_recipe("moco_v2", 224)[0]).transforms
    assert isinstance(steps[0], transforms.RandomResizedCrop)
    assert isinstance(steps[1].transforms[0], transforms.ColorJitter)
    assert isinstance(steps[2], transforms.RandomGrayscale)
    assert isinstance(steps[4], transforms.RandomHorizontalFlip)
    assert [type(step).__name__ for step in steps[-2:]] == ["ToTensor", "Normalize"]


@pytest.mark.parametrize(
    ("name", "size", "crop_min", "message"),
    [
        ("moco2", 224, None, r"AUG.RECIPE 'moco2' is unknown; did you mean 'moco_v2'\?"),
        ("byol", 0, None, "DATA.IMG_SIZE 0"),
        ("byol", 224, 0.0, r"AUG.CROP_MIN 0.0 must be in \(0, 1\]"),
        ("eval", 224, 0.2, "AUG.CROP_MIN 0.2 has no effect"),
    ],
)
def test_errors_name_the_key(name: str, size: int, crop_min: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(name, size, crop_min)


def test_views_that_cannot_be_batched_are_refused() -> None:
    crop, flip = build_recipe("linear", 32)[0]
    for view in [(flip, crop), (flip,), (crop, flip, flip), (crop, RandomResizedCrop(8))]:
        with pytest.raises(ValueError, match="view"):
            check_view(view)
