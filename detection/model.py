"""Faster and Mask R-CNN (Ren et al. 2015, He et al. 2017) from our backbones and torchvision."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from yacs.config import CfgNode

from detection.backbones import (
    C4Trunk,
    Pyramid,
    ResNetTrunk,
    SimplePyramid,
    Stage5,
    SwinTrunk,
    family,
    freeze_batch_norms,
    resize_positions,
    swin_widths,
)
from models.parts.backbones import Backbone, build_backbone
from models.parts.norm import convert_sync_batch_norm
from models.weights.load import load_network
from utils.checkpoints.foreign import read_torch
from utils.config.sections import section_options

logger = logging.getLogger("synco")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in pretraining
_RATIOS = (0.5, 1.0, 2.0)
_NECKS_OF = {"resnet": ("fpn", "c4"), "swin": ("fpn",), "vit": ("pyramid",)}


class Canvas(GeneralizedRCNNTransform):
    """Normalise and pad resized images to a fixed square of `side`, 0: as small as fits."""

    def __init__(self, side: int) -> None:
        super().__init__(1, 1, list(_MEAN), list(_STD), size_divisible=32)
        self.side = side

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Leave the image as the loader made it."""
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad with zeros to one size, (N,3,H,W)."""
        if not self.side:
            return super().batch_images(images, size_divisible)
        batch = images[0].new_zeros(len(images), 3, self.side, self.side)
        for row, image in zip(batch, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """Leave boxes and masks in the resized image; the evaluation scales them."""
        return result


class Detector(GeneralizedRCNN):
    """A detector for the engine: `model(images, targets)` gives losses in training."""

    def after_step(self, progress: object) -> None:
        """Do nothing: no target follows a detector's step."""


# torchvision's box coder gives boxes the type of what a head put out. Under autocast that would be
# bfloat16, in which numbers above 512 are multiples of 4: so these heads put out float32.


class _RPNHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class _BoxPredictor(FastRCNNPredictor):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, deltas = super().forward(x)
        return logits.float(), deltas.float()


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


class C4Heads(roi_heads.RoIHeads):
    """RoI heads whose boxes and masks share the fifth stage, as in Detectron2's Res5ROIHeads.

    `box_head` maps regions to (R,F,7,7); boxes see its mean, masks the map itself.
    """

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        """Return (detections, losses), one of them empty."""
        if self.training:
            proposals, matched, labels, regression = self.select_training_samples(
                proposals, targets
            )
        maps = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(maps.mean(dim=(2, 3)))
        if not self.training:
            return self._detect(features, (logits, deltas), proposals, image_shapes), {}
        class_loss, box_loss = roi_heads.fastrcnn_loss(logits, deltas, labels, regression)
        losses = {"loss_classifier": class_loss, "loss_box_reg": box_loss}
        if self.has_mask():
            shown = [(label > 0).nonzero().flatten() for label in labels]
            losses["loss_mask"] = roi_heads.maskrcnn_loss(
                self.mask_predictor(maps[torch.cat(labels) > 0]),
                [boxes[rows] for boxes, rows in zip(proposals, shown, strict=True)],
                [target["masks"] for target in targets],
                [target["labels"] for target in targets],
                [match[rows] for match, rows in zip(matched, shown, strict=True)],
            )
        return [], losses

    def _detect(
        self, features: Any, predictions: Any, proposals: Any, shapes: Any
    ) -> list[dict[str, Tensor]]:
        found = self.postprocess_detections(*predictions, proposals, shapes)
        results = [
            {"boxes": boxes, "scores": scores, "labels": labels}
            for boxes, scores, labels in zip(*found, strict=True)
        ]
        if self.has_mask():
            regions = self.box_roi_pool(features, [result["boxes"] for result in results], shapes)
            logits = self.mask_predictor(self.box_head(regions))
            masks = roi_heads.maskrcnn_inference(logits, [result["labels"] for result in results])
            for result, mask in zip(results, masks, strict=True):
                result["masks"] = mask
        return results

    def has_mask(self) -> bool:
        """Tell whether there is a mask branch: here one layer on the shared maps."""
        return self.mask_predictor is not None


def build_detector(
    cfg: CfgNode, num_classes: int, weights: Path | None, which: str = ""
) -> Detector:
    """Build the detector of `MODEL` for `num_classes` objects; without `weights` it is random.

    Raises `ValueError` for a neck that the backbone cannot have and for weights that do not fit
    it.
    """
    rcnn, canvas = cfg.MODEL.RCNN, cfg.DETECTION.CANVAS
    body = pretrained_body(cfg, weights, which)
    kind = family(body)
    if rcnn.NECK not in _NECKS_OF[kind]:
        raise ValueError(
            f"MODEL.RCNN.NECK: {rcnn.NECK!r} does not apply to {cfg.MODEL.BACKBONE.NAME}; "
            f"use {' or '.join(_NECKS_OF[kind])}"
        )
    norm = nn.BatchNorm2d if kind == "resnet" else None
    if rcnn.NECK == "c4":
        trunk: Any = C4Trunk(body)
        heads = _c4_heads(rcnn, Stage5(body, norm if rcnn.EXTRA_NORM else None), num_classes)
    else:
        if kind == "vit":
            resize_positions(body, canvas)
            trunk = SimplePyramid(body, rcnn.PYRAMID_WIDTH)
        elif kind == "swin":
            trunk = Pyramid(SwinTrunk(body), swin_widths(body), rcnn.PYRAMID_WIDTH, None)
        else:
            widths = [info["num_chs"] for info in cast(Any, body).feature_info[1:]]
            fpn_norm = norm if rcnn.NORM != "frozen" else None
            trunk = Pyramid(ResNetTrunk(body), widths, rcnn.PYRAMID_WIDTH, fpn_norm)
        heads = _pyramid_heads(rcnn, num_classes)
    detector = Detector(trunk, _proposals(rcnn, trunk.out_channels), heads, Canvas(canvas))
    if rcnn.NORM == "frozen":
        freeze_batch_norms(detector)
    elif rcnn.NORM == "sync":
        convert_sync_batch_norm(detector)
    return detector


def pretrained_body(cfg: CfgNode, weights: Path | None, which: str = "") -> Backbone:
    """Build the backbone and load `weights` into it, every tensor or none.

    A Swin is built at the canvas's size at once, since its windows keep theirs; a ViT at the
    pretraining's.
    """
    name, canvas = cfg.MODEL.BACKBONE.NAME, cfg.DETECTION.CANVAS
    transformer = not any(kind in name for kind in ("resnet", "resnext"))
    if transformer and not canvas:
        raise ValueError(f"DETECTION.CANVAS: {name} needs a fixed image size; set it, e.g. to 1024")
    size = canvas if "swin" in name else cfg.DATA.IMG_SIZE
    options = section_options(cfg.MODEL.BACKBONE)
    body = build_backbone(**options, img_size=size, use_checkpoint=cfg.TRAIN.USE_CHECKPOINT)
    if weights is not None:
        logger.info(load_network(body, read_torch(weights), str(weights), which))
    return body


def _proposals(rcnn: CfgNode, width: int) -> RegionProposalNetwork:
    sizes = tuple(map(int, rcnn.ANCHOR_SIZES))
    levels = (sizes,) if rcnn.NECK == "c4" else tuple((size,) for size in sizes)
    anchors = AnchorGenerator(levels, (_RATIOS,) * len(levels))
    return RegionProposalNetwork(
        anchors,
        _RPNHead(width, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=rcnn.RPN_BATCH,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), rcnn.RPN_PRE_NMS, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), rcnn.RPN_POST_NMS, strict=True)),
        nms_thresh=0.7,
    )


def _head_options(rcnn: CfgNode) -> dict[str, Any]:
    return {
        "fg_iou_thresh": 0.5,
        "bg_iou_thresh": 0.5,
        "batch_size_per_image": rcnn.ROI_BATCH,
        "positive_fraction": 0.25,
        "bbox_reg_weights": None,  # Faster R-CNN's
        "score_thresh": rcnn.SCORE_THRESH,
        "nms_thresh": 0.5,
        "detections_per_img": rcnn.MAX_DETECTIONS,
    }


def _c4_heads(rcnn: CfgNode, stage5: Stage5, num_classes: int) -> C4Heads:
    pool = MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0)
    width = stage5.out_channels
    predictor = _BoxPredictor(width, num_classes + 1)
    masks = _MaskPredictor(width, 256, num_classes + 1) if rcnn.MASKS else None
    return C4Heads(pool, stage5, predictor, **_head_options(rcnn), mask_predictor=masks)


def _pyramid_heads(rcnn: CfgNode, num_classes: int) -> roi_heads.RoIHeads:
    levels, width = ["0", "1", "2", "3"], rcnn.PYRAMID_WIDTH
    masks: dict[str, Any] = {}
    if rcnn.MASKS:
        masks = {
            "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
            "mask_head": MaskRCNNHeads(width, (width,) * 4, 1),
            "mask_predictor": _MaskPredictor(width, width, num_classes + 1),
        }
    return roi_heads.RoIHeads(
        MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
        TwoMLPHead(width * 7 * 7, rcnn.HEAD_WIDTH),
        _BoxPredictor(rcnn.HEAD_WIDTH, num_classes + 1),
        **_head_options(rcnn),
        **masks,
    )
