"""Read COCO's instances JSON. What only the evaluator would read is checked here, before training.

Numbers may be written as text. Errors name the file, the entry, the value and the remedy.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.sources.annotations import (
    AnnotationError,
    DetectionData,
    Objects,
    Polygons,
    check_files,
    check_sizes,
    make_objects,
)
from utils import distributed
from utils.reading import read_bytes

logger = logging.getLogger("synco")

_LARGEST = 1 << 53  # of an id: the evaluators keep ids as 64-bit numbers, some as floats
_SMALLEST_SIDE = 1e-5  # of a box inside its image, in pixels
_LAYOUT = "expected the images, annotations and categories of COCO's instances file"
_NO_MASK = "or set MODEL.RCNN.MASKS to False"


@dataclass(frozen=True)
class Picture:
    """An image of the file: its `name` and its size in pixels."""

    name: str
    width: int
    height: int


@dataclass(frozen=True)
class Annotation:
    """An object of the file; `box` is x, y, width, height, `segmentation` None without masks."""

    place: str
    image: int
    category: int
    box: tuple[float, ...]
    crowd: bool
    area: float
    segmentation: Polygons | Mapping[str, object] | None

    def corners(self, picture: Picture) -> np.ndarray:
        """Return x1, y1, x2, y2, cut off at the image's border, float32 (4,)."""
        x, y, width, height = self.box
        corners = np.array([x, y, x + width, y + height], dtype=np.float32)
        limit = np.array([picture.width, picture.height] * 2, dtype=np.float32)
        return np.minimum(np.maximum(corners, 0), limit)


@dataclass(frozen=True)
class CocoFile:
    """The checked content of an instances file; boxes of no size inside their image are `dropped`.

    `categories` are (id, name), sorted by id.
    """

    pictures: dict[int, Picture]
    categories: list[tuple[int, str]]
    annotations: list[Annotation]
    dropped: list[Annotation]


def read_coco(root: Path, split: str, masks: bool = False) -> DetectionData:
    """Read annotations/instances_<split>.json and the images in <split>/, labels by category id.

    With `masks` the segmentations are read and checked too.
    """
    file = root / "annotations" / f"instances_{split}.json"
    content = parse_coco(file, masks)
    names = [root / split / picture.name for picture in content.pictures.values()]
    check_files(names, file)
    # one process looks into the images: their heads may be on a slow disk
    sizes = [(picture.width, picture.height) for picture in content.pictures.values()]
    distributed.on_main(lambda: check_sizes(names, sizes, file))
    _say_dropped(content, file)
    found: dict[int, list[Annotation]] = {ident: [] for ident in content.pictures}
    for annotation in content.annotations:
        found[annotation.image].append(annotation)
    # ids have gaps, labels have none, and label 0 is the background
    labels = {ident: label for label, (ident, _) in enumerate(content.categories, start=1)}
    return DetectionData(
        tuple(names),
        tuple(content.pictures),
        tuple(
            _objects(found[ident], picture, labels, masks)
            for ident, picture in content.pictures.items()
        ),
        tuple(name for _, name in content.categories),
        tuple(ident for ident, _ in content.categories),
        annotation_file=file,
    )


def _say_dropped(content: CocoFile, file: Path) -> None:
    if content.dropped:
        first = content.dropped[0]
        logger.warning(
            "%s: %d of %d boxes have no size inside their image and are left out, e.g. %s, bbox %s",
            file,
            len(content.dropped),
            len(content.dropped) + len(content.annotations),
            first.place,
            list(first.box),
        )


def parse_coco(file: Path, masks: bool) -> CocoFile:
    """Read and check an instances file; segmentations only with `masks`."""
    tree = _read_json(file)
    pictures: dict[int, Picture] = {}
    for entry in _entries(tree, "images", file):
        ident = entry.whole("id")
        if ident in pictures:
            raise entry.error("another image has the same id; ids must differ")
        sides = entry.whole("width"), entry.whole("height")
        pictures[ident] = Picture(entry.text("file_name"), *sides)
    categories: dict[int, str] = {}
    for entry in _entries(tree, "categories", file):
        ident = entry.whole("id")
        if ident in categories:
            raise entry.error("another category has the same id; ids must differ")
        categories[ident] = entry.text("name")
    annotations: list[Annotation] = []
    dropped: list[Annotation] = []
    for entry in _entries(tree, "annotations", file):
        annotation = _annotation(entry, pictures, categories, masks)
        # Cut off at the border first: a box may lie outside of its image.
        corners = annotation.corners(pictures[annotation.image])
        # COCO has a few such boxes, and all published detectors drop them
        empty = (corners[2:] - corners[:2]).min() <= _SMALLEST_SIDE
        (dropped if empty else annotations).append(annotation)
    return CocoFile(pictures, sorted(categories.items()), annotations, dropped)


def ground_truth(file: Path, masks: bool) -> dict[str, list[dict[str, object]]]:
    """Return what COCO's evaluators need of an instances file, as numbers of their types.

    The annotations get new ids from 1: the evaluators take id 0 for "nothing found", and of
    annotations with one id they see the last only.
    """
    content = parse_coco(file, masks)
    annotations: list[dict[str, object]] = []
    for number, item in enumerate(content.annotations, start=1):
        entry: dict[str, object] = {"id": number, "image_id": item.image}
        entry |= {"category_id": item.category, "bbox": list(item.box)}
        entry |= {"area": item.area, "iscrowd": int(item.crowd)}
        if isinstance(item.segmentation, Mapping):
            entry["segmentation"] = item.segmentation
        elif item.segmentation is not None:
            entry["segmentation"] = [polygon.tolist() for polygon in item.segmentation]
        annotations.append(entry)
    images: list[dict[str, object]] = [
        {"id": ident, "file_name": p.name, "width": p.width, "height": p.height}
        for ident, p in content.pictures.items()
    ]
    categories: list[dict[str, object]] = [
        {"id": ident, "name": name} for ident, name in content.categories
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


# ---- entries -------------------------------------------------------------------------------------


class _Entry:
    """One entry of a list in the file; what it lacks is an error that names file and entry."""

    def __init__(self, file: Path, kind: str, number: int, fields: object) -> None:
        # annotation ids may repeat or be absent, so the position names the entry as well
        self.file, self.place, self.fields = file, f"{kind}[{number}]", {}
        if not isinstance(fields, dict):
            raise self.error(f"is {fields!r}; {_LAYOUT}")
        self.fields = fields
        self.place += f" (id {fields.get('id')!r})"

    def error(self, problem: str) -> AnnotationError:
        return AnnotationError(f"{self.file}: {self.place}: {problem}")

    def whole(self, key: str, absent: int | None = None) -> int:
        value = self.fields.get(key)
        number = absent if value is None else _whole(value)
        if number is None:
            raise self.error(f"{key} {value!r} is not a whole number; write one")
        return number

    def text(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str) or not value:
            raise self.error(f"{key} {value!r} is not a text; write one")
        return value


def _entries(tree: Mapping[str, object], kind: str, file: Path) -> list[_Entry]:
    entries = tree[kind]
    if not isinstance(entries, list):
        raise AnnotationError(f"{file}: {kind} is not a list; {_LAYOUT}")
    return [_Entry(file, kind, number, fields) for number, fields in enumerate(entries)]


def _whole(value: object) -> int | None:
    """Return a whole number, which may be written as 7, 7.0 or "7", else None."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # True is an int to Python
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > _LARGEST:
        return None
    return value


def _numbers(values: object) -> tuple[float, ...] | None:
    """Return a list of finite numbers, which may be written as text, else None."""
    if not isinstance(values, list):
        return None
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _annotation(
    entry: _Entry, pictures: Mapping[int, Picture], categories: Mapping[int, str], masks: bool
) -> Annotation:
    fields = entry.fields
    image, category = entry.whole("image_id"), entry.whole("category_id")
    if image not in pictures:
        raise entry.error(f"image_id {image} is not among the images; add the image or remove it")
    if category not in categories:
        raise entry.error(f"category_id: there is no category {category}; add it or correct the id")
    box = _numbers(fields.get("bbox"))
    if box is None or len(box) != 4:
        raise entry.error(
            f"bbox {fields.get('bbox')!r} is not x, y, width, height; write four numbers"
        )
    crowd = entry.whole("iscrowd", absent=0)
    if crowd not in (0, 1):
        raise entry.error(f"iscrowd {crowd} is neither 0 nor 1; write one of them")
    area = fields.get("area")
    areas = _numbers([box[2] * box[3] if area is None else area])
    if areas is None:
        raise entry.error(f"area {area!r} is not a number of pixels; correct or remove it")
    outline = _segmentation(entry, pictures[image], bool(crowd)) if masks else None
    return Annotation(entry.place, image, category, box, bool(crowd), areas[0], outline)


def _segmentation(entry: _Entry, picture: Picture, crowd: bool) -> Polygons | Mapping[str, object]:
    """Return the polygons, or the run lengths that crowds have, as the evaluator can read them."""
    value = entry.fields.get("segmentation")
    if isinstance(value, dict):
        if not _is_run_length(value, picture):
            raise entry.error(
                "segmentation is not a run-length encoding of the image's "
                f"{picture.height} x {picture.width} pixels (size, counts); correct it, {_NO_MASK}"
            )
        # Without other fields: the evaluators read these two.
        return {"size": [picture.height, picture.width], "counts": value["counts"]}
    if not isinstance(value, list) or not value:
        raise entry.error(f"segmentation {value!r} gives no mask; add polygons, {_NO_MASK}")
    polygons = []
    for corners in value:
        polygon = _numbers(corners)
        if polygon is None or len(polygon) < 6 or len(polygon) % 2:
            raise entry.error(
                f"segmentation: a polygon needs x, y of at least three corners, not {corners!r}; "
                f"correct it, {_NO_MASK}"
            )
        polygons.append(np.array(polygon))
    return tuple(polygons)


def _is_run_length(value: Mapping[str, object], picture: Picture) -> bool:
    """Tell whether the runs of 0 and 1 fill the image; the evaluators do not check it."""
    counts = value.get("counts")
    runs = uncompressed(counts) if isinstance(counts, str) else counts
    # Runs are column by column, and the size is rows, columns.
    if value.get("size") != [picture.height, picture.width] or not isinstance(runs, list):
        return False
    if not all(isinstance(run, int) and run >= 0 for run in runs):
        return False
    return sum(runs) == picture.height * picture.width


def uncompressed(text: str) -> list[int]:
    """Return the run lengths of COCO's compressed text, nothing for a text that is damaged.

    A character holds five bits, the lowest first, and whether more follow. From the fourth on, a
    run is stored as its difference to the run two before it.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return []
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # the sign
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return [] if shift else runs


# ---- objects -------------------------------------------------------------------------------------


def _objects(
    annotations: Sequence[Annotation], picture: Picture, labels: Mapping[int, int], masks: bool
) -> Objects:
    polygons: list[Polygons] = []
    for item in annotations if masks else ():
        # run lengths are for the evaluator; training leaves crowds out and needs polygons
        polygons.append(item.segmentation if isinstance(item.segmentation, tuple) else ())
    return make_objects(
        [item.corners(picture) for item in annotations],
        [labels[item.category] for item in annotations],
        [item.crowd for item in annotations],
        tuple(polygons),
    )


def _read_json(file: Path) -> Mapping[str, object]:
    try:
        tree = json.loads(read_bytes(file))
    except OSError as error:
        raise AnnotationError(
            f"{file}: cannot be read ({error.strerror or error}); check DATA.PATH and the "
            "DETECTION.*_SPLIT"
        ) from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: is not valid JSON ({error})") from error
    lacking = {"images", "annotations", "categories"} - set(tree if isinstance(tree, dict) else ())
    if lacking:
        raise AnnotationError(f"{file}: has no {', '.join(sorted(lacking))}; {_LAYOUT}")
    return tree
