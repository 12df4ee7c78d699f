"""Open a split of a detection data set by its configuration."""

from pathlib import Path

from detection.sources.annotations import AnnotationError, DetectionData
from detection.sources.coco import read_coco
from detection.sources.voc import read_voc


def read_split(
    dataset: str, root: str, split: str, classes: str = "", masks: bool = False
) -> DetectionData:
    """Read a split of `coco` or `voc` below `root`; `classes` are `DETECTION.CLASSES`."""
    if not root or not Path(root).is_dir():
        raise AnnotationError(
            f"DATA.PATH (--data-path): {root!r} is no folder; give the data set's root"
        )
    match dataset:
        case "coco":
            if classes:
                raise AnnotationError(
                    f"DETECTION.CLASSES: {classes!r}; COCO's file names its classes, leave it empty"
                )
            return read_coco(Path(root), split, masks)
        case "voc":
            names = [name.strip() for name in classes.split(",") if name.strip()]
            return read_voc(Path(root), split, names)
    raise AnnotationError(f"DATA.DATASET: {dataset!r} has no reader; use coco or voc")
