"""What a worker hands over: crops equal to those of one image at a time, in channels-last memory."""

import numpy as np
import pytest
import torch
from torch import Tensor

from data.augment.base import Recipe, sample_keys
from data.augment.crops import CropDraws, RandomResizedCrop, crop_one
from data.augment.finetune import finetune_recipe
from data.augment.pipeline import host_augment
from data.augment.recipes import build_recipe
from data.sampler import Request
from data.sources.base import Source
from data.worker import Fetcher

SIZES = [(40, 60), (96, 128), (33, 33), (32, 32), (90, 20), (64, 64), (5, 7)]


class _Images(Source):
    """Images of all sizes: channels last as decoders give them, or planar."""

    def __init__(self, photos: np.ndarray, planar: bool) -> None:
        super().__init__(torch.arange(len(SIZES)), [])
        cut = [photos[i % 6, :height, :width].copy() for i, (height, width) in enumerate(SIZES)]
        self.loaded = [torch.from_numpy(image).permute(2, 0, 1) for image in cut]
        self.loaded = [image.contiguous() if planar else image for image in self.loaded]

    def name(self, index: int) -> str:
        return str(index)

    def load(self, index: int) -> Tensor:
        if index == len(SIZES) - 1 and len(self.loaded) < len(SIZES):
            raise OSError("gone")
        return self.loaded[index]


RECIPES = {
    "bilinear": build_recipe("moco_v2", 32),
    "bicubic": build_recipe("sit", 48),
    "shift": finetune_recipe(32),
    "randaugment": finetune_recipe(48, rand_augment="rand-m9-mstd0.5-inc1"),
}


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_a_request_gives_the_crops_of_its_samples(
    photos: np.ndarray, name: str, planar: bool
) -> None:
    recipe: Recipe = RECIPES[name]
    source = _Images(photos, planar)
    chosen = np.array([3, 0, 5, 1, 2, 4, 6, 1])
    copies = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    fetched = Fetcher(source, recipe, seed=9)[Request(0, 2, chosen, copies)]
    assert fetched["indices"].tolist() == chosen.tolist()
    for number, view in enumerate(recipe):
        views = fetched["views"][number]
        assert views.is_contiguous(memory_format=torch.channels_last)
        for place, index in enumerate(chosen):
            image, key = (
                source.loaded[index],
                sample_keys(9, 2, chosen[[place]], number, copies[[place]]),
            )
            if isinstance(view[0], RandomResizedCrop):
                height, width = image.shape[-2:]
                box = view[0].draw(key, np.array([height]), np.array([width]))[0]
                expected = host_augment(crop_one(image, view, box), view, key)
                assert torch.equal(views[place], expected)
            one = Fetcher(source, recipe, seed=9)[Request(0, 2, chosen[[place]], copies[[place]])]
            assert torch.equal(one["views"][number][0], views[place])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_window_of_the_views_size_is_kept(photos: np.ndarray, interpolation: str) -> None:
    view = (RandomResizedCrop(32, (1.0, 1.0), (1.0, 1.0), interpolation),)
    source = _Images(photos, planar=False)
    views = Fetcher(source, (view,), seed=0)[Request(0, 0, np.array([3]))]["views"]
    assert torch.equal(views[0][0], source.loaded[3])


def test_a_bad_image_of_an_evaluation_is_black_and_reported(photos: np.ndarray) -> None:
    source = _Images(photos, planar=False)
    del source.loaded[-1]
    fetched = Fetcher(source, build_recipe("eval", 32), seed=None)[
        Request(0, 0, np.array([1, 6, 2]))
    ]
    assert fetched["failures"] == [("6", "OSError: gone")]
    assert fetched["views"][0].flatten(1).any(1).tolist() == [True, False, True]


def test_boxes_are_pinned() -> None:
    """Change these numbers only on purpose: every stored result of a run depends on them."""
    draws = CropDraws(RandomResizedCrop(224), sample_keys(0, 0, np.arange(4), 0))
    assert [draws.box(i, 375, 500) for i in range(4)] == [
        (66, 241, 183, 235),
        (60, 112, 314, 353),
        (155, 257, 180, 217),
        (16, 4, 349, 451),
    ]
    flat = [draws.box(i, 20, 900) for i in range(4)]
    assert [box[2] <= 20 and box[3] <= 900 for box in flat] == [True] * 4
