"""Pictures of detections: a grid of test images with boxes, class names and scores."""

import colorsys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detection.evaluation import Detection
from detection.sources.annotations import DetectionData

TILE = 320  # pixels
_SHOWN = 0.3  # least score of what is drawn


def draw_grid(data: DetectionData, found: list[Detection], count: int, path: Path) -> None:
    """Write the first `count` images with what was `found` in them as a PNG grid."""
    count = min(count, len(data))
    columns = int(np.ceil(np.sqrt(count)))
    grid = Image.new("RGB", (columns * TILE, -(-count // columns) * TILE), "white")
    for index in range(count):
        mine = [item for item in found if item["index"] == index and item["score"] >= _SHOWN]
        tile = draw_tile(data.load(index).permute(1, 2, 0).numpy(), mine, data.classes)
        grid.paste(tile, (index % columns * TILE, index // columns * TILE))
    temporary = path.with_name(path.name + ".tmp")
    grid.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)


def draw_tile(pixels: np.ndarray, found: list[Detection], classes: tuple[str, ...]) -> Image.Image:
    """Return an image (H,W,3) with its detections, no side above `TILE`."""
    scale = TILE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    tile = Image.fromarray(pixels).resize(size)
    draw = ImageDraw.Draw(tile)
    for item in sorted(found, key=lambda item: item["score"]):
        red, green, blue = colorsys.hsv_to_rgb(item["label"] * 0.618 % 1.0, 0.9, 1.0)
        colour = (int(255 * red), int(255 * green), int(255 * blue))
        box = [value * scale for value in item["box"]]
        draw.rectangle(box, outline=colour, width=2)
        text = f"{classes[item['label'] - 1]} {item['score']:.2f}"
        corner = (box[0] + 2, max(0.0, box[1] - 11))
        draw.rectangle(draw.textbbox(corner, text), fill=colour)
        draw.text(corner, text, fill="black")
    return tile
