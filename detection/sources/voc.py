"""Read Pascal VOC's lists and XML, with errors that name the file and the object."""

import math
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from detection.sources.annotations import (
    AnnotationError,
    DetectionData,
    Objects,
    check_boxes,
    check_files,
    make_objects,
)
from utils import distributed
from utils.reading import read_bytes, read_text

VOC_CLASSES = tuple(
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor".split()
)
# VOC's own ending first; labelling tools keep the camera's
_ENDINGS = (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def read_voc(root: Path, split: str, classes: Sequence[str] = ()) -> DetectionData:
    """Read `<year>_<list>` splits joined by `+` below `root` or `root`/VOCdevkit.

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
        for line in _voc_list(folder / "ImageSets" / "Main" / f"{name}.txt", part):
            ident = _ident(line, folder / "Annotations")
            xml = folder / "Annotations" / f"{ident}.xml"
            tree = _read_xml(xml)
            files.append(_image(folder / "JPEGImages", ident, tree, xml))
            ids.append(f"{year}/{ident}")
            objects.append(_voc_objects(tree, xml, classes))
        years.append(year)
    check_files(files, home)
    # one process looks into the images: their heads may be on a slow disk
    distributed.on_main(lambda: check_boxes(files, objects, home))
    numbers = tuple(range(1, len(classes) + 1))
    return DetectionData(
        tuple(files), tuple(ids), tuple(objects), classes, numbers, years=tuple(years)
    )


def _voc_list(file: Path, part: str) -> list[str]:
    """Return the lines of a list of images."""
    try:
        lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    except OSError as error:
        raise AnnotationError(
            f"{file}: cannot be read ({error.strerror or error}); the split {part!r} means "
            "<year>_<list>, e.g. 2007_trainval, below DATA.PATH or its VOCdevkit"
        ) from error
    if not lines:
        raise AnnotationError(f"{file}: names no image")
    return lines


def _ident(line: str, annotations: Path) -> str:
    """Return the image's name in a line of a list. A name may hold spaces."""
    if len(line.split()) == 1:
        return line
    # VOC's lists of one class have 1, 0 or -1 behind the name
    for name in (line, line.rsplit(None, 1)[0], line.split()[0]):
        if (annotations / f"{name}.xml").is_file():
            return name
    return line


def _read_xml(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(read_bytes(file))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"{file}: cannot be read as XML ({error})") from error


def _image(folder: Path, ident: str, tree: ElementTree.Element, xml: Path) -> Path:
    """Return the image of an annotation file: the one of its name, or that of its <filename>."""
    # some tools write a path of another machine there, also of Windows
    name = (tree.findtext("filename") or "").strip().replace("\\", "/").rsplit("/", 1)[-1]
    named = folder / name if name and (folder / name).is_file() else None
    own = next((f for e in _ENDINGS if (f := folder / f"{ident}{e}").is_file()), None)
    if named is None:
        return own or folder / f"{ident}{_ENDINGS[0]}"
    if own is not None and named.stem != ident:
        raise AnnotationError(
            f"{xml}: <filename> is {name!r}, but there is an image {own.name} too; correct "
            "<filename> or remove it"
        )
    return named


def _voc_objects(tree: ElementTree.Element, file: Path, classes: Sequence[str]) -> Objects:
    boxes, labels, difficult = [], [], []
    for number, entry in enumerate(tree.iterfind("object")):
        name = (entry.findtext("name") or "").strip()
        where = f"{file}: object {number} ({name})"
        if name not in classes:
            raise AnnotationError(
                f"{file}: object {number} is a {name!r}, not one of {', '.join(classes)}; "
                "set DETECTION.CLASSES to the classes of this data set"
            )
        boxes.append(_corners(entry, where))
        labels.append(classes.index(name) + 1)
        # a difficult object counts neither as found nor as missed
        difficult.append((entry.findtext("difficult") or "0").strip() == "1")
    return make_objects(boxes, labels, difficult)


def _corners(entry: ElementTree.Element, where: str) -> np.ndarray:
    texts = [entry.findtext(f"bndbox/{side}") for side in _SIDES]
    try:
        box = [float(text or "") for text in texts]
    except ValueError:
        box = []
    # float() reads "nan" and "inf" too, and every comparison with nan is false
    if not box or not all(map(math.isfinite, box)):
        raise AnnotationError(
            f"{where}: bndbox {texts} is not four numbers ({', '.join(_SIDES)}); correct it"
        )
    # pixel 1 begins at 0; some tools write 0 for the first pixel too
    corners = np.array([max(box[0] - 1, 0), max(box[1] - 1, 0), box[2], box[3]], dtype=np.float32)
    if (corners[2:] <= corners[:2]).any():
        raise AnnotationError(f"{where} has an empty bndbox {box}; correct or remove the object")
    return corners
