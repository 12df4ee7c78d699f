"""The picture grids: every image in its place, titles over their columns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.augment.finetune import finetune_recipe
from data.augment.pipeline import normalise_
from data.augment.preview import first_batch, save_grid, save_preview
from data.augment.recipes import build_recipe
from data.loader import evaluation_batches
from data.sources import build_source, subset


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_images_stand_row_by_row_in_a_white_frame(tmp_path: Path) -> None:
    levels = torch.rand(2, 3, 3, 100, 100)
    levels[1, 2] += 5.0  # a reconstruction may leave the range
    save_grid(tmp_path / "grid.png", normalise_(levels.clone()))
    grid = pixels(tmp_path / "grid.png")
    assert grid.shape == (2 * 102, 3 * 102, 3)
    expected = (levels.clamp(0, 1) * 255).round()
    for row in range(2):
        for column in range(3):
            tile = grid[row * 102 : (row + 1) * 102, column * 102 : (column + 1) * 102].astype(int)
            difference = tile[1:-1, 1:-1] - expected[row, column].permute(1, 2, 0).numpy()
            assert np.abs(difference).max() <= 1
            assert (tile[[0, -1]] == 255).all()


def test_titles_stand_above_their_columns_and_stay_in_them(tmp_path: Path) -> None:
    rows = normalise_(torch.zeros(1, 3, 3, 16, 16))
    titles = ["clean", "", "a reconstruction with a title far too long for it"]
    save_grid(tmp_path / "plain.png", rows)
    save_grid(tmp_path / "titled.png", rows, titles)
    plain, titled = pixels(tmp_path / "plain.png"), pixels(tmp_path / "titled.png")
    band = titled[: len(titled) - len(plain)]
    np.testing.assert_array_equal(titled[len(band) :], plain)
    width = plain.shape[1] // 3
    ink = [(band[:, i * width : (i + 1) * width] < 128).any(axis=(0, 2)) for i in range(3)]
    assert [bool(marks.any()) for marks in ink] == [True, False, True]
    assert not ink[2][0]  # nothing has run over from its neighbour
    middle = np.flatnonzero(ink[0]).mean()
    assert abs(middle - width / 2) < 4
    with pytest.raises(ValueError, match="2 titles for 3 columns"):
        save_grid(tmp_path / "no.png", rows, ["a", "b"])


@pytest.mark.parametrize(
    "recipe", [build_recipe("byol", 32), finetune_recipe(32, rand_augment="rand-m9")]
)
def test_a_recipe_is_shown_as_the_network_sees_it(tmp_path: Path, recipe: tuple) -> None:
    save_preview(
        tmp_path / "views.png", build_source("digits", "", "train"), recipe, seed=0, num_images=3
    )
    shown = pixels(tmp_path / "views.png")
    # one column more than the recipe has views: the image itself, and a band with headings
    assert shown.shape[1] == (1 + len(recipe)) * 34 * 3
    band = len(shown) - 3 * 34 * 3
    assert 8 < band < 40
    for column in np.array_split(shown[:band], 1 + len(recipe), axis=1):
        assert (column < 128).any()
    source = build_source("digits", "", "train")
    (index,) = first_batch(source, recipe, 0, 1).indices.tolist()
    save_preview(tmp_path / "one.png", source, recipe, seed=0, num_images=1)
    found = pixels(tmp_path / "one.png")[band + 3 : band + 99 : 3, 3:99:3, 0].astype(int)
    plain = next(
        evaluation_batches(subset(source, [index]), 32, batch_size=1, device=torch.device("cpu"))
    )
    expected = plain.views[0][0, 0] * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert np.abs(found - (expected.clamp(0, 1) * 255).round().numpy()).max() <= 1


def test_a_process_of_two_draws_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, recipe = build_source("digits", "", "train"), build_recipe("digits", 16)
    save_preview(tmp_path / "alone.png", source, recipe, seed=1)
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    save_preview(tmp_path / "of_two.png", source, recipe, seed=1)
    assert (tmp_path / "of_two.png").read_bytes() == (tmp_path / "alone.png").read_bytes()
