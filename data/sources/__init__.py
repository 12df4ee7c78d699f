"""The registry of image sources: a name and a path become a `Source`."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from yacs.config import CfgNode

from data.pixels import ARRAY_EXTENSION, pixels_of
from data.sources import folder as files
from data.sources import in_memory as arrays
from data.sources import named_sets as layouts
from data.sources import packed
from data.sources import zip as archives
from data.sources.base import ArraySource, Source, Subset, is_labelled, subset
from data.sources.scan import IMG_EXTENSIONS
from utils.config.datasets import BUNDLED, DOWNLOADABLE, check_place
from utils.distributed import refuse_different

__all__ = [
    "SOURCES",
    "ArraySource",
    "Source",
    "Subset",
    "build_source",
    "is_labelled",
    "open_split",
    "subset",
]

Builder: TypeAlias = Callable[..., Source]

# Each builder takes (path, split), those of `BUNDLED` only the split.
SOURCES: dict[str, Builder] = {
    "imagefolder": files.imagefolder,
    "imagenet": files.imagefolder,
    "folder": files.folder,
    "folder_split": layouts.folder_split,
    "zip": archives.zipped,
    "packed": packed.packed,
    "cifar10": partial(arrays.cifar, "cifar10"),
    "cifar10_held_out": arrays.cifar10_held_out,
    "cifar100": partial(arrays.cifar, "cifar100"),
    "stl10": partial(arrays.stl10, "stl10"),
    "stl10_labelled": partial(arrays.stl10, "stl10_labelled"),
    "tinyimagenet": layouts.tinyimagenet,
    "pets": layouts.pets,
    "digits": arrays.digits,
    "mnist5k": arrays.mnist5k,
}
# folders whose listing is worth keeping
_INDEXED = {"imagefolder", "imagenet", "folder", "tinyimagenet"}
# sets of one's own, whose images may be arrays in .npy files
_WITH_ARRAYS = {"imagefolder", "folder"}
_LABELLED = {"stl10": "stl10_labelled"}  # pretraining adds images without labels
SPLITS = ("train", "val")


def build_source(
    dataset: str,
    path: str,
    split: str,
    *,
    cache_mode: str = "part",
    download: bool = False,
    index_cache: str = "off",
    arrays_too: bool = False,
) -> Source:
    """Open `split` ("train" or "val") of a data set; only that split has to exist.

    `cache_mode` concerns zip archives, `download` the torchvision sets, `index_cache` folders of
    images (the folder of their indexes, "" for the user's own, "off" for none); `arrays_too` lists
    .npy files as images. A ValueError names the key to change.
    """
    check_place(dataset, path, download)
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    if dataset in BUNDLED:
        return SOURCES[dataset](split)
    if dataset in DOWNLOADABLE:
        return SOURCES[dataset](path, split, download=download)
    if dataset in _WITH_ARRAYS and arrays_too:
        extensions = (*IMG_EXTENSIONS, ARRAY_EXTENSION)
        return SOURCES[dataset](path, split, index_cache=index_cache, extensions=extensions)
    if dataset in _INDEXED:
        return SOURCES[dataset](path, split, index_cache=index_cache)
    if dataset == "zip":
        return SOURCES[dataset](path, split, cache_mode=cache_mode)
    return SOURCES[dataset](path, split)


def open_split(node: CfgNode, split: str, labelled: bool = False) -> Source:
    """Open a split of the data set that a `DATA` section names; `labelled`: for a probe.

    Raises `ValueError` where labels are asked for and there are none, and where the processes of
    a run see different images.
    """
    pixels = pixels_of(node)
    name = _LABELLED.get(node.DATASET, node.DATASET) if labelled else node.DATASET
    source = build_source(
        name,
        node.PATH,
        split,
        cache_mode=node.CACHE_MODE,
        download=node.DOWNLOAD,
        index_cache=node.INDEX_CACHE,
        arrays_too=not pixels.plain,
    )
    if not pixels.plain and not source.holds_files:
        raise ValueError(
            f"DATA.CHANNELS, DATA.RANGE: DATA.DATASET {node.DATASET!r} holds 8-bit RGB pixels; "
            "remove the keys, or use a data set of files"
        )
    source.max_pixels, source.pixels = node.MAX_PIXELS, pixels
    if labelled:
        _check_labels(source, node.DATASET)
    # else each would draw other batches: some images twice, others never
    refuse_different(source.fingerprint, f"DATA.PATH (--data-path) {node.PATH!r}, {split}")
    return source


def _check_labels(source: Source, dataset: str) -> None:
    if not is_labelled(source):
        raise ValueError(
            f"DATA.DATASET {dataset!r}: an evaluation needs labels; use a folder with class "
            "folders, or pretrain with --opts KNN.EVERY_EPOCHS 0; --held-out gives the method's "
            "own losses"
        )
