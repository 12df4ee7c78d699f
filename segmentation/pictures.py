"""Pictures of a segmentation: image, truth and prediction side by side; void is grey."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from segmentation.heads import IGNORE

TILE = 256  # pixels
_VOID = 128  # grey
_BLEND = 0.6  # of the colours over the image


def palette() -> np.ndarray:
    """Return a colour for each label, uint8 (256,3): Pascal VOC's."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for label in range(256):
        bits, shift = label, 7
        while bits:
            for channel in range(3):
                colours[label, channel] |= (bits >> channel & 1) << shift
            bits, shift = bits >> 3, shift - 1
    colours[IGNORE] = _VOID
    return colours


def draw_rows(rows: Iterable[tuple[Image.Image, np.ndarray, np.ndarray]], path: Path) -> None:
    """Write a PNG with a row for each (image, truth (H,W), prediction (H,W))."""
    tiles = [draw_row(*row) for row in rows]
    height = sum(tile.height for tile in tiles)
    canvas = Image.new("RGB", (3 * TILE, max(1, height)), "white")
    top = 0
    for tile in tiles:
        canvas.paste(tile, (0, top))
        top += tile.height
    temporary = path.with_name(path.name + ".tmp")
    canvas.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def draw_row(image: Image.Image, truth: np.ndarray, predicted: np.ndarray) -> Image.Image:
    """Return image, truth and prediction side by side; where the truth is void, both are grey."""
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    row = Image.new("RGB", (3 * TILE, size[1]), "white")
    photo = image.convert("RGB").resize(size)
    shown: Sequence[np.ndarray] = (truth, np.where(truth == IGNORE, IGNORE, predicted))
    row.paste(photo, (0, 0))
    colours = palette()
    for number, labels in enumerate(shown, start=1):
        # nearest: a mean of two labels is a third one
        small = Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        mask = np.asarray(small)
        painted = Image.blend(photo, Image.fromarray(colours[mask]), _BLEND)
        # void is plain grey: the image would shine through as a colour
        void = Image.fromarray((mask == IGNORE).astype(np.uint8) * 255)
        painted.paste((_VOID,) * 3, mask=void)
        row.paste(painted, (number * TILE, 0))
    return row
