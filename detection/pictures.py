"""Pictures of detections: test images with their true boxes, beside what was found, with scores."""

import colorsys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from detection.evaluation import Detection
from detection.sources.annotations import DetectionData

TILE = 320  # pixels
BAND = 16  # of the words above a tile
_SHOWN = 0.5  # least score of what is drawn


class Labelled(NamedTuple):
    """A box (x1, y1, x2, y2) in pixels, its label from 1, and the words behind its class."""

    box: list[float]
    label: int
    words: str = ""


def draw_grid(data: DetectionData, found: list[Detection], count: int, path: Path) -> None:
    """Write the first `count` images as a PNG, each with its truth and beside it what was `found`.

    From four images on there are two of these pairs in a row.
    """
    count = min(count, len(data))
    columns = 1 if count < 4 else 2
    size = (2 * TILE * columns, -(-count // columns) * (TILE + BAND))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for index in range(count):
        left, top = index % columns * 2 * TILE, index // columns * (TILE + BAND)
        pixels = data.load(index).permute(1, 2, 0).numpy()
        objects = data.objects[index]
        pairs = zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True)
        truth = [Labelled(box, label) for box, label in pairs]
        mine = [item for item in found if item["index"] == index]
        sure = sorted((m for m in mine if m["score"] >= _SHOWN), key=lambda m: m["score"])
        boxes = [Labelled(m["box"], m["label"], f" {m['score']:.2f}") for m in sure]
        draw.text((left + 2, top + 2), f"truth: {len(truth)} objects", fill="black")
        draw.text((left + TILE + 2, top + 2), heading(mine), fill="black")
        for number, shown in enumerate((truth, boxes)):
            tile = draw_tile(pixels, shown, data.classes)
            grid.paste(tile, (left + number * TILE, top + BAND))
    temporary = path.with_name(path.name + ".tmp")
    grid.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def heading(found: list[Detection]) -> str:
    """Say how many of an image's detections are drawn, or why there are none."""
    best = max((item["score"] for item in found), default=0.0)
    if best < _SHOWN:
        return f"no detection above {_SHOWN:g} (best score {best:.2f})"
    count = sum(item["score"] >= _SHOWN for item in found)
    return f"found: {count} above {_SHOWN:g}"


def draw_tile(
    pixels: np.ndarray, boxes: Iterable[Labelled], classes: tuple[str, ...]
) -> Image.Image:
    """Return an image (H,W,3) with boxes, no side above `TILE`."""
    scale = TILE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    tile = Image.fromarray(pixels).resize(size)
    draw = ImageDraw.Draw(tile)
    for item in boxes:
        red, green, blue = colorsys.hsv_to_rgb(item.label * 0.618 % 1.0, 0.9, 1.0)
        colour = (int(255 * red), int(255 * green), int(255 * blue))
        box = [value * scale for value in item.box]
        draw.rectangle(box, outline=colour, width=2)
        text = f"{classes[item.label - 1]}{item.words}"
        corner = (box[0] + 2, max(0.0, box[1] - 11))
        draw.rectangle(draw.textbbox(corner, text), fill=colour)
        draw.text(corner, text, fill="black")
    return tile
