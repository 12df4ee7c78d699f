"""Find the images, label maps and classes of a split in the layouts of public data sets."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from segmentation.sources import names
from segmentation.sources.labels import (
    LabelError,
    Table,
    check_classes,
    plain_table,
    shifted_table,
    table_of,
)
from utils.reading import read_text

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Listing:
    """Images and their label maps; `tables[chosen[i]]` is that of label map i."""

    files: list[Path]
    labels: list[Path]
    classes: list[str]
    tables: list[Table]
    chosen: list[int]


def one_table(
    pairs: Iterable[tuple[Path, Path]],
    classes: list[str],
    table: Callable[[int], Table] = plain_table,
) -> Listing:
    """Return the listing of (image, label map) pairs that share a table."""
    files, labels = [], []
    for file, label in pairs:
        files.append(file)
        labels.append(label)
    return Listing(files, labels, classes, [table(len(classes))], [0] * len(files))


# ---- ADE20K --------------------------------------------------------------------------------------


def ade20k(root: Path, split: str, classes: list[str]) -> Listing:
    """Read `images/SPLIT/*.jpg` and `annotations/SPLIT/*.png`; 0 is no class, 1 the first."""
    home = _home(root, "images", "ADEChallengeData2016")
    if not classes:
        infos = sorted(home.glob("objectInfo*.txt"))
        classes = _object_info(infos[0]) if infos else list(names.ADE20K)
    pairs = _same_stems(home / "images" / split, home / "annotations" / split)
    return one_table(pairs, classes, shifted_table)


def _object_info(file: Path) -> list[str]:
    """Return the first name of each class: the last column of a table with a head."""
    rows = [line.split("\t") for line in read_text(file).split("\n")[1:] if line.strip()]
    classes = [row[-1].replace(";", ",").split(",")[0].strip() for row in rows]
    return check_classes(classes, str(file))


# ---- Pascal VOC ----------------------------------------------------------------------------------


def voc(root: Path, split: str, classes: list[str]) -> Listing:
    """Read lists joined by `+`; a list with `aug` in its name reads SegmentationClassAug."""
    home = _home(root, "JPEGImages", "VOCdevkit/VOC2012", "VOC2012")
    # labelling tools keep the camera's ending
    images = {os.path.splitext(name)[0]: name for name in _listed(home / "JPEGImages")}
    found: dict[str, Path] = {}
    for part in split.split("+"):
        folder = "SegmentationClassAug" if "aug" in part else "SegmentationClass"
        for line in _lines(home / "ImageSets" / "Segmentation" / f"{part}.txt"):
            # a common list has "/JPEGImages/NAME.jpg /SegmentationClassAug/NAME.png"
            ident = Path(line.split()[0]).stem if line.endswith(".png") else line
            if ident in found:
                raise LabelError(
                    f"SEGMENTATION: the split {split!r} lists {ident} twice; name lists that have "
                    "no image in common"
                )
            found[ident] = home / folder / f"{ident}.png"
    pairs = []
    for ident, label in found.items():
        pairs.append((home / "JPEGImages" / images.get(ident, f"{ident}.jpg"), label))
    return one_table(pairs, classes or list(names.VOC))


# ---- Cityscapes ----------------------------------------------------------------------------------


def cityscapes(root: Path, split: str, classes: list[str]) -> Listing:
    """Read `leftImg8bit/SPLIT/CITY` and `gtFine`: training ids where there are such, else ids."""
    _no_names("cityscapes", classes)
    known = set(_listed(root / "gtFine" / split))
    ids = {value: names.CITYSCAPES_IDS.index(value) for value in names.CITYSCAPES_IDS}
    tables = [
        plain_table(len(names.CITYSCAPES)),
        table_of({value: ids.get(value, 255) for value in names.CITYSCAPES_ALL_IDS}),
    ]
    files, labels, chosen = [], [], []
    ending = "_leftImg8bit.png"
    for name in _listed(root / "leftImg8bit" / split):
        if not name.endswith(ending):
            continue
        stem = name.removesuffix(ending)
        trained = f"{stem}_gtFine_labelTrainIds.png"
        label = trained if trained in known else f"{stem}_gtFine_labelIds.png"
        files.append(root / "leftImg8bit" / split / name)
        labels.append(root / "gtFine" / split / label)
        chosen.append(0 if label == trained else 1)
    return Listing(files, labels, list(names.CITYSCAPES), tables, chosen)


# ---- pairs of folders ----------------------------------------------------------------------------


def folders(root: Path, split: str, classes: list[str]) -> Listing:
    """Read `images/SPLIT/**` and `labels/SPLIT/**` of equal stems, and `classes.txt`."""
    if not classes:
        file = root / "classes.txt"
        classes = check_classes(_lines(file, "one class a line"), str(file))
    return one_table(_same_stems(root / "images" / split, root / "labels" / split), classes)


# ---- Oxford-IIIT Pet -----------------------------------------------------------------------------


def pets(root: Path, split: str, classes: list[str], species: bool) -> Listing:
    """Read the trimaps (1 pet, 2 background, 3 border) of a list: pets, or cats and dogs."""
    _no_names("pets", classes)
    home = _home(root, "annotations", "oxford-iiit-pet")
    file = home / "annotations" / f"{split}.txt"
    stems, chosen = [], []
    for line in _lines(file):
        if line.startswith("#"):
            continue
        words = line.split()
        if len(words) < 3 or words[2] not in ("1", "2"):
            raise LabelError(
                f"{file}: {line!r} is not NAME CLASS SPECIES with species 1 (cat) or 2 (dog)"
            )
        stems.append(words[0])
        chosen.append(int(words[2]) - 1 if species else 0)
    animals = ["cat", "dog"] if species else ["pet"]
    return Listing(
        [home / "images" / f"{stem}.jpg" for stem in stems],
        [home / "annotations" / "trimaps" / f"{stem}.png" for stem in stems],
        ["background", *animals],
        [table_of({1: number + 1, 2: 0, 3: 255}) for number in range(len(animals))],
        chosen,
    )


# ---- shared --------------------------------------------------------------------------------------


def _no_names(dataset: str, classes: list[str]) -> None:
    if classes:
        raise LabelError(
            f"SEGMENTATION.CLASSES: {', '.join(classes)}; the classes of {dataset} are fixed, "
            "leave it empty"
        )


def _home(root: Path, inside: str, *below: str) -> Path:
    """Return the folder that holds `inside`: one of `below`, else the root."""
    for name in below:
        if (root / name / inside).is_dir():
            return root / name
    if (root / inside).is_dir():
        return root
    places = " or ".join(str(root / name / inside) for name in ("", *below))
    raise LabelError(f"DATA.PATH (--data-path): there is no folder {places}")


def _lines(file: Path, meaning: str = "one image a line") -> list[str]:
    """Return the lines of a list, without empty ones."""
    try:
        lines = [line.strip() for line in read_text(file).split("\n") if line.strip()]
    except OSError as error:
        raise LabelError(
            f"{file}: cannot be read ({error.strerror or error}); it should hold {meaning}. Check "
            "DATA.PATH, SEGMENTATION.TRAIN_SPLIT and TEST_SPLIT"
        ) from error
    if not lines:
        raise LabelError(f"{file}: is empty; it should hold {meaning}")
    return lines


def _listed(folder: Path) -> list[str]:
    """Return the files below a folder, sorted, as paths relative to it."""
    if not folder.is_dir():
        raise LabelError(
            f"{folder}: is no folder; check DATA.PATH, SEGMENTATION.TRAIN_SPLIT and TEST_SPLIT"
        )
    found = []
    for parent, _, files in os.walk(folder, followlinks=True):
        inner = os.path.relpath(parent, folder)
        found += [name if inner == "." else f"{inner}/{name}" for name in files]
    # macOS writes ._NAME beside a file on foreign disks
    return sorted(name for name in found if not name.rpartition("/")[2].startswith("."))


def _same_stems(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Pair the images of a folder with the label maps of another that have the same names."""
    stems: dict[str, str] = {}
    for name in _listed(images):
        stem, ending = os.path.splitext(name)
        if ending.lower() not in _ENDINGS:
            continue
        if stem in stems:
            raise LabelError(
                f"{images / name} and {images / stems[stem]} have one label map; rename one"
            )
        stems[stem] = name
    alone = [n for n in _listed(labels) if n.endswith(".png") and n[:-4] not in stems]
    if alone:
        raise LabelError(
            f"{images}: {len(alone)} label maps have no image, e.g. {labels / alone[0]}; add the "
            "images or remove the label maps"
        )
    return [(images / name, labels / f"{stem}.png") for stem, name in stems.items()]
