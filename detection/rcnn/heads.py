"""RoI heads of Faster and Mask R-CNN: torchvision's, with the published choices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.faster_rcnn import (
    FastRCNNConvFCHead,
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign, generalized_box_iou_loss, roi_align
from torchvision.ops.poolers import LevelMapper
from yacs.config import CfgNode

from detection.rcnn.proposals import distance

Target = dict[str, Tensor]
Features = Mapping[str, Tensor]
Shapes = list[tuple[int, int]]
Predictions = tuple[Tensor, Tensor]  # class logits (R,1+n), box deltas (R,4+4n)

_GIOU_WEIGHT = 10.0  # of Swin's Cascade R-CNN
_MASK_CELLS = 14  # a mask's region has so many cells a side
_LEVEL_OF_224 = 4  # Lin et al. 2017, equation 1: a region of 224 pixels is on the map of stride 16


@dataclass(frozen=True)
class Regions:
    """Regions that a head trains on, one entry an image: boxes (r,4) and what they should be.

    `matched` (r,) is the row of the object in the target, `labels` (r,) its class, 0 in the
    background, `truth` (r,4) its box.
    """

    boxes: list[Tensor]
    matched: list[Tensor]
    labels: list[Tensor]
    truth: list[Tensor]

    def foreground(self) -> "Regions":
        """Return the regions that are on an object."""
        rows = [(labels > 0).nonzero().flatten() for labels in self.labels]

        def pick(values: list[Tensor]) -> list[Tensor]:
            return [value[row] for value, row in zip(values, rows, strict=True)]

        return Regions(*map(pick, (self.boxes, self.matched, self.labels, self.truth)))


class RegionPool(MultiScaleRoIAlign):
    """RoIAlign on maps of known `strides`; `aligned` shifts by half a pixel (Detectron2, mmdet).

    torchvision derives the strides from the images' sizes before they are padded: on a canvas
    twice as high as its images they would be wrong.
    """

    def __init__(self, strides: list[int], cells: int, samples: int, aligned: bool) -> None:
        names = [str(number) for number in range(len(strides))]
        super().__init__(names, output_size=cells, sampling_ratio=samples)
        self.aligned = aligned
        self.scales = [1.0 / stride for stride in strides]
        # the level whose stride is 16 is the fourth
        first, last = (int(stride).bit_length() - 1 for stride in (strides[0], strides[-1]))
        self.map_levels = LevelMapper(first, last, canonical_level=_LEVEL_OF_224)

    def forward(self, x: Features, boxes: list[Tensor], image_shapes: Shapes) -> Tensor:
        """Return the cells (R,C,S,S) of all images' boxes."""
        if not self.aligned:
            return super().forward(dict(x), boxes, image_shapes)
        maps = [x[name] for name in self.featmap_names]
        owners = [boxes_.new_full((len(boxes_), 1), i) for i, boxes_ in enumerate(boxes)]
        regions = torch.cat([torch.cat(owners), torch.cat(boxes)], dim=1)
        levels = self.map_levels(boxes)
        cells = maps[0].new_zeros(len(regions), maps[0].shape[1], *self.output_size)
        for level, (features, scale) in enumerate(zip(maps, self.scales, strict=True)):
            rows = (levels == level).nonzero().flatten()
            pooled = roi_align(
                features, regions[rows], self.output_size, scale, self.sampling_ratio, aligned=True
            )
            cells[rows] = pooled.to(cells.dtype)  # autocast may choose a type for each level
        return cells


# The predictors put out float32 for the reason that detection/rcnn/proposals.py gives.


class BoxPredictor(FastRCNNPredictor):
    """Class logits (R,1+n) and box deltas (R,4+4n) of regions, row 0 being the background."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predict from (R,F)."""
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class MaskPredictor(MaskRCNNPredictor):
    """Mask logits (R,1+n,28,28) of regions, channel 0 being the background."""

    def forward(self, input: Tensor) -> Tensor:
        """Predict from (R,C,14,14)."""
        return super().forward(input).float()


class RegionHeads(roi_heads.RoIHeads):
    """torchvision's RoI heads with `box_loss` l1, smooth_l1 or giou and, `aligned`, masks to match.

    `aligned` cuts the objects' masks as an aligned pool cuts the maps.
    """

    box_loss = "smooth_l1"
    aligned = False

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: Shapes,
        targets: list[Target] | None = None,
    ) -> tuple[list[Target], dict[str, Tensor]]:
        """Return (detections, losses), one of them empty."""
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        assert targets is not None
        regions = self.sample(proposals, targets)
        return [], self.losses(features, regions, image_shapes, targets)

    def sample(self, proposals: list[Tensor], targets: list[Target]) -> Regions:
        """Choose the regions to train on from proposals and the objects themselves."""
        if not any(map(len, proposals)):
            # no mean over no region, and norms over all ranks wait: a pixel of background passes
            pixel = proposals[0].new_tensor([[0.0, 0.0, 1.0, 1.0]])
            proposals = [pixel, *proposals[1:]]
        boxes, matched, labels, _ = self.select_training_samples(list(proposals), targets)
        truth = []
        for target, rows in zip(targets, matched, strict=True):
            # in an image without objects every row is 0, and there is none
            objects = target["boxes"] if len(target["boxes"]) else target["boxes"].new_zeros(1, 4)
            truth.append(objects[rows])
        return Regions(boxes, matched, labels, truth)

    def predict(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> Predictions:
        """Return class logits and box deltas of all images' regions."""
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, shapes)))

    def predict_masks(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> Tensor:
        """Return the mask logits of all images' regions."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, shapes)))

    def losses(
        self, features: Features, regions: Regions, shapes: Shapes, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Return the losses of class, box and, where there are masks, mask."""
        losses = self.box_losses(self.predict(features, regions.boxes, shapes), regions)
        return losses | self.mask_losses(features, regions, shapes, targets)

    def mask_losses(
        self, features: Features, regions: Regions, shapes: Shapes, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Return the loss of the masks, nothing for a detector without them."""
        if not self.has_mask():
            return {}
        shown = regions.foreground()
        if any(map(len, shown.boxes)):
            logits = self.predict_masks(features, shown.boxes, shapes)
            return {"loss_mask": self.mask_loss(logits, shown, targets)}
        # Nothing to learn, but every parameter needs its gradient, and a batch norm over all ranks
        # waits for each of them: one region of each image passes, with a loss of 0.
        some = [boxes[:1] for boxes in regions.boxes]
        return {"loss_mask": self.predict_masks(features, some, shapes).sum() * 0}

    def box_losses(self, predictions: Predictions, regions: Regions) -> dict[str, Tensor]:
        """Return the class loss, and the box loss of the foreground over all sampled regions."""
        logits, deltas = predictions
        labels = torch.cat(regions.labels)
        shown = (labels > 0).nonzero().flatten()
        boxes, truth = torch.cat(regions.boxes)[shown], torch.cat(regions.truth)[shown]
        # one box for each class; only the box of the true class gets a gradient
        deltas = deltas.view(-1, deltas.shape[1] // 4, 4)[shown, labels[shown]]
        if self.box_loss == "giou":
            found = self.box_coder.decode_single(deltas, boxes)  # not clipped to the image
            box_loss = _GIOU_WEIGHT * generalized_box_iou_loss(found, truth, reduction="sum")
        else:
            box_loss = distance(self.box_loss, deltas, self.box_coder.encode_single(truth, boxes))
        return {
            "loss_classifier": F.cross_entropy(logits, labels),
            # by all regions: an image with few on objects then counts little (Fast R-CNN)
            "loss_box_reg": box_loss / labels.numel(),
        }

    def mask_loss(self, logits: Tensor, shown: Regions, targets: list[Target]) -> Tensor:
        """Return the mask loss of foreground regions whose mask logits are (R,1+n,28,28)."""
        masks, labels = [t["masks"] for t in targets], [t["labels"] for t in targets]
        if not self.aligned:
            return roi_heads.maskrcnn_loss(logits, shown.boxes, masks, labels, shown.matched)
        truth = []
        for mask, boxes, rows in zip(masks, shown.boxes, shown.matched, strict=True):
            where = torch.cat([rows[:, None].to(boxes), boxes], dim=1)
            cut = roi_align(mask[:, None].to(boxes), where, logits.shape[-1], aligned=True)
            # whole cells, as Detectron2 and mmdetection; torchvision's own loss has fractions
            truth.append((cut[:, 0] >= 0.5).float())
        chosen = torch.cat(shown.labels)
        own = logits[torch.arange(len(chosen), device=chosen.device), chosen]
        return F.binary_cross_entropy_with_logits(own, torch.cat(truth))

    def detect(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> list[Target]:
        """Return boxes, labels, scores and, where there are masks, masks (n,1,28,28)."""
        results = self.results(self.predict(features, boxes, shapes), boxes, shapes)
        if self.has_mask():
            found = [result["boxes"] for result in results]
            add_masks(results, self.predict_masks(features, found, shapes).sigmoid())
        return results

    def results(
        self, predictions: Predictions, boxes: list[Tensor], shapes: Shapes
    ) -> list[Target]:
        """Turn predictions of regions into detections."""
        found = self.postprocess_detections(*predictions, boxes, shapes)
        return [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*found, strict=True)
        ]


def add_masks(results: list[Target], masks: Tensor) -> None:
    """Give each detection its class's mask out of probabilities (R,1+n,28,28)."""
    labels = torch.cat([result["labels"] for result in results])
    own = masks[torch.arange(len(labels), device=labels.device), labels][:, None]
    counts = [len(result["labels"]) for result in results]
    for result, mask in zip(results, own.split(counts), strict=True):
        result["masks"] = mask


class C4Heads(RegionHeads):
    """RoI heads whose boxes and masks share the fifth stage, as in Detectron2's Res5ROIHeads.

    `box_head` maps regions to (R,F,7,7); boxes see its mean, masks the map itself.
    """

    def predict(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> Predictions:
        """Return class logits and box deltas of all images' regions."""
        return self.box_predictor(self._maps(features, boxes, shapes).mean(dim=(2, 3)))

    def predict_masks(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> Tensor:
        """Return the mask logits of all images' regions."""
        return self.mask_predictor(self._maps(features, boxes, shapes))

    def losses(
        self, features: Features, regions: Regions, shapes: Shapes, targets: list[Target]
    ) -> dict[str, Tensor]:
        """Return the losses; the maps of the regions are computed once for boxes and masks."""
        maps = self._maps(features, regions.boxes, shapes)
        losses = self.box_losses(self.box_predictor(maps.mean(dim=(2, 3))), regions)
        if self.has_mask():
            shown = regions.foreground()
            logits = self.mask_predictor(maps[torch.cat(regions.labels) > 0])
            some = any(map(len, shown.boxes))
            # a sum over no region is 0, and still has a gradient for every parameter
            losses["loss_mask"] = self.mask_loss(logits, shown, targets) if some else logits.sum()
        return losses

    def _maps(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> Tensor:
        return self.box_head(self.box_roi_pool(features, boxes, shapes))

    def has_mask(self) -> bool:
        """Tell whether there is a mask branch: here one layer on the shared maps."""
        return self.mask_predictor is not None


# ---- building ------------------------------------------------------------------------------------


def head_options(
    rcnn: CfgNode, iou: float = 0.5, coder: tuple[float, float, float, float] | None = None
) -> dict[str, Any]:
    """Return torchvision's options; `coder` has the box coder's weights, None Faster R-CNN's."""
    return {
        "fg_iou_thresh": iou,
        "bg_iou_thresh": iou,
        "batch_size_per_image": rcnn.ROI_BATCH,
        # at most: background fills up what is missing
        "positive_fraction": 0.25,
        "bbox_reg_weights": coder,
        "score_thresh": rcnn.SCORE_THRESH,
        "nms_thresh": 0.5,
        "detections_per_img": rcnn.MAX_DETECTIONS,
    }


def build_c4_heads(
    rcnn: CfgNode, stage5: nn.Module, width: int, stride: int, classes: int
) -> C4Heads:
    """Build the heads of a C4 detector; `stage5` has `width` channels."""
    heads = C4Heads(
        RegionPool([stride], _MASK_CELLS, 0, rcnn.ALIGNED),
        stage5,
        BoxPredictor(width, classes + 1),
        **head_options(rcnn),
        mask_predictor=MaskPredictor(width, 256, classes + 1) if rcnn.MASKS else None,
    )
    heads.box_loss, heads.aligned = rcnn.BOX_LOSS, rcnn.ALIGNED
    return heads


def build_pyramid_heads(rcnn: CfgNode, strides: list[int], classes: int) -> RegionHeads:
    """Build the heads on maps of these strides."""
    width, samples = rcnn.PYRAMID_WIDTH, 0 if rcnn.ALIGNED else 2
    masks: dict[str, nn.Module] = {}
    if rcnn.MASKS:
        norm = nn.BatchNorm2d if rcnn.MASK_NORM else None
        masks = {
            "mask_roi_pool": RegionPool(strides, _MASK_CELLS, samples, rcnn.ALIGNED),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1, norm),
            "mask_predictor": MaskPredictor(width, width, classes + 1),
        }
    heads = RegionHeads(
        RegionPool(strides, 7, samples, rcnn.ALIGNED),
        build_box_head(rcnn),
        BoxPredictor(rcnn.HEAD_WIDTH, classes + 1),
        **head_options(rcnn),
        **masks,
    )
    heads.box_loss, heads.aligned = rcnn.BOX_LOSS, rcnn.ALIGNED
    return heads


def build_box_head(rcnn: CfgNode) -> nn.Module:
    """Build what maps regions (R,C,7,7) to (R,F): two layers, or four convolutions and a layer."""
    width, top = rcnn.PYRAMID_WIDTH, rcnn.HEAD_WIDTH
    if rcnn.BOX_HEAD == "2fc":
        return TwoMLPHead(width * 7 * 7, top)
    return FastRCNNConvFCHead((width, 7, 7), [width] * 4, [top], nn.BatchNorm2d)
