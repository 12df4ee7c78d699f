"""Small made-up scenes in the layouts of the public data sets, and their configuration."""

from pathlib import Path

import numpy as np
from PIL import Image
from yacs.config import CfgNode

from segmentation.defaults import load_segmentation_config

CLASSES = ("ground", "red thing", "green thing")
COLOURS = np.array([[40, 40, 40], [220, 30, 30], [30, 220, 30]], dtype=np.uint8)


def config(root: Path, dataset: str, **changes: object) -> CfgNode:
    """Return the configuration of a small run; `changes` are SECTION__KEY."""
    values = {
        "SEED": 3,
        "DATA.DATASET": dataset,
        "DATA.PATH": str(root),
        "DATA.NUM_WORKERS": 0,
        "TRAIN.BATCH_SIZE": 4,
        "SEGMENTATION.SCALE": [128, 32],
        "SEGMENTATION.CROP": [32, 32],
        "SEGMENTATION.STRIDE": [16, 16],
    }
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    opts = [part for name, value in values.items() for part in (name, str(value))]
    return load_segmentation_config([], opts, {})


def scene(number: int, height: int = 36, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return an image uint8 (H,W,3) with two rectangles and its classes uint8 (H,W)."""
    rng = np.random.default_rng(number)
    label = np.zeros((height, width), dtype=np.uint8)
    for thing in (1, 2):
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
        label[top : top + rng.integers(8, 12), left : left + rng.integers(8, 12)] = thing
    noise = rng.integers(-10, 10, (height, width, 3))
    image = np.clip(COLOURS[label].astype(int) + noise, 0, 255).astype(np.uint8)
    return image, label


def write(image: Path, label: Path, number: int = 0, values: dict[int, int] | None = None) -> None:
    """Write one scene; `values` {class: stored value} change what the label map stores."""
    pixels, classes = scene(number)
    image.parent.mkdir(parents=True, exist_ok=True)
    label.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(image)
    stored = classes.copy()
    for number_, value in (values or {}).items():
        stored[classes == number_] = value
    Image.fromarray(stored).save(label)


def folder_pairs(root: Path, count: int = 8) -> Path:
    """Make `images`, `labels` and `classes.txt` with the splits train and val."""
    for split, first in (("train", 0), ("val", 100)):
        for number in range(first, first + count):
            name = f"scene{number}"
            write(
                root / "images" / split / f"{name}.jpg",
                root / "labels" / split / f"{name}.png",
                number,
            )
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def paletted(file: Path, label: np.ndarray) -> None:
    """Write a label map of mode P whose colours are far from its indices."""
    image = Image.fromarray(label)
    image.putpalette([(7 * k + 91) % 256 for k in range(768)])
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
