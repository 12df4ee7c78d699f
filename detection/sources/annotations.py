"""Annotated images of a detection data set, whatever format they come from."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.decode import FORMATS, MAX_PIXELS, decode_rgb
from data.sources.base import digest

logger = logging.getLogger("synco")

# Any data set has a few wrong boxes. More images than both have boxes of other images.
_FEW, _FEW_PERCENT = 5, 1.0
_AS_STORED = (
    "Boxes must be drawn on the image as it is stored, without its EXIF orientation: turn or "
    "resize the images, or correct the annotations"
)

# Of one object, float64 x, y, x, y, ... of each. Arrays: COCO's corners as Python's numbers would
# take a gigabyte in every process.
Polygons = tuple[np.ndarray, ...]


class AnnotationError(ValueError):
    """Annotations that cannot be used; the message names the file and the entry."""


@dataclass(frozen=True)
class Objects:
    """The objects of an image: `boxes` float32 (n,4) as x1, y1, x2, y2, `labels` int64 (n,) from 1.

    `ignored` (n,) marks crowds (COCO) and difficult objects (VOC); `polygons` holds those
    of each object and is empty where there are no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    polygons: tuple[Polygons, ...] = ()

    def chosen(self, keep: np.ndarray) -> "Objects":
        """Return the objects for which `keep` (n,) holds."""
        polygons = self.polygons
        if polygons:
            polygons = tuple(p for p, kept in zip(polygons, keep, strict=True) if kept)
        return Objects(self.boxes[keep], self.labels[keep], self.ignored[keep], polygons)


@dataclass(frozen=True)
class DetectionData:
    """Annotated images: `files`, their `ids` and `objects`; `classes` names labels 1, 2, ...

    `category_ids` are the data set's own numbers of the classes, `years` (VOC) those of the splits.
    """

    files: tuple[Path, ...]
    ids: tuple[int | str, ...]
    objects: tuple[Objects, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotation_file: Path | None = None
    years: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def name(self, index: int) -> str:
        """Return an image's path."""
        return str(self.files[index])

    def load(self, index: int) -> Tensor:
        """Read an image as uint8 (3,H,W) RGB."""
        return decode_rgb(self.files[index].read_bytes(), self.max_pixels)

    def sample(self, index: int) -> tuple[Tensor, Objects]:
        """Read an image and its objects."""
        return self.load(index), self.objects[index]

    def fingerprint(self) -> str:
        """Digest the names of the images and every box and label."""
        # The names without their folder, so that a data set may be moved.
        names = "\n".join(
            f"{file.name} {ident}" for file, ident in zip(self.files, self.ids, strict=True)
        )
        parts = [part for o in self.objects for part in (o.boxes, o.labels)]
        return digest(len(self), names.encode(), "\n".join(self.classes).encode(), *parts)

    def for_training(self) -> "DetectionData":
        """Leave out COCO's crowds, and images that then show nothing, as published detectors do."""
        # VOC's difficult objects are trained on, as published; they are left out of its metric.
        objects = [o.chosen(~o.ignored) if self.annotation_file else o for o in self.objects]
        self._check_polygons(objects)
        keep = [index for index, o in enumerate(objects) if len(o.labels)]
        if not keep:
            raise AnnotationError(
                f"DETECTION.TRAIN_SPLIT: none of {len(self)} images has an object"
            )
        if len(keep) < len(self):
            logger.info(
                "%d of %d training images show no object: left out",
                len(self) - len(keep),
                len(self),
            )
        return replace(
            self,
            files=tuple(self.files[i] for i in keep),
            ids=tuple(self.ids[i] for i in keep),
            objects=tuple(objects[i] for i in keep),
        )

    def _check_polygons(self, objects: Sequence[Objects]) -> None:
        """Refuse an object without polygons where others have them: its mask would be empty."""
        for file, item in zip(self.files, objects, strict=True):
            # Not strict: without masks there are boxes and no polygons.
            for box, polygons in zip(item.boxes.tolist(), item.polygons, strict=False):
                if not polygons:
                    raise AnnotationError(
                        f"{self.annotation_file}: {file.name}: the object at (x1, y1, x2, y2) "
                        f"{box} has a run-length encoded mask, and masks are trained from "
                        "polygons; convert it to polygons, or set MODEL.RCNN.MASKS to False"
                    )


def make_objects(
    boxes: Sequence[np.ndarray],
    labels: Sequence[int],
    ignored: Sequence[bool],
    polygons: tuple[Polygons, ...] = (),
) -> Objects:
    """Return the objects of an image, which may be none, as arrays."""
    return Objects(
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(ignored, dtype=bool),
        polygons,
    )


def check_files(files: Sequence[Path], source: Path) -> None:
    """Refuse a data set without images, or with absent ones."""
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise AnnotationError(
            f"{source}: {len(absent)} of {len(files)} images are absent, e.g. {absent[0]}; check "
            "DATA.PATH"
        )
    if not files:
        raise AnnotationError(f"{source}: lists no image")


def check_sizes(files: Sequence[Path], expected: Sequence[tuple[int, int]], source: Path) -> None:
    """Compare every image's head with the width and height that its boxes were drawn for."""
    wrong = []
    for file, size, drawn in zip(files, _stored_sizes(files), expected, strict=True):
        if size is not None and size != drawn:
            wrong.append(
                f"{file} has {size[0]} x {size[1]} pixels, its entry says {drawn[0]} x {drawn[1]}"
            )
    if wrong:
        raise AnnotationError(
            f"{source}: {len(wrong)} of {len(files)} images have another width and height than "
            f"their entries, e.g. {wrong[0]}. {_AS_STORED}"
        )


def check_boxes(files: Sequence[Path], objects: Sequence[Objects], source: Path) -> None:
    """Compare the boxes with the images' own sizes, where no entry can be trusted to tell them.

    Boxes of a few images that end outside are reported, those of many are refused.
    """
    outside = []
    for file, size, item in zip(files, _stored_sizes(files), objects, strict=True):
        if size is None or not len(item.boxes):
            continue
        right, bottom = item.boxes[:, 2:].max(axis=0).tolist()
        if right > size[0] + 1 or bottom > size[1] + 1:
            outside.append(
                f"{file} has {size[0]} x {size[1]} pixels, and boxes up to {right:g} x {bottom:g}"
            )
    if not outside:
        return
    message = (
        f"{source}: boxes of {len(outside)} of {len(files)} images end outside of their image, "
        f"e.g. {outside[0]}. {_AS_STORED}"
    )
    if len(outside) > max(_FEW, _FEW_PERCENT / 100 * len(files)):
        raise AnnotationError(message)
    logger.warning(message)


def _stored_sizes(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    with ThreadPoolExecutor(16) as pool:  # most of the time is waiting for the disk
        return list(pool.map(_stored_size, files))


def _stored_size(file: Path) -> tuple[int, int] | None:
    """Return width and height, None for a damaged image, which the loader treats."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.size
    except Exception:  # whatever a decoder may raise
        return None
