"""A segmenter: a pretrained backbone, the head that is judged, and one that helps in training."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.optim import Group, parameter_groups, with_layer_decay
from models.classifier import freeze, layer_ids
from models.parts.backbones import Backbone
from models.parts.norm import convert_sync_batch_norm, freeze_batch_norms
from models.parts.trunks import (
    Trunk,
    ViTTokens,
    build_trunk,
    family,
    pretrained_body,
    resize_positions,
)
from models.weights.segmenter import load_segmenter
from segmentation.heads import FCN, Head, LinearGrid, LinearHead, UPerNet, pixel_loss


class Segmenter(nn.Module):
    """Images to losses in training, to logits at a head's size else.

    Parameters have mmsegmentation's names: `backbone`, `decode_head`, `auxiliary_head`.
    """

    def __init__(
        self,
        backbone: Trunk,
        decode_head: nn.Module,
        auxiliary_head: nn.Module | None = None,
        *,
        auxiliary_weight: float = 0.4,
        loss_over: str = "all",
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head, self.auxiliary_head = decode_head, auxiliary_head
        self.auxiliary_weight, self.loss_over = auxiliary_weight, loss_over
        # What a trunk adds to a backbone has to learn, but a linear probe learns one layer. In a
        # list, torch does not take the part for a second child.
        linear = isinstance(decode_head, LinearHead | LinearGrid)
        self.frozen_part = [backbone if linear else backbone.pretrained] if frozen else []
        for part in self.frozen_part:
            freeze(part)
        self.num_heads = len(decode_head.heads) if isinstance(decode_head, LinearGrid) else 1

    def train(self, mode: bool = True) -> "Segmenter":
        """Set the mode; a frozen backbone stays in eval mode."""
        super().train(mode)
        # else batch norms would move and drop path would drop
        for part in self.frozen_part:
            part.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Return losses of labels (N,H,W), or logits (G*N,C,h,w) of G heads if there are none."""
        maps = self.backbone(images)
        logits = self.decode_head(maps)
        if labels is None:
            return logits
        parts = logits.chunk(self.num_heads)
        # a sum: each head of a grid then has the gradient that it would have alone
        losses = {"loss_decode": sum_of(pixel_loss(part, labels, self.loss_over) for part in parts)}
        if self.auxiliary_head is not None:
            auxiliary = pixel_loss(self.auxiliary_head(maps), labels, self.loss_over)
            losses["loss_auxiliary"] = self.auxiliary_weight * auxiliary
        return losses

    def after_step(self, progress: object) -> None:
        """Do nothing: no target follows a segmenter's step."""


def sum_of(losses: Iterator[Tensor]) -> Tensor:
    """Return the sum of at least one loss."""
    return torch.stack(list(losses)).sum()


def build_segmenter(
    cfg: CfgNode,
    num_classes: int,
    weights: Path | None,
    which: str = "",
    whole: bool = False,
) -> Segmenter:
    """Build the segmenter of `MODEL`; without `weights` its backbone is random.

    `whole` takes the heads of `weights` too. Raises `ValueError` for a backbone that has no maps
    and for weights that do not fit it.
    """
    node = cfg.MODEL.SEGMENTER
    backbone = None if whole else weights
    body = pretrained_body(cfg, backbone, which, output_stride=node.OUTPUT_STRIDE)
    trunk = _trunk(cfg, body)
    segmenter = Segmenter(
        trunk,
        _head(node, trunk.widths, num_classes, len(cfg.SEGMENTATION.LRS)),
        _auxiliary(node, trunk.widths, num_classes),
        auxiliary_weight=node.AUX_WEIGHT,
        loss_over=node.LOSS_OVER,
        frozen=node.FREEZE,
    )
    if whole and weights is not None:
        load_segmenter(segmenter, weights)
    return _with_norms(segmenter, node.NORM)


def _with_norms(segmenter: Segmenter, norm: str) -> Segmenter:
    if norm == "frozen":
        freeze_batch_norms(segmenter.backbone.pretrained)
    if norm != "batch":  # a head's norms are fresh: they must learn
        convert_sync_batch_norm(segmenter)
    return segmenter


def _trunk(cfg: CfgNode, body: Backbone) -> Trunk:
    node = cfg.MODEL.SEGMENTER
    taps = [int(tap) for tap in node.TAPS]
    if family(body) != "vit":
        return build_trunk(body)  # any image size
    vit = cast(VisionTransformer, body)
    _fit_crop(vit, cfg.SEGMENTATION.CROP)
    if node.HEAD != "linear":
        return build_trunk(body, taps)
    # a probe reads tokens as they are: no convolutions between the backbone and its one layer
    depth = len(vit.blocks)
    count = len(taps) or 1
    if taps and taps != list(range(depth - count + 1, depth + 1)):
        raise ValueError(
            f"MODEL.SEGMENTER.TAPS: {taps}; a linear head reads the last blocks of {depth}, e.g. "
            f"{list(range(depth - count + 1, depth + 1))}"
        )
    return ViTTokens(vit, count)


def _fit_crop(vit: VisionTransformer, crop: list[int]) -> None:
    patch = vit.patch_embed.patch_size[0]
    if crop[0] % patch or crop[1] % patch:
        raise ValueError(
            f"SEGMENTATION.CROP: {crop} is no multiple of the patch, {patch} pixels; use "
            f"{crop[0] // patch * patch or patch}"
        )
    resize_positions(vit, crop[0], crop[1])


def _head(node: CfgNode, widths: list[int], num_classes: int, num_rates: int) -> nn.Module:
    if node.HEAD == "upernet":
        return UPerNet(
            widths,
            num_classes,
            width=node.WIDTH,
            pool_scales=node.POOL_SCALES,
            dropout=node.DROPOUT,
        )
    if node.HEAD == "fcn":
        return FCN(
            widths[-1],
            num_classes,
            width=node.WIDTH,
            num_convs=node.FCN_CONVS,
            dilation=node.FCN_DILATION,
            concat=node.FCN_CONCAT,
            dropout=node.DROPOUT,
        )
    head = LinearHead(widths, num_classes)
    return LinearGrid(head, widths, num_rates) if num_rates > 1 else head


def _auxiliary(node: CfgNode, widths: list[int], num_classes: int) -> Head | None:
    if not node.AUX_WEIGHT:
        return None
    stage = node.AUX_STAGE - 1  # the key counts from 1
    return FCN(
        widths[stage],
        num_classes,
        width=node.AUX_WIDTH,
        num_convs=1,
        concat=False,
        dropout=node.DROPOUT,
        stage=stage,
    )


def optimizer_groups(segmenter: Segmenter, cfg: CfgNode) -> list[Group]:
    """Return the parameter groups: a layer's rate with `LAYER_DECAY`, a head's with `LRS`."""
    if isinstance(segmenter.decode_head, LinearGrid):
        return [
            {**group, "rate": number}
            for number, head in enumerate(segmenter.decode_head.heads)
            for group in parameter_groups(head, cfg.OPTIM)
        ]
    groups = parameter_groups(segmenter, cfg.OPTIM)
    decay = cfg.SEGMENTATION.LAYER_DECAY
    if decay == 1.0:
        return groups
    body = segmenter.backbone.pretrained
    if not isinstance(body, VisionTransformer):
        raise ValueError(
            f"SEGMENTATION.LAYER_DECAY: {decay} is for ViTs, and {cfg.MODEL.BACKBONE.NAME} is "
            "none; set it to 1.0"
        )
    layers = layer_ids(cast(Backbone, body))
    # heads and the pyramid of the taps are the layer above the last block
    last = max(layers.values()) + 1
    scale = {p: decay ** (last - layers[name]) for name, p in body.named_parameters()}
    return with_layer_decay(groups, scale)
