"""Faster, Mask and Cascade R-CNN from our backbones and torchvision."""

import logging
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
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
from detection.cascade import build_cascade_heads
from detection.heads import build_c4_heads, build_pyramid_heads
from detection.proposals import build_proposals
from models.parts.backbones import Backbone, build_backbone
from models.parts.norm import convert_sync_batch_norm
from models.weights.load import load_network
from utils.checkpoints.foreign import read_torch
from utils.config.sections import section_options

logger = logging.getLogger("synco")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in pretraining
_FIRST_STRIDES = {"imagenet": 4, "cifar": 1, "cifar_stride2": 2}  # of a ResNet's stems
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
    strides = _strides(body, kind, cfg.MODEL.BACKBONE.STEM)
    if rcnn.NECK == "c4":
        trunk: Any = C4Trunk(body)
        stage5 = Stage5(body, norm if rcnn.EXTRA_NORM else None)
        heads: nn.Module = build_c4_heads(
            rcnn, stage5, stage5.out_channels, strides[2], num_classes
        )
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
        build_heads = build_cascade_heads if rcnn.CASCADE else build_pyramid_heads
        heads = build_heads(rcnn, strides, num_classes)
    detector = Detector(trunk, build_proposals(rcnn, trunk.out_channels), heads, Canvas(canvas))
    if rcnn.NORM == "frozen":
        freeze_batch_norms(detector)
    elif rcnn.NORM == "sync":
        convert_sync_batch_norm(detector)
    return detector


def _strides(body: Any, kind: str, stem: str) -> list[int]:
    """Return the strides of the four maps."""
    if kind == "resnet":
        first = _FIRST_STRIDES[stem]
    else:
        patch = body.patch_embed.patch_size[0]
        first = patch if kind == "swin" else patch // 4  # a ViT's pyramid enlarges fourfold
    return [first << level for level in range(4)]


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
