"""Cascade R-CNN (Cai and Vasconcelos 2018, arXiv:1712.00726) as Swin's detectors have it.

Stages of heads, each matched at a higher IoU and fed with the regions that the last one moved.
"""

from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import clip_boxes_to_image
from yacs.config import CfgNode

from detection.rcnn.heads import (
    Features,
    MaskPredictor,
    Predictions,
    RegionHeads,
    RegionPool,
    Regions,
    Shapes,
    Target,
    add_masks,
    build_box_head,
    head_options,
)


class StageBoxes(nn.Module):
    """Class logits and box deltas; unlike torchvision's, without weights for the background's box.

    `agnostic` has four deltas for all classes. Both are handed on in torchvision's layout.
    """

    def __init__(self, width: int, classes: int, agnostic: bool) -> None:
        super().__init__()
        self.classes, self.agnostic = classes, agnostic
        self.cls_score = nn.Linear(width, classes + 1)
        self.bbox_pred = nn.Linear(width, 4 if agnostic else 4 * classes)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):  # mmdetection's
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Predictions:
        """Predict from (R,F), in float32."""
        logits, deltas = self.cls_score(x).float(), self.bbox_pred(x).float()
        if self.agnostic:
            # one box whatever the class: it is written once for each of them
            return logits, deltas.repeat(1, self.classes + 1)
        # torchvision's layout begins with a box of the background, which nobody reads
        return logits, F.pad(deltas, (4, 0))


class StageMasks(MaskPredictor):
    """Mask logits in torchvision's layout, (R,1+n,28,28), without weights for the background."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__(width, width, classes)

    def forward(self, input: Tensor) -> Tensor:
        """Predict from (R,C,14,14)."""
        return F.pad(super().forward(input), (0, 0, 0, 0, 1, 0))


class CascadeHeads(nn.Module):
    """RoI heads in stages; `weights` are those of the stages' losses."""

    def __init__(self, stages: list[RegionHeads], weights: list[float]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.weights = weights

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: Shapes,
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Return (detections, losses), one of them empty."""
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None
        losses = {}
        for number, (stage, weight) in enumerate(zip(self._heads(), self.weights, strict=True), 1):
            regions = stage.sample(proposals, targets)
            predictions = stage.predict(features, regions.boxes, image_shapes)
            found = stage.box_losses(predictions, regions)
            found |= stage.mask_losses(features, regions, image_shapes, targets)
            for name, loss in found.items():
                losses[f"{name}/{number}"] = weight * loss
            # the last stage has no next one
            if number < len(self.weights):
                proposals = refined(stage, predictions, regions, image_shapes)
        return [], losses

    def _detect(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> list[Target]:
        stages = self._heads()
        logits, deltas = stages[0].predict(features, boxes, shapes)
        total = logits
        for last, stage in pairwise(stages):
            # each stage starts where the one before moved the boxes
            boxes = moved(last, deltas, boxes, best_class(logits), shapes)
            logits, deltas = stage.predict(features, boxes, shapes)
            total = total + logits
        # the mean of logits, not of probabilities, as mmdetection takes it
        results = stages[-1].results((total / len(stages), deltas), boxes, shapes)
        if stages[-1].has_mask():
            # every stage's mask head sees the boxes of the last one
            found = [result["boxes"] for result in results]
            masks = [stage.predict_masks(features, found, shapes).sigmoid() for stage in stages]
            add_masks(results, torch.stack(masks).mean(dim=0))
        return results

    def _heads(self) -> list[RegionHeads]:
        return [cast(RegionHeads, stage) for stage in self.stages]


# Regions are input of the next stage: no loss of it reaches back through their corners.
@torch.no_grad()
def refined(
    stage: RegionHeads, predictions: Predictions, regions: Regions, shapes: Shapes
) -> list[Tensor]:
    """Return a stage's regions as the next one gets them.

    One on an object moves by the deltas of the object's class, one in the background by those of
    its best class.
    """
    logits, deltas = predictions
    labels = torch.cat(regions.labels)
    chosen = torch.where(labels > 0, labels, best_class(logits))
    boxes = moved(stage, deltas, regions.boxes, chosen, shapes)
    kept = []
    for new, old, truth, label in zip(
        boxes, regions.boxes, regions.truth, regions.labels, strict=True
    ):
        # the objects themselves are among the regions, and the next stage adds them again
        is_object = (old == truth).all(dim=1) & (label > 0)
        kept.append(new[~is_object])
    return kept


def best_class(logits: Tensor) -> Tensor:
    """Return the likeliest class (R,) that is not the background."""
    return logits[:, 1:].argmax(dim=1) + 1


def moved(
    stage: RegionHeads, deltas: Tensor, boxes: list[Tensor], classes: Tensor, shapes: Shapes
) -> list[Tensor]:
    """Move boxes by the deltas of `classes` (R,), and cut them off at the images' borders."""
    rows = torch.arange(len(classes), device=classes.device)
    own = deltas.view(-1, deltas.shape[1] // 4, 4)[rows, classes]
    new = stage.box_coder.decode_single(own, torch.cat(boxes))
    by_image = new.split([len(boxes_) for boxes_ in boxes])
    return [clip_boxes_to_image(b, shape) for b, shape in zip(by_image, shapes, strict=True)]


def build_cascade_heads(rcnn: CfgNode, strides: list[int], classes: int) -> CascadeHeads:
    """Build the stages of a `MODEL.RCNN` section on maps of these strides."""
    # Later regions are closer to their objects and move less. Divided by the deviation that is
    # expected, the deltas of all stages are about 1.
    stages = []
    for iou, xy, wh in zip(rcnn.CASCADE, rcnn.CASCADE_XY, rcnn.CASCADE_WH, strict=True):
        stages.append(_stage(rcnn, strides, classes, iou, (1 / xy, 1 / xy, 1 / wh, 1 / wh)))
    return CascadeHeads(stages, list(rcnn.CASCADE_WEIGHTS))


def _stage(
    rcnn: CfgNode,
    strides: list[int],
    classes: int,
    iou: float,
    coder: tuple[float, float, float, float],
) -> RegionHeads:
    # 0 samples: as many as a cell has places of the map, so that large regions lose nothing
    width, samples = rcnn.PYRAMID_WIDTH, 0 if rcnn.ALIGNED else 2
    masks: dict[str, nn.Module] = {}
    if rcnn.MASKS:
        norm = nn.BatchNorm2d if rcnn.MASK_NORM else None
        masks = {
            "mask_roi_pool": RegionPool(strides, 14, samples, rcnn.ALIGNED),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1, norm),
            "mask_predictor": StageMasks(width, classes),
        }
    stage = RegionHeads(
        RegionPool(strides, 7, samples, rcnn.ALIGNED),
        build_box_head(rcnn),
        StageBoxes(rcnn.HEAD_WIDTH, classes, rcnn.CASCADE_REG == "agnostic"),
        **head_options(rcnn, iou, coder),
        **masks,
    )
    stage.box_loss, stage.aligned = rcnn.BOX_LOSS, rcnn.ALIGNED
    return stage
