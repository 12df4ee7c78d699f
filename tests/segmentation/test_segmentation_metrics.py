"""The metric against a slow oracle: loops over pixels and classes, exact fractions."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from segmentation.metrics import class_ious, confusion, scores


def oracle(truth: list[Tensor], predicted: list[Tensor], classes: int) -> dict[str, Fraction]:
    pixels = [
        (int(t), int(p))
        for a, b in zip(truth, predicted, strict=True)
        for t, p in zip(a.flatten(), b.flatten(), strict=True)
        if t != 255
    ]
    ious, accuracies = [], []
    for c in range(classes):
        true = {n for n, (t, _) in enumerate(pixels) if t == c}
        found = {n for n, (_, p) in enumerate(pixels) if p == c}
        if true | found:
            ious.append(Fraction(len(true & found), len(true | found)))
        if true:
            accuracies.append(Fraction(len(true & found), len(true)))
    right = sum(t == p for t, p in pixels)
    return {
        "mIoU": 100 * sum(ious) / len(ious),
        "mAcc": 100 * sum(accuracies) / len(accuracies),
        "aAcc": Fraction(100 * right, len(pixels)),
    }


@pytest.mark.parametrize("classes", [3, 7, 40])
def test_the_metric_equals_the_oracle(classes: int) -> None:
    """The last two classes are never true, the first is never predicted; a tenth is ignored."""
    generator = torch.Generator().manual_seed(classes)
    truth, predicted = [], []
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for size in ((5, 9), (12, 4), (1, 1), (8, 8)):
        label = torch.randint(0, classes - 2, size, generator=generator).to(torch.uint8)
        label[torch.rand(size, generator=generator) < 0.1] = 255
        truth.append(label)
        predicted.append(torch.randint(1, classes - 1, size, generator=generator))
        counts += confusion(truth[-1], predicted[-1], classes)
    expected = oracle(truth, predicted, classes)
    assert scores(counts) == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-12)
    assert int(counts.sum()) == sum(int((t != 255).sum()) for t in truth)


def test_absent_and_never_true_classes() -> None:
    """Class 1 is predicted but never true, class 2 is neither."""
    truth = torch.tensor([[0, 0, 0, 255]], dtype=torch.uint8)
    counts = confusion(truth, torch.tensor([[0, 0, 1, 1]]), 3)
    assert counts.tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]
    ious = class_ious(counts)
    assert ious[:2] == pytest.approx([200 / 3, 0.0])
    assert ious[2] != ious[2]
    found = {"mIoU": 100 / 3, "mAcc": 200 / 3, "aAcc": 200 / 3}
    assert scores(counts) == pytest.approx(found)


def test_nothing_labelled_is_no_crash() -> None:
    assert scores(torch.zeros(3, 3, dtype=torch.int64))["mIoU"] == 0.0
