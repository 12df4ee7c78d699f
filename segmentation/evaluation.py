"""Judge a segmenter on a test split: each image by one rank, one table of counts for all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from yacs.config import CfgNode

from segmentation.datasets import SegmentationData
from segmentation.defaults import family_of
from segmentation.inference import Inference, predict, predict_scales
from segmentation.loader import test_images
from segmentation.metrics import class_ious, confusion, scores
from segmentation.model import Segmenter
from utils import distributed


@dataclass(frozen=True)
class Judgement:
    """Metrics in percent, and each class's IoU; of several heads those of the best."""

    values: dict[str, float]
    ious: dict[str, float | None]  # None: the class is neither true nor predicted


def inference_of(cfg: CfgNode) -> Inference:
    """Return how the configured network sees a test image."""
    node = cfg.SEGMENTATION
    height, width = node.CROP
    down, right = node.STRIDE
    # its positions were interpolated once, to the crop
    vit = family_of(cfg.MODEL.BACKBONE.NAME) == "vit"
    return Inference((height, width), (down, right), slide=node.TEST == "slide", fixed=vit)


def evaluate(
    model: Segmenter,
    data: SegmentationData,
    cfg: CfgNode,
    device: torch.device,
    multi_scale: bool = False,
) -> Judgement:
    """Return mIoU, mAcc and aAcc in percent on every rank; `model` is in eval mode.

    `multi_scale` averages over `SEGMENTATION.RATIOS`, each also mirrored. Of heads with several
    rates the best mIoU is given, and each one's beside it.
    """
    # Counts are summed, not means: so the number of processes changes nothing.
    counts = distributed.on_all(lambda: _count(model, data, cfg, device, multi_scale))
    counts = distributed.all_reduce_sum(counts).cpu()
    by_head = [scores(table) for table in counts]
    best = max(range(len(by_head)), key=lambda head: by_head[head]["mIoU"])
    values = dict(by_head[best])
    if len(by_head) > 1:
        rates = cfg.SEGMENTATION.LRS
        values |= {f"mIoU/lr{rates[n]:g}": found["mIoU"] for n, found in enumerate(by_head)}
        values["best_lr"] = rates[best]
    # JSON knows no nan
    ious = zip(data.classes, class_ious(counts[best]), strict=True)
    return Judgement(values, {name: iou if iou == iou else None for name, iou in ious})


def _count(
    model: Segmenter,
    data: SegmentationData,
    cfg: CfgNode,
    device: torch.device,
    multi_scale: bool,
) -> Tensor:
    """Return this rank's counts (G, truth, prediction)."""
    classes = len(data.classes)
    counts = torch.zeros(model.num_heads, classes, classes, dtype=torch.int64, device=device)
    for truth, predicted in predictions(model, data, cfg, device, multi_scale):
        for table, labels in zip(counts, predicted, strict=True):
            table += confusion(truth, labels, classes)
    return counts


def predictions(
    model: Segmenter,
    data: SegmentationData,
    cfg: CfgNode,
    device: torch.device,
    multi_scale: bool = False,
    count: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield truth (H,W) and predicted labels (G,H,W) of this rank's (first `count`) images."""
    how = inference_of(cfg)
    ratios: Sequence[float] = cfg.SEGMENTATION.RATIOS if multi_scale else (1.0,)
    for _, images, label in test_images(data, cfg, device, ratios, count):
        truth = torch.from_numpy(label).to(device)
        size = (int(truth.shape[0]), int(truth.shape[1]))
        if multi_scale:
            yield truth, predict_scales(model, images, size, how)
        else:
            yield truth, predict(model, images[0], size, how)
