"""Image retrieval in the revisited Oxford and Paris protocol (arXiv:1803.11285).

Every query has database images that show the same building clearly (easy), badly (hard), or that
tell nothing (junk). Junk is taken out of a ranking before anything is counted; queries without
positives are left out of the means.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from utils.checkpoints.foreign import read_pickle

# left, top, right, bottom of the building, in pixels
Box: TypeAlias = tuple[float, float, float, float]

KS = (1, 5, 10)
# difficulty -> (lists of positives, lists to leave out of the ranking)
PROTOCOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


class GroundTruth(NamedTuple):
    """What a gnd_*.pkl says: image names without extension, and each query's lists and box."""

    images: list[str]
    queries: list[str]
    lists: list[dict[str, np.ndarray]]  # easy, hard, junk: indices into `images`
    boxes: list[Box | None]


def read_ground_truth(path: Path) -> GroundTruth:
    """Read a gnd_*.pkl without executing anything of it; `ValueError` if it is no such file."""
    content = read_pickle(path)
    try:
        images, queries = ([str(name) for name in content[key]] for key in ("imlist", "qimlist"))
        lists = [
            {key: _indices(entry[key], len(images)) for key in ("easy", "hard", "junk")}
            for entry in content["gnd"]
        ]
        boxes = [_box(entry.get("bbx")) for entry in content["gnd"]]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{path} is no ground truth of revisited Oxford or Paris ({type(error).__name__}: "
            f"{error}); it needs imlist, qimlist and gnd with easy, hard, junk of every query"
        ) from error
    if len(lists) != len(queries):
        raise ValueError(
            f"{path}: {len(queries)} queries, but ground truth of {len(lists)}; take the whole file"
        )
    return GroundTruth(images, queries, lists, boxes)


def _indices(values: Any, count: int) -> np.ndarray:
    found = np.asarray(values, dtype=np.int64).reshape(-1)
    if len(found) and not (0 <= found.min() and found.max() < count):
        raise IndexError(f"image {found.max()} of {count}")
    return found


def _box(values: Any) -> Box | None:
    if values is None:
        return None
    left, top, right, bottom = (float(value) for value in values)
    return left, top, right, bottom


def retrieval_scores(
    ranking: np.ndarray, lists: Sequence[Mapping[str, np.ndarray]], ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return percent mAP and mP@k by difficulty (`medium/mAP`, `hard/mP@10`).

    `ranking` (D, Q) holds database indices, the best first, a column a query. A difficulty in
    which no query has a positive gives NaN.
    """
    scores = {}
    for name, (positive, ignored) in PROTOCOLS.items():
        rows = []
        # a query without a positive has no precision: it is left out, as in the official code
        for order, entry in zip(ranking.T, lists, strict=True):
            places = positive_places(order, _joined(entry, positive), _joined(entry, ignored))
            if len(places):
                rows.append([average_precision(places), *(precision_at(places, k) for k in ks)])
        means = 100.0 * np.mean(rows, axis=0) if rows else np.full(1 + len(ks), np.nan)
        columns = ("mAP", *(f"mP@{k}" for k in ks))
        scores.update(
            {f"{name}/{column}": float(value) for column, value in zip(columns, means, strict=True)}
        )
    return scores


def _joined(entry: Mapping[str, np.ndarray], keys: Sequence[str]) -> np.ndarray:
    return np.concatenate([entry[key] for key in keys])


def positive_places(order: np.ndarray, positives: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """Return the sorted places, from 0, of `positives` in `order` (D,) without the `ignored`."""
    kept = order[~np.isin(order, ignored)]
    return np.flatnonzero(np.isin(kept, positives))


def average_precision(places: np.ndarray) -> float:
    """Return the trapezoidal average precision of positives at `places`."""
    # The official code averages the precision just before and just after each positive.
    hits = np.arange(len(places))
    before = np.where(places == 0, 1.0, hits / np.maximum(places, 1))
    after = (hits + 1) / (places + 1)
    return float(np.mean((before + after) / 2))


def precision_at(places: np.ndarray, k: int) -> float:
    """Return the precision among the first `k`, or up to the last positive if that is sooner."""
    # as the official code: a query of three positives could never reach a precision at 10 of 1
    k = min(k, int(places[-1]) + 1)
    return float((places < k).sum() / k)
