"""Average precision the Pascal VOC way (Everingham et al. 2010): its matching, both its areas."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from detection.sources.annotations import Objects

THRESHOLDS = tuple(0.5 + 0.05 * step for step in range(10))


@dataclass(frozen=True)
class Found:
    """Detections in an image: boxes (n,4) in original pixels, labels from 1, scores (n,)."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def voc_metrics(
    found: Sequence[Found], objects: Sequence[Objects], num_classes: int, eleven_points: bool
) -> dict[str, float]:
    """Return AP (mean over thresholds .5 to .95), AP50 and AP75 in percent, means over classes.

    `eleven_points` takes the precision at eleven recalls (VOC2007), else the whole area (VOC2010
    on); the other of the two is reported for AP50 as well, as `AP50/area` or `AP50/11`.
    """
    table, other = [], []
    for label in range(1, num_classes + 1):
        truth = [o.boxes[o.labels == label] for o in objects]
        ignored = [o.ignored[o.labels == label] for o in objects]
        if not sum(int((~flags).sum()) for flags in ignored):
            # a class without objects has no recall
            continue
        boxes, images = _of_class(found, label)
        curves = [
            curve(*match(boxes, images, truth, ignored, threshold)) for threshold in THRESHOLDS
        ]
        table.append([average_precision(*points, eleven_points) for points in curves])
        other.append(average_precision(*curves[0], not eleven_points))
    if not table:
        return {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}
    means = 100.0 * np.mean(table, axis=0)
    second = "AP50/area" if eleven_points else "AP50/11"
    return {
        "AP": float(means.mean()),
        "AP50": float(means[0]),
        # the sixth threshold is 0.75
        "AP75": float(means[5]),
        second: 100.0 * float(np.mean(other)),
    }


def _of_class(found: Sequence[Found], label: int) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (n,4) and image numbers (n,) of a class by falling score; ties keep order."""
    rows = [(f.boxes[f.labels == label], f.scores[f.labels == label]) for f in found]
    boxes = np.concatenate([b for b, _ in rows]).reshape(-1, 4)
    scores = np.concatenate([s for _, s in rows])
    images = np.repeat(np.arange(len(rows)), [len(s) for _, s in rows])
    order = np.argsort(-scores, kind="stable")
    return boxes[order], images[order]


def match(
    boxes: np.ndarray,
    images: np.ndarray,
    truth: Sequence[np.ndarray],
    ignored: Sequence[np.ndarray],
    threshold: float,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return hits (n,) and misses (n,) of boxes in falling score, and how many objects count.

    A box belongs to the object it overlaps most. Above the threshold it is a hit the first time and
    a miss afterwards; a difficult object makes it neither.
    """
    taken = [np.zeros(len(boxes_there), dtype=bool) for boxes_there in truth]
    hits, misses = np.zeros(len(boxes), dtype=bool), np.zeros(len(boxes), dtype=bool)
    for number, (box, image) in enumerate(zip(boxes, images, strict=True)):
        overlaps = overlap(box, truth[image])
        # VOC takes the best object even if it is taken: the second box on it is a miss.
        best = int(overlaps.argmax()) if len(overlaps) else -1
        if best < 0 or overlaps[best] <= threshold:
            misses[number] = True
        elif not ignored[image][best]:
            hits[number], misses[number] = not taken[image][best], taken[image][best]
            taken[image][best] = True
    return hits, misses, int(sum((~flags).sum() for flags in ignored))


def overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return intersection over union of a half-open box (4,) with others (n,4)."""
    # VOC counts pixels inclusively from 1. Our x1 is its x1 - 1, so its x2 - x1 + 1 is our x2 - x1.
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    inside = np.maximum(sides, 0).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1)
    return inside / ((box[2:] - box[:2]).prod() + areas - inside)


def curve(hits: np.ndarray, misses: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision after each box."""
    # sorted by falling score, so the first n boxes are those above some threshold
    right, wrong = hits.cumsum(), misses.cumsum()
    return right / total, right / np.maximum(right + wrong, np.finfo(float).eps)


def average_precision(recall: np.ndarray, precision: np.ndarray, eleven_points: bool) -> float:
    """Return the area under the falling envelope of the precision, or its 11-point mean."""
    if eleven_points:
        reached = [precision[recall >= point] for point in np.arange(0.0, 1.1, 0.1)]
        return float(np.mean([values.max() if len(values) else 0.0 for values in reached]))
    # the area from recall 0 to 1: what is never found has precision 0
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.concatenate([[0.0], precision, [0.0]])
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())
