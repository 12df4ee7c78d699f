"""Read label maps: PNG files whose stored indices are classes, with errors that name the file."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL.PngImagePlugin import PngImageFile

from data.decode import MAX_PIXELS, open_image
from utils.reading import read_bytes

IGNORED = 255  # in a label map: the pixel has no class
MAX_CLASSES = 254
_NO_CLASS = 254  # in a table: this value is an error

# from a stored value to its class, 255 or _NO_CLASS: 256 bytes, which bytes.translate wants
Table = bytes


class LabelError(ValueError):
    """Label maps that cannot be used; the message names the file or the key, and the remedy."""


def table_of(pairs: dict[int, int]) -> Table:
    """Return the table of {stored value: class}; 255 is ignored unless the pairs say otherwise."""
    table = bytearray([_NO_CLASS] * 256)
    table[IGNORED] = IGNORED
    for value, number in pairs.items():
        table[value] = number
    return bytes(table)


def plain_table(num_classes: int) -> Table:
    """Return the table of labels that are stored as they are."""
    return table_of({number: number for number in range(num_classes)})


def shifted_table(num_classes: int) -> Table:
    """Return the table of labels stored from 1 on, where 0 means no class (ADE20K)."""
    # a table cannot wrap around: 255 stays 255, where 255 - 1 would be a class
    return table_of({0: IGNORED} | {number + 1: number for number in range(num_classes)})


def parse_label_map(text: str, num_classes: int) -> Table:
    """Read "0:255,1:0,...": stored value and class, 255 for no class."""
    pairs: dict[int, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        if match is None:
            raise LabelError(
                f"SEGMENTATION.LABEL_MAP: {part.strip()!r} is not VALUE:CLASS; write pairs of "
                'numbers with commas between them, such as "0:255,1:0"'
            )
        value, number = int(match[1]), int(match[2])
        if value > 255 or (number >= num_classes and number != IGNORED):
            raise LabelError(
                f"SEGMENTATION.LABEL_MAP: {value}:{number}; values are 0 to 255 and classes 0 to "
                f"{num_classes - 1} (the data set names {num_classes}) or 255 for none"
            )
        if value in pairs:
            raise LabelError(f"SEGMENTATION.LABEL_MAP: duplicate value {value}; remove one")
        pairs[value] = number
    return table_of(pairs)


def read_label(
    file: Path, table: Table, num_classes: int, size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Return the classes uint8 (H,W) of a label map; `size` is the (height, width) of its image."""
    stored, found = _stored(file, max_pixels)
    if found != size:
        raise LabelError(
            f"{file}: {found[1]} x {found[0]} pixels, but its image has {size[1]} x {size[0]}; "
            "resize one of them (a label map without interpolation)"
        )
    classes = np.frombuffer(stored.translate(table), dtype=np.uint8).reshape(size)
    # one comparison: a histogram of the values would take ten times as long
    wrong = np.flatnonzero(classes == _NO_CLASS)
    if len(wrong):
        raise LabelError(
            f"{file}: value {stored[wrong[0]]} has no class ({num_classes} classes, 255 is "
            "ignored); correct the file, or give SEGMENTATION.LABEL_MAP or REDUCE_ZERO_LABEL"
        )
    return classes


def _stored(file: Path, max_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """Return the indices that a PNG stores, a byte a pixel, and its (height, width).

    A palette's colours are not looked at.
    """
    data = read_bytes(file)
    with open_image(data, max_pixels) as image:
        size = (image.height, image.width)
        if not isinstance(image, PngImageFile):
            raise LabelError(f"{file}: is {image.format}; label maps are PNG files, without loss")
        if image.mode.startswith("I"):
            raise LabelError(f"{file}: 16 bit a pixel; save classes as 8-bit PNG (mode L or P)")
        if image.mode not in ("P", "L", "1"):
            raise LabelError(
                f"{file}: mode {image.mode}, a mask coded by colours; save it as PNG of mode P or "
                "L whose values are class numbers"
            )
        depth = data[24]  # bits a pixel in the PNG's head
        if image.mode == "P" or depth == 8:
            return image.tobytes(), size
        # Pillow stretches grey levels of 1, 2 and 4 bits to 0..255
        levels = np.array(image.convert("L")) // (255 // ((1 << depth) - 1))
        return levels.astype(np.uint8).tobytes(), size


def check_classes(classes: Sequence[str], where: str) -> list[str]:
    """Return the names of the classes, or refuse them; `where` names their file or key."""
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise LabelError(f"{where}: {len(classes)} classes; there must be 2 to {MAX_CLASSES}")
    for place, name in enumerate(classes):
        if not name:
            raise LabelError(f"{where}: class {place} has an empty name; give it one")
        if name in classes[:place]:
            raise LabelError(f"{where}: duplicate class {name!r}; rename one")
    return list(classes)
