"""The VOC metrics equal a slow and obvious re-implementation; COCO's come from a maintained evaluator."""

from pathlib import Path

import numpy as np
import pytest
import shapes

from detection.evaluation import _coco, coco_api
from detection.metrics import THRESHOLDS, Found, average_precision, voc_metrics
from detection.sources.annotations import Objects
from detection.sources.coco import read_coco


def random_case(seed: int, images: int = 12, classes: int = 3) -> tuple[list[Found], list[Objects]]:
    rng = np.random.default_rng(seed)
    found, objects = [], []
    for _ in range(images):
        count = int(rng.integers(0, 5))
        corner = rng.integers(0, 40, (count, 2))
        boxes = np.concatenate([corner, corner + rng.integers(8, 30, (count, 2))], axis=1).astype(
            np.float32
        )
        labels = rng.integers(1, classes + 1, count)
        objects.append(Objects(boxes, labels, rng.random(count) < 0.3))
        near = np.repeat(boxes, 2, axis=0) + rng.normal(0, 3, (2 * count, 4))
        stray = np.concatenate([corner := rng.uniform(0, 40, (3, 2)), corner + 15], axis=1)
        guesses = np.concatenate([near, stray])
        named = np.concatenate([np.repeat(labels, 2), rng.integers(1, classes + 1, 3)])
        found.append(Found(guesses, named, np.round(rng.random(len(guesses)), 3)))
    return found, objects


def slow_metrics(
    found: list[Found], objects: list[Objects], classes: int, eleven: bool
) -> dict[float, float]:
    """Re-state the devkit's protocol with one box, one object and one recall at a time."""
    means = {}
    for threshold in THRESHOLDS:
        values = []
        for label in range(1, classes + 1):
            counted = sum(
                1
                for o in objects
                for lab, d in zip(o.labels, o.ignored, strict=True)
                if lab == label and not d
            )
            if counted == 0:
                continue
            guesses = [
                (-s, i, b)
                for i, f in enumerate(found)
                for b, lab, s in zip(f.boxes, f.labels, f.scores, strict=True)
                if lab == label
            ]
            guesses.sort(key=lambda guess: guess[0])
            used, verdicts = set(), []
            for _, image, box in guesses:
                best, which = -1.0, None
                for j, (other, lab) in enumerate(
                    zip(objects[image].boxes, objects[image].labels, strict=True)
                ):
                    # VOC's own numbers: pixels from 1, both ends included
                    a = (box[0] + 1, box[1] + 1, box[2], box[3])
                    b = (other[0] + 1, other[1] + 1, other[2], other[3])
                    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
                    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
                    inter = max(w, 0) * max(h, 0)
                    union = (a[2] - a[0] + 1) * (a[3] - a[1] + 1) + (b[2] - b[0] + 1) * (
                        b[3] - b[1] + 1
                    )
                    if lab == label and inter / (union - inter) > best:
                        best, which = inter / (union - inter), j
                if best > threshold and objects[image].ignored[which]:
                    continue
                hit = best > threshold and (image, which) not in used
                used |= {(image, which)} if hit else set()
                verdicts.append(hit)
            points = []
            for n in range(1, len(verdicts) + 1):
                points.append((sum(verdicts[:n]) / counted, sum(verdicts[:n]) / n))
            if eleven:
                recalls = np.arange(0.0, 1.1, 0.1)
                values.append(
                    sum(max((p for r, p in points if r >= t), default=0.0) for t in recalls) / 11
                )
            else:
                area, before = 0.0, 0.0
                for recall in sorted({r for r, _ in points}):
                    area += (recall - before) * max(p for r, p in points if r >= recall)
                    before = recall
                values.append(area)
        means[threshold] = 100 * float(np.mean(values))
    return means


@pytest.mark.parametrize("eleven", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_voc_metrics_equal_the_oracle(seed: int, eleven: bool) -> None:
    found, objects = random_case(seed)
    ours = voc_metrics(found, objects, 3, eleven)
    slow = slow_metrics(found, objects, 3, eleven)
    assert ours["AP50"] == pytest.approx(slow[THRESHOLDS[0]], abs=1e-6)
    assert ours["AP75"] == pytest.approx(slow[THRESHOLDS[5]], abs=1e-6)
    assert ours["AP"] == pytest.approx(np.mean(list(slow.values())), abs=1e-6)
    second = "AP50/area" if eleven else "AP50/11"
    assert ours[second] == pytest.approx(
        slow_metrics(found, objects, 3, not eleven)[THRESHOLDS[0]], abs=1e-6
    )
    assert ours["AP50"] != pytest.approx(ours[second], abs=1e-3)


def test_perfect_double_and_difficult_boxes() -> None:
    boxes = np.array([[0, 0, 10, 10], [20, 20, 40, 40]], dtype=np.float32)
    labels, none = np.array([1, 1]), np.zeros(2, dtype=bool)

    def ap50(found: Found, ignored: np.ndarray = none) -> float:
        return voc_metrics([found], [Objects(boxes, labels, ignored)], 2, False)["AP50"]

    assert ap50(Found(boxes, labels, np.array([0.9, 0.8]))) == 100
    twice = Found(boxes[[0, 0, 1]], np.array([1, 1, 1]), np.array([0.9, 0.8, 0.7]))
    assert ap50(twice) == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    difficult = np.array([False, True])
    assert ap50(Found(boxes[1:], labels[1:], np.array([0.9])), difficult) == 0
    assert ap50(Found(boxes[[1, 0]], labels, np.array([0.9, 0.8])), difficult) == 100
    nothing = Found(np.zeros((0, 4)), np.zeros(0, dtype=int), np.zeros(0))
    assert ap50(nothing) == 0


def test_a_recall_is_reached_by_its_best_later_precision() -> None:
    recall, precision = np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])
    assert average_precision(recall, precision, False) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision(recall, precision, True) == pytest.approx((6 + 5 * 2 / 3) / 11)


def test_the_coco_evaluator_gives_full_marks_to_the_truth(coco_root: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    data = read_coco(coco_root, "val2017", masks=True)
    mask = coco_api()[2]
    found = []
    for index, objects in enumerate(data.objects):
        size = data.load(index).shape[1:]
        for box, label, polygons in zip(
            objects.boxes, objects.labels, objects.polygons, strict=True
        ):
            (rle,) = mask.frPyObjects([polygons[0].tolist()], *size)
            counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
            found.append(
                {
                    **{"index": index, "label": int(label), "score": 0.9, "box": box.tolist()},
                    "rle": {"size": [int(v) for v in rle["size"]], "counts": counts},
                }
            )
    values = _coco(found, data, masks=True)
    assert values["AP"] == pytest.approx(100)
    assert values["mask/AP"] == pytest.approx(100)
    wrong = [{**item, "label": item["label"] % len(shapes.CLASSES) + 1} for item in found]
    assert _coco(wrong, data, masks=False)["AP50"] < 50
    assert _coco([], data, masks=False) == {"AP": 0.0, "AP50": 0.0, "AP75": 0.0}


def test_a_missing_evaluator_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("faster_coco_eval", "pycocotools", "pycocotools.coco", "pycocotools.cocoeval"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"^[^\n]*pip install faster-coco-eval$"):
        coco_api()
