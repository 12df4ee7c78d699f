"""Pictures: image, truth and prediction side by side; what has no class is grey in both."""

from pathlib import Path

import numpy as np
from PIL import Image

from segmentation.pictures import TILE, draw_row, draw_rows, palette


def test_the_palette_is_vocs_and_void_is_grey() -> None:
    colours = palette()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {label: tuple(colours[label]) for label in known} == known
    assert tuple(colours[255]) == (128, 128, 128)
    assert len({tuple(colour) for colour in colours[:150].tolist()}) == 150


def test_a_row_shows_image_truth_and_prediction() -> None:
    image = Image.new("RGB", (64, 32), "white")
    truth = np.zeros((32, 64), dtype=np.uint8)
    truth[:, 32:] = 1
    truth[:16, 32:] = 255
    predicted = np.ones((32, 64), dtype=np.uint8)
    row = np.asarray(draw_row(image, truth, predicted))
    assert row.shape == (TILE // 2, 3 * TILE, 3)
    left, right, low, high = TILE // 4, 3 * TILE // 4, TILE * 3 // 8, TILE // 8
    assert tuple(row[high, left]) == (255, 255, 255)
    black, red = (102, 102, 102), (179, 102, 102)  # 40 % of the image shine through
    assert tuple(row[high, TILE + left]) == black
    assert np.abs(row[low, TILE + right].astype(int) - red).max() <= 1
    for part in (TILE, 2 * TILE):
        assert tuple(row[high, part + right]) == (128, 128, 128)
    assert np.abs(row[high, 2 * TILE + left].astype(int) - red).max() <= 1


def test_rows_stand_below_each_other(tmp_path: Path) -> None:
    labels = np.zeros((20, 20), dtype=np.uint8)
    rows = [(Image.new("RGB", (20, 20)), labels, labels)] * 2
    draw_rows(rows, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (3 * TILE, 2 * TILE)
    assert list(tmp_path.iterdir()) == [tmp_path / "out.png"]
