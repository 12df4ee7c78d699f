"""Faster, Mask and Cascade R-CNN from our backbones and torchvision."""

import logging
from pathlib import Path
from typing import Any, cast

from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from yacs.config import CfgNode

from detection.rcnn.backbones import C4Trunk, Pyramid, SimplePyramid, Stage5
from detection.rcnn.cascade import build_cascade_heads
from detection.rcnn.heads import build_c4_heads, build_pyramid_heads
from detection.rcnn.proposals import build_proposals
from models.parts.backbones import Backbone
from models.parts.norm import convert_sync_batch_norm, freeze_batch_norms
from models.parts.trunks import build_trunk, family, pretrained_body, resize_positions

logger = logging.getLogger("synco")

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in pretraining
_PATCHES = (4, 8, 16, 32)  # regions are pooled at strides that are powers of two
_NECKS_OF = {"resnet": ("fpn", "c4"), "swin": ("fpn",), "vit": ("pyramid",)}


class Canvas(GeneralizedRCNNTransform):
    """Normalise and pad resized images to a fixed square of `side`, 0: as small as fits."""

    def __init__(self, side: int) -> None:
        # The two sizes belong to its resizing, which `resize` below turns off.
        super().__init__(1, 1, list(_MEAN), list(_STD), size_divisible=32)
        self.side = side

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Leave the image as the loader made it."""
        return image, target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """Pad with zeros to one size, (N,3,H,W)."""
        if not self.side:
            return super().batch_images(images, size_divisible)
        # After normalising, zero is the mean colour.
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
    # with a canvas a Swin stays the network of runs from before it took any size
    body = pretrained_body(cfg, weights, which, swin_size=canvas)
    kind = family(body)
    if kind == "swin" and canvas:
        logger.warning(
            "DETECTION.CANVAS: %d: at such a size %s is not the published network, since its "
            "windows wrap around the edges; set it to 0, unless an older run goes on",
            canvas,
            cfg.MODEL.BACKBONE.NAME,
        )
    if rcnn.NECK not in _NECKS_OF[kind]:
        raise ValueError(
            f"MODEL.RCNN.NECK: {rcnn.NECK!r} does not apply to {cfg.MODEL.BACKBONE.NAME}; "
            f"use {' or '.join(_NECKS_OF[kind])}"
        )
    trunk, heads = _parts(cfg, body, kind, num_classes)
    detector = Detector(
        trunk, build_proposals(rcnn, trunk.out_channels, trunk.strides), heads, Canvas(canvas)
    )
    if rcnn.NORM == "frozen":
        freeze_batch_norms(detector)
    elif rcnn.NORM == "sync":
        convert_sync_batch_norm(detector)
    return detector


def _parts(cfg: CfgNode, body: Backbone, kind: str, num_classes: int) -> tuple[Any, nn.Module]:
    """Return the trunk with its neck and the RoI heads; `kind` is the backbone's family."""
    rcnn = cfg.MODEL.RCNN
    # The necks of transformers have no batch norm, as their backbones have none. And a fresh norm
    # cannot be frozen: it has no statistics yet.
    norm = nn.BatchNorm2d if kind == "resnet" and rcnn.NORM != "frozen" else None
    if rcnn.NECK == "c4":
        trunk: Any = C4Trunk(cast(ResNet, body))
        stage5 = Stage5(cast(ResNet, body), norm if rcnn.EXTRA_NORM else None)
        stride = trunk.strides[-1]
        return trunk, build_c4_heads(rcnn, stage5, stage5.out_channels, stride, num_classes)
    if kind == "vit":
        _fit_canvas(body, cfg.MODEL.BACKBONE.NAME, cfg.DETECTION.CANVAS)
        trunk = SimplePyramid(body, rcnn.PYRAMID_WIDTH)
    else:
        trunk = Pyramid(build_trunk(body), rcnn.PYRAMID_WIDTH, norm)
    build_heads = build_cascade_heads if rcnn.CASCADE else build_pyramid_heads
    return trunk, build_heads(rcnn, trunk.strides, num_classes)


def _fit_canvas(body: Backbone, name: str, canvas: int) -> None:
    patch = cast(VisionTransformer, body).patch_embed.patch_size[0]
    if not canvas:
        raise ValueError(f"DETECTION.CANVAS: {name} needs a fixed image size; set it, e.g. to 1024")
    if patch not in _PATCHES:
        raise ValueError(
            f"MODEL.BACKBONE.NAME: {name} has patches of {patch} pixels, and a pyramid needs one "
            f"of {', '.join(map(str, _PATCHES))}; use a ViT that was pretrained with such patches"
        )
    if canvas % (2 * patch):
        raise ValueError(
            f"DETECTION.CANVAS: {canvas} is no multiple of two patches ({2 * patch}), which the "
            "pyramid halves"
        )
    resize_positions(body, canvas, canvas)
