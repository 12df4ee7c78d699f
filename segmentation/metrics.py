"""Mean intersection over union and accuracies from one exact table of counts."""

import torch
from torch import Tensor

from segmentation.heads import IGNORE


def confusion(truth: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Return counts (truth, prediction) of labels (H,W), int64; ignored pixels are left out."""
    # one number for each pair, so that one pass counts all of them
    kept = truth != IGNORE
    pairs = truth[kept].long() * num_classes + predicted[kept].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def class_ious(counts: Tensor) -> list[float]:
    """Return each class's intersection over union in percent; nan: neither true nor predicted."""
    hits, true, found = counts.diagonal(), counts.sum(1), counts.sum(0)
    return _percent(hits, true + found - hits)


def scores(counts: Tensor) -> dict[str, float]:
    """Return mIoU, mAcc and aAcc in percent of counts (truth, prediction).

    Means are over the classes that have a value: one that is predicted but never true counts 0 in
    mIoU and is left out of mAcc.
    """
    hits, true = counts.diagonal(), counts.sum(1)
    (accuracy,) = _percent(hits.sum()[None], true.sum()[None])
    return {
        "mIoU": _mean(class_ious(counts)),
        "mAcc": _mean(_percent(hits, true)),
        "aAcc": accuracy,
    }


def _percent(part: Tensor, whole: Tensor) -> list[float]:
    return (100.0 * part.double() / whole.double()).tolist()  # 0 / 0 is nan


def _mean(values: list[float]) -> float:
    # nan is not equal to itself
    defined = torch.tensor([value for value in values if value == value], dtype=torch.float64)
    return float(defined.mean()) if len(defined) else 0.0
