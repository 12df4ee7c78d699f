"""Files in a published layout: Oxford pets, Tiny-ImageNet, one flat folder cut in two."""

import os
from pathlib import Path

import numpy as np

from data.sources.base import compare_labels
from data.sources.folder import FileSource, refuse_empty
from data.sources.folder_index import list_images
from data.sources.in_memory import require
from data.sources.scan import PassedOver, is_folder, read_folder
from utils.distributed import on_main
from utils.reading import read_text

# By class id, 1 to 37: alphabetical whatever the case; capitals mark the cats.
PET_BREEDS = """
    Abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle Bengal Birman Bombay
    boxer British_Shorthair chihuahua Egyptian_Mau english_cocker_spaniel english_setter
    german_shorthaired great_pyrenees havanese japanese_chin keeshond leonberger Maine_Coon
    miniature_pinscher newfoundland Persian pomeranian pug Ragdoll Russian_Blue saint_bernard
    samoyed scottish_terrier shiba_inu Siamese Sphynx staffordshire_bull_terrier wheaten_terrier
    yorkshire_terrier
""".split()
_PETS, _TINY = "oxford-iiit-pet", "tiny-imagenet-200"


def pets(path: str, split: str, download: bool = False) -> FileSource:
    """Return the Oxford-IIIT pets, 37 breeds: train = trainval, val = test.

    `path` is the folder oxford-iiit-pet or the one that holds it; only the main process downloads.
    """
    if download:
        parent = Path(path).parent if Path(path).name == _PETS else Path(path)
        on_main(lambda: _download_pets(parent))
    root = _inside(path, _PETS, "annotations", "pets", ", or add --download")
    listing = root / "annotations" / {"train": "trainval.txt", "val": "test.txt"}[split]
    rows = [line.split() for line in _read(listing, "pets") if not line.startswith("#")]
    wrong = [row for row in rows if len(row) < 2 or row[1] not in _PET_IDS]
    if wrong:
        line = " ".join(wrong[0])
        raise ValueError(f"{listing}: {line!r} is not <image> <class id from 1 to 37> ...")
    names = [f"{row[0]}.jpg" for row in rows]
    # one listing of the folder, not a look at each of thousands of files
    _refuse_missing(root / "images", names, listing)
    return FileSource(root / "images", names, [int(row[1]) - 1 for row in rows], PET_BREEDS)


_PET_IDS = {str(number) for number in range(1, len(PET_BREEDS) + 1)}


def _download_pets(parent: Path) -> bool:
    datasets = require("torchvision.datasets", "pets", "torchvision")
    return bool(datasets.OxfordIIITPet(str(parent), download=True))


def tinyimagenet(path: str, split: str, index_cache: str = "off") -> FileSource:
    """Return Tiny-ImageNet, 200 classes in the order of their wnids: train, and val for val.

    `path` is the folder tiny-imagenet-200 or the one that holds it. Classes are named by the first
    word of words.txt.
    """
    root = _inside(path, _TINY, "wnids.txt", "tinyimagenet")
    wnids = sorted(_read(root / "wnids.txt", "tinyimagenet"))
    lines = _read(root / "words.txt", "tinyimagenet")
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    classes = [words.get(wnid, wnid).split(",")[0] for wnid in wnids]
    if split == "train":
        return _tiny_train(root, wnids, classes, index_cache)
    rows = _tiny_val(root)
    unknown = sorted({wnid for _, wnid in rows} - set(wnids))
    if unknown:
        wrong = f"{split} has classes that wnids.txt lacks: {', '.join(unknown[:3])}"
        raise ValueError(f"{root}: {wrong}")
    number = {wnid: number for number, wnid in enumerate(wnids)}
    labels = np.array([number[wnid] for _, wnid in rows], dtype=np.int64)
    compare_labels(root / split, labels, np.arange(len(wnids)), classes)
    return FileSource(root, [name for name, _ in rows], labels, classes)


def _tiny_train(root: Path, wnids: list[str], classes: list[str], index_cache: str) -> FileSource:
    """Return the images of train/<wnid>/images/*."""
    groups = [(os.path.join("train", wnid, "images"), label) for label, wnid in enumerate(wnids)]
    listing = list_images(root, groups, index_cache)
    for (folder, _), count in zip(groups, listing.counts, strict=True):
        if not count:
            refuse_empty(root / folder, "unpack tiny-imagenet-200.zip again")
    return FileSource(root, listing.paths, listing.labels, classes, listing.fingerprint)


def _tiny_val(root: Path) -> list[tuple[str, str]]:
    """Return (path, wnid) of val/images/*, which val/val_annotations.txt labels."""
    listing = root / "val" / "val_annotations.txt"
    rows = [line.split("\t") for line in _read(listing, "tinyimagenet")]
    short = [row for row in rows if len(row) < 2]
    if short:
        raise ValueError(f"{listing}: {short[0][0]!r} is not <image> TAB <wnid> ...")
    _refuse_missing(root / "val" / "images", [row[0] for row in rows], listing)
    return [(os.path.join("val", "images", row[0]), row[1]) for row in rows]


def folder_split(path: str, split: str) -> FileSource:
    """Return nine tenths (train) or the rest (val) of the images right in `path`, without labels.

    As the published fork of SiT for the COWS set does; each part is in the order of its names.
    """
    passed = PassedOver()
    names = read_folder(path, passed).images
    passed.say(Path(path))
    # the ends of the names are hashes, so this order is as good as random
    names.sort(key=lambda name: name[::-1])
    cut = int(0.9 * len(names))
    chosen = sorted(names[:cut] if split == "train" else names[cut:])
    if not chosen:
        needed = f"DATA.DATASET 'folder_split' needs at least 2 of them, not {len(names)}"
        refuse_empty(Path(path), needed)
    return FileSource(Path(path), chosen, [-1] * len(chosen), [])


def _inside(path: str, name: str, marker: str, dataset: str, remedy: str = "") -> Path:
    """Return the folder `name` in `path`, or `path` itself; `marker` must lie in it."""
    inside = Path(path) / name
    root = inside if is_folder(inside) else Path(path)
    if not (root / marker).exists():
        raise ValueError(
            f"DATA.PATH (--data-path) {path!r}: DATA.DATASET {dataset!r} needs {name}/ there, with "
            f"{marker} in it{remedy}"
        )
    return root


def _read(listing: Path, dataset: str) -> list[str]:
    """Return the lines of a listing that are not empty."""
    try:
        text = read_text(listing)
    except OSError as error:
        raise ValueError(
            f"DATA.PATH (--data-path): {listing} cannot be read; DATA.DATASET {dataset!r} needs it "
            f"({error})"
        ) from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{listing} is empty: unpack the data set again")
    return lines


def _refuse_missing(folder: Path, names: list[str], listing: Path) -> None:
    passed = PassedOver()
    present = set(read_folder(folder, passed).images) if is_folder(folder) else set()
    passed.say(folder)
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(
            f"{listing} lists {len(missing)} images that are not in {folder}, such as "
            f"{missing[0]}: unpack the data set again"
        )
