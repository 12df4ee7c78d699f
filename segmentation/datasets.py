"""Open a split of a segmentation data set by its configuration."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

from data.decode import MAX_PIXELS, decode_rgb, open_image
from data.sources.base import digest
from segmentation.sources import layouts
from segmentation.sources.labels import (
    LabelError,
    Table,
    check_classes,
    parse_label_map,
    plain_table,
    read_label,
    shifted_table,
)
from segmentation.sources.layouts import Listing
from utils.reading import read_bytes

_LOOKED_AT = 8  # label maps that are read before a run starts


@dataclass(frozen=True)
class SegmentationData:
    """Images with label maps; `tables[chosen[i]]` turns the stored values of map i into classes."""

    files: tuple[Path, ...]
    labels: tuple[Path, ...]
    classes: list[str]
    tables: tuple[Table, ...]
    chosen: np.ndarray
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def name(self, index: int) -> str:
        """Return an image's path."""
        return str(self.files[index])

    def sample(self, index: int) -> tuple[Tensor, np.ndarray]:
        """Read an image, uint8 (3,H,W) RGB, and its classes, uint8 (H,W) with 255 for none."""
        image = decode_rgb(read_bytes(self.files[index]), self.max_pixels)
        return image, self._label(index, (image.shape[1], image.shape[2]))

    def image(self, index: int) -> Image.Image:
        """Read an image for a picture."""
        pixels = decode_rgb(read_bytes(self.files[index]), self.max_pixels)
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def label(self, index: int) -> np.ndarray:
        """Read the classes of an image's pixels, uint8 (H,W) with 255 for none."""
        # Only the head of the image is read: its size is enough.
        with open_image(read_bytes(self.files[index]), self.max_pixels) as image:
            return self._label(index, (image.height, image.width))

    def _label(self, index: int, size: tuple[int, int]) -> np.ndarray:
        table = self.tables[self.chosen[index]]
        return read_label(self.labels[index], table, len(self.classes), size, self.max_pixels)

    def fingerprint(self) -> str:
        """Digest the names of the images, the classes and the tables."""
        # Without their folders, so that a data set may be moved.
        names = "\n".join(file.name for file in self.files)
        parts = [names, "\n".join(self.classes)]
        return digest(len(self), *(part.encode() for part in parts), *self.tables, self.chosen)


def open_dataset(cfg: CfgNode, split: str) -> SegmentationData:
    """Read a split and check that its files exist; a `LabelError` says what is wrong."""
    root, node = cfg.DATA.PATH, cfg.SEGMENTATION
    if not root or not Path(root).is_dir():
        raise LabelError(
            f"DATA.PATH (--data-path): {root!r} is no folder; give the data set's root"
        )
    listing = _listing(cfg.DATA.DATASET, Path(root), split, node)
    tables = _tables(cfg.DATA.DATASET, listing, node)
    _check_files(listing.files, f"images of the split {split!r}")
    _check_files(listing.labels, f"label maps of the split {split!r}")
    data = SegmentationData(
        tuple(listing.files),
        tuple(listing.labels),
        listing.classes,
        tuple(tables),
        np.array(listing.chosen, dtype=np.int64),
        cfg.DATA.MAX_PIXELS,
    )
    _look_at_some(data)
    return data


def _listing(dataset: str, root: Path, split: str, node: CfgNode) -> Listing:
    classes = [name.strip() for name in node.CLASSES.split(",")] if node.CLASSES else []
    if classes:
        check_classes(classes, "SEGMENTATION.CLASSES")
    if dataset == "pets":
        return layouts.pets(root, split, classes, node.CLASSES_OF == "species")
    read = {
        "ade20k": layouts.ade20k,
        "voc": layouts.voc,
        "cityscapes": layouts.cityscapes,
        "folders": layouts.folders,
    }
    return read[dataset](root, split, classes)


def _tables(dataset: str, listing: Listing, node: CfgNode) -> list[Table]:
    """Return the tables of the layout, or what LABEL_MAP and REDUCE_ZERO_LABEL make of them."""
    if not node.LABEL_MAP and node.REDUCE_ZERO_LABEL == "auto":
        return listing.tables
    if dataset in ("cityscapes", "pets"):
        raise LabelError(
            f"SEGMENTATION.LABEL_MAP and REDUCE_ZERO_LABEL: the values of {dataset} are fixed; "
            'leave them "" and auto'
        )
    if node.LABEL_MAP and node.REDUCE_ZERO_LABEL != "auto":
        raise LabelError(
            "SEGMENTATION.LABEL_MAP and REDUCE_ZERO_LABEL are both given; give the whole map in "
            "LABEL_MAP and set REDUCE_ZERO_LABEL to auto"
        )
    count = len(listing.classes)
    if node.LABEL_MAP:
        return [parse_label_map(node.LABEL_MAP, count)]
    return [shifted_table(count) if node.REDUCE_ZERO_LABEL == "shift" else plain_table(count)]


def _check_files(files: list[Path], what: str) -> None:
    """Refuse a split without files, or with absent ones."""
    with ThreadPoolExecutor(16) as pool:  # most of the time is waiting for the disk
        there = list(pool.map(Path.is_file, files))
    absent = [file for file, found in zip(files, there, strict=True) if not found]
    if absent:
        raise LabelError(
            f"{len(absent)} of {len(files)} {what} are absent, e.g. {absent[0]}; check DATA.PATH"
        )
    if not files:
        raise LabelError(f"DATA.PATH: there are no {what}; check DATA.PATH and the split's name")


def _look_at_some(data: SegmentationData) -> None:
    """Read a few label maps: refuse a wrong kind of mask or LABEL_MAP before a run."""
    # Spread over the split: a mistake may be in a part of it only.
    for index in range(0, len(data), -(-len(data) // _LOOKED_AT)):
        try:
            data.sample(index)
        except LabelError:
            raise
        except Exception:  # a damaged file: the loader treats it
            continue
