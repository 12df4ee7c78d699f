"""Read COCO's JSON and Pascal VOC's XML, with errors that name the file and the entry."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from data.decode import MAX_PIXELS, decode_rgb
from data.sources.base import digest
from utils.reading import read_text

logger = logging.getLogger("synco")

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
    ),
    "tvmonitor",
)


class AnnotationError(ValueError):
    """Annotations that cannot be used; the message names the file and the entry."""


@dataclass(frozen=True)
class Objects:
    """The objects of an image: `boxes` float32 (n,4) as x1, y1, x2, y2, `labels` int64 (n,) from 1.

    `ignored` (n,) marks crowds (COCO) and difficult objects (VOC); `polygons` holds, for each
    object, flat lists x, y, x, y, ..., and is empty where there are no masks.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    polygons: tuple[tuple[tuple[float, ...], ...], ...] = ()

    def chosen(self, keep: np.ndarray) -> "Objects":
        """Return the objects for which `keep` (n,) holds."""
        polygons = tuple(p for p, kept in zip(self.polygons, keep, strict=True) if kept)
        return Objects(
            self.boxes[keep],
            self.labels[keep],
            self.ignored[keep],
            polygons if self.polygons else (),
        )


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

    def load(self, index: int) -> Any:
        """Read an image as uint8 (3,H,W) RGB."""
        return decode_rgb(self.files[index].read_bytes(), self.max_pixels)

    def fingerprint(self) -> str:
        """Digest the names of the images and every box and label."""
        names = "\n".join(
            f"{file.name} {ident}" for file, ident in zip(self.files, self.ids, strict=True)
        )
        parts = [part for o in self.objects for part in (o.boxes, o.labels)]
        return digest(len(self), names.encode(), "\n".join(self.classes).encode(), *parts)

    def for_training(self) -> "DetectionData":
        """Leave out COCO's crowds, and images that then show nothing, as published detectors do."""
        objects = [o.chosen(~o.ignored) if self.annotation_file else o for o in self.objects]
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


def read_split(dataset: str, root: str, split: str, classes: str = "") -> DetectionData:
    """Read a split of `coco` or `voc` below `root`; `classes` are `DETECTION.CLASSES`."""
    if not root or not Path(root).is_dir():
        raise AnnotationError(
            f"DATA.PATH (--data-path): {root!r} is no folder; give the data set's root"
        )
    if dataset == "coco":
        if classes:
            raise AnnotationError(
                f"DETECTION.CLASSES: {classes!r}; COCO's file names its classes, leave it empty"
            )
        return read_coco(Path(root), split)
    return read_voc(
        Path(root), split, [name.strip() for name in classes.split(",") if name.strip()]
    )


# ---- COCO ----------------------------------------------------------------------------------------


def read_coco(root: Path, split: str) -> DetectionData:
    """Read annotations/instances_<split>.json and the images in <split>/, labels by category id."""
    file = root / "annotations" / f"instances_{split}.json"
    tree = _read_json(file)
    try:
        categories = sorted((int(entry["id"]), str(entry["name"])) for entry in tree["categories"])
        images = {int(entry["id"]): entry for entry in tree["images"]}
        found: dict[int, list[dict[str, Any]]] = {ident: [] for ident in images}
        for entry in tree["annotations"]:
            if entry["image_id"] not in found:
                raise AnnotationError(
                    f"{file}: annotation {entry.get('id')} is of image {entry['image_id']}, which "
                    "it lacks"
                )
            found[entry["image_id"]].append(entry)
        names = [(root / split / str(images[ident]["file_name"])) for ident in images]
        sizes = [(float(image["width"]), float(image["height"])) for image in images.values()]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(
            f"{file}: {error!r}; expected COCO's images, annotations and categories"
        ) from error
    if len(images) != len(tree["images"]):
        raise AnnotationError(f"{file}: two images have the same id; ids must differ")
    _check_files(names, file)
    labels = {ident: label for label, (ident, _) in enumerate(categories, start=1)}
    objects = [
        _coco_objects(found[ident], size, labels, file)
        for ident, size in zip(images, sizes, strict=True)
    ]
    return DetectionData(
        tuple(names),
        tuple(images),
        tuple(objects),
        tuple(name for _, name in categories),
        tuple(ident for ident, _ in categories),
        annotation_file=file,
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_bytes())
    except OSError as error:
        raise AnnotationError(
            f"{file}: cannot be read ({error.strerror}); check DATA.PATH and the DETECTION.*_SPLIT"
        ) from error
    except ValueError as error:
        raise AnnotationError(f"{file}: is not valid JSON ({error})") from error
    lacking = {"images", "annotations", "categories"} - set(tree if isinstance(tree, dict) else ())
    if lacking:
        raise AnnotationError(
            f"{file}: has no {', '.join(sorted(lacking))}; expected COCO's instances file"
        )
    return tree


def _coco_objects(
    entries: list[dict[str, Any]], size: tuple[float, float], labels: dict[int, int], file: Path
) -> Objects:
    boxes, names, crowd, polygons = [], [], [], []
    limit = np.array(size * 2, dtype=np.float32)
    for entry in entries:
        box, where = entry.get("bbox"), f"{file}: annotation {entry.get('id')}"
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not np.isfinite(np.array(box, dtype=float)).all()
        ):
            raise AnnotationError(f"{where}: bbox {box!r} is not x, y, width, height")
        if entry.get("category_id") not in labels:
            raise AnnotationError(f"{where}: there is no category {entry.get('category_id')!r}")
        x, y, width, height = box
        corners = np.minimum(
            np.maximum(np.array([x, y, x + width, y + height], dtype=np.float32), 0), limit
        )
        if (corners[2:] - corners[:2]).min() <= 1e-5:
            continue  # COCO has a few, and all published detectors drop them
        outline = entry.get("segmentation")
        boxes.append(corners)
        names.append(labels[entry["category_id"]])
        crowd.append(bool(entry.get("iscrowd", 0)))
        polygons.append(_polygons(outline, where) if isinstance(outline, list) else ())
    return _objects(boxes, names, crowd, tuple(polygons))


def _polygons(outline: list[Any], where: str) -> tuple[tuple[float, ...], ...]:
    for polygon in outline:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise AnnotationError(f"{where}: a polygon needs x, y of at least three corners")
    return tuple(tuple(map(float, polygon)) for polygon in outline)


def _objects(
    boxes: list[np.ndarray],
    labels: list[int],
    ignored: list[bool],
    polygons: tuple[tuple[tuple[float, ...], ...], ...] = (),
) -> Objects:
    corners = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Objects(
        corners, np.array(labels, dtype=np.int64), np.array(ignored, dtype=bool), polygons
    )


# ---- Pascal VOC ----------------------------------------------------------------------------------


def read_voc(root: Path, split: str, classes: Sequence[str] = ()) -> DetectionData:
    """Read ``<year>_<list>`` splits joined by ``+`` below `root` or `root`/VOCdevkit.

    Boxes become 0-based and half-open: VOC's (xmin, ymin, xmax, ymax) count pixels from 1, both
    included.
    """
    classes = tuple(classes) or VOC_CLASSES
    home = root / "VOCdevkit" if (root / "VOCdevkit").is_dir() else root
    files: list[Path] = []
    ids: list[int | str] = []
    objects: list[Objects] = []
    years = []
    for part in split.split("+"):
        year, _, name = part.partition("_")
        folder = home / f"VOC{year}"
        names = _voc_list(folder / "ImageSets" / "Main" / f"{name}.txt", part)
        files += [folder / "JPEGImages" / f"{ident}.jpg" for ident in names]
        ids += [f"{year}/{ident}" for ident in names]
        objects += [
            _voc_objects(folder / "Annotations" / f"{ident}.xml", classes) for ident in names
        ]
        years.append(year)
    _check_files(files, home)
    numbers = tuple(range(1, len(classes) + 1))
    return DetectionData(
        tuple(files), tuple(ids), tuple(objects), classes, numbers, years=tuple(years)
    )


def _voc_list(file: Path, part: str) -> list[str]:
    try:
        names = [line.split()[0] for line in read_text(file).split("\n") if line.strip()]
    except OSError as error:
        raise AnnotationError(
            f"{file}: cannot be read ({error.strerror}); the split {part!r} means <year>_<list>, "
            "e.g. 2007_trainval, below DATA.PATH or its VOCdevkit"
        ) from error
    if not names:
        raise AnnotationError(f"{file}: names no image")
    return names


def _voc_objects(file: Path, classes: Sequence[str]) -> Objects:
    try:
        tree = ElementTree.parse(file)
    except (OSError, ElementTree.ParseError) as error:
        raise AnnotationError(f"{file}: cannot be read as XML ({error})") from error
    boxes, labels, difficult = [], [], []
    for number, entry in enumerate(tree.iterfind("object")):
        name = (entry.findtext("name") or "").strip()
        if name not in classes:
            raise AnnotationError(
                f"{file}: object {number} is a {name!r}, not one of {', '.join(classes)}; "
                "set DETECTION.CLASSES to the classes of this data set"
            )
        try:
            box = [
                float(entry.findtext(f"bndbox/{key}") or "")
                for key in ("xmin", "ymin", "xmax", "ymax")
            ]
        except ValueError:
            raise AnnotationError(
                f"{file}: object {number} ({name}) has no bndbox of four numbers"
            ) from None
        corners = np.array(
            [max(box[0] - 1, 0), max(box[1] - 1, 0), box[2], box[3]], dtype=np.float32
        )
        if (corners[2:] <= corners[:2]).any():
            raise AnnotationError(f"{file}: object {number} ({name}) has an empty bndbox {box}")
        boxes.append(corners)
        labels.append(classes.index(name) + 1)
        difficult.append((entry.findtext("difficult") or "0").strip() == "1")
    return _objects(boxes, labels, difficult)


def _check_files(files: Sequence[Path], source: Path) -> None:
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise AnnotationError(
            f"{source}: {len(absent)} of {len(files)} images are absent, e.g. {absent[0]}; check "
            "DATA.PATH"
        )
    if not files:
        raise AnnotationError(f"{source}: lists no image")
