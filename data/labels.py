"""Label subsets for few-label runs: published lists, or a class-balanced draw.

A list holds one image a line in SimCLR's format: the bare file name, `n01440764_505.JPEG`; with
folders before it (`cats/505.jpg`) where bare names repeat; `cifar10[123]` for data sets held as one
array.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.sources.base import Source
from utils.randomness import hashed
from utils.reading import read_text

_ANY_NAME = "surrogateescape"  # file names need not be UTF-8


def label_subset(source: Source, percent: float, seed: int, list_file: str = "") -> np.ndarray:
    """Return the sorted indices of the images whose labels a run may use.

    From `list_file` if given (`percent` and `seed` are then not used); else a draw of `percent` of
    the labelled images, at least one per class, a pure function of (seed, percent); a larger draw
    of the same seed contains every smaller one.
    """
    if list_file:
        return read_subset(source, list_file)
    if not 0 < percent <= 100:
        raise ValueError(f"percent of the labels (--train-percent) {percent} must be in (0, 100]")
    labelled = _labelled(source, np.arange(len(source)))
    count = round(percent / 100 * len(labelled))
    labels = source.labels.numpy()[labelled]
    return labelled[_balanced(labels, labelled, count, "label subset", seed)]


def hold_out(
    source: Source, indices: np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split `indices` into sorted (train, val) with the same share of every class in val.

    Every class keeps at least one image in train, so a class of one image is not in val. Raises
    ValueError if nothing would be left for val.
    """
    if not 0 < fraction < 1:
        raise ValueError(
            f"the fraction of labels held out for validation, {fraction}, must be in (0, 1)"
        )
    indices = _labelled(source, np.sort(np.asarray(indices, dtype=np.int64)))
    labels = source.labels.numpy()[indices]
    count = len(indices) - max(round(fraction * len(indices)), 1)
    kept = _balanced(labels, indices, count, "hold out", seed)
    held = np.setdiff1d(np.arange(len(indices)), kept)
    if not len(held):
        raise ValueError(
            f"{len(indices)} labels of {len(np.unique(labels))} classes cannot be split for "
            "validation: every class needs one image to train on; use more labels"
        )
    return indices[kept], indices[held]


def write_subset(path: str | Path, source: Source, indices: np.ndarray) -> None:
    """Write the names of a source's images, one a line, which `label_subset` reads back."""
    depth = _unique_depth(source)
    lines = [_suffix(source.name(int(index)), depth) for index in indices]
    temporary = Path(f"{path}.tmp")
    text = "".join(f"{line}\n" for line in lines)
    temporary.write_text(text, encoding="utf-8", errors=_ANY_NAME)
    # in one step: another process may read the list
    os.replace(temporary, path)


def read_subset(source: Source, list_file: str) -> np.ndarray:
    """Return the sorted indices of the images that a list names.

    Raises ValueError with the file if a line is repeated, names no image of the source or several,
    or if the list is empty or missing.
    """
    title = f"list of labelled images {list_file}"
    try:
        text = read_text(list_file, _ANY_NAME)
    except OSError as error:
        raise ValueError(f"{title}: cannot be read ({error})") from error
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{title}: is empty; expected one file name a line")
    found = _find(source, {*lines, *(line.strip() for line in lines)})
    # a name may have outer spaces
    lines = [line if line in found else line.strip() for line in lines]
    repeated = [line for line, times in Counter(lines).items() if times > 1]
    _refuse(title, "stand in it twice", repeated)
    absent = [line for line in lines if line not in found]
    reason = f"are not in the data set (such as {source.name(0)})"
    if not all(line.isascii() or _is_utf8(line) for line in absent):
        reason += ", and the list is no text in UTF-8: save it as UTF-8"
    _refuse(title, reason, absent)
    ambiguous = [line for line in lines if len(found[line]) > 1]
    _refuse(title, "name several images; put their folders before them", ambiguous)
    return _labelled(source, np.sort(np.array([found[line][0] for line in lines], dtype=np.int64)))


def _is_utf8(line: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in line)  # surrogates of other bytes


def _refuse(title: str, reason: str, wrong: list[str]) -> None:
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise ValueError(f"{title}: {len(wrong)} of its names {reason}: {shown}")


def _labelled(source: Source, indices: np.ndarray) -> np.ndarray:
    """Leave out the images without labels; ValueError if none is left."""
    labelled = indices[source.labels.numpy()[indices] >= 0]
    if not len(labelled):
        raise ValueError("no image has a label: a label subset needs a data set with classes")
    return labelled


def _balanced(
    labels: np.ndarray, indices: np.ndarray, count: int, purpose: str, seed: int
) -> np.ndarray:
    """Return sorted positions of `count` images, of every class the same share and at least one.

    Webster's method: image number r (in a keyed order) of a class of n comes at (r + 1/2) / n, and
    the earliest are taken. For equal classes that is rounding by largest remainder; unlike that,
    more images never take one away from a class, so draws are nested.
    """
    # of the image's number alone: the images beside it do not change its draw
    key = hashed(indices, purpose, seed)
    # lexsort's last key counts first: by class, then by the keyed order
    order = np.lexsort((key, labels))
    classes, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, sizes)
    # the first image of each class comes before all others
    turn = np.where(rank == 0, 0.0, (rank + 0.5) / np.repeat(sizes, sizes))
    earliest = np.lexsort((key[order], turn))
    return np.sort(order[earliest[: max(count, len(classes))]])


def _suffix(name: str, depth: int) -> str:
    return "/".join(name.split("/")[-depth:])


def _names(source: Source) -> Iterator[str]:
    return (source.name(index) for index in range(len(source)))


def _unique_depth(source: Source) -> int:
    """Return how many trailing parts of their paths tell all images apart."""
    deepest = max(name.count("/") for name in _names(source)) + 1
    for depth in range(1, deepest):
        if len({_suffix(name, depth) for name in _names(source)}) == len(source):
            return depth
    return deepest


def _find(source: Source, wanted: set[str]) -> dict[str, list[int]]:
    """Return the indices of the images whose path ends in each wanted name."""
    depths = sorted({name.count("/") + 1 for name in wanted})
    found: dict[str, list[int]] = {}
    for index, name in enumerate(_names(source)):
        for suffix in (_suffix(name, depth) for depth in depths):
            if suffix in wanted:
                found.setdefault(suffix, []).append(index)
    return found
