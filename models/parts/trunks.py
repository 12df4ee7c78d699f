"""Pretrained backbones as trunks of detectors and segmenters: images to maps of several strides."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from yacs.config import CfgNode

from models.parts.backbones import Backbone, build_backbone
from models.parts.resolution import dense_swin
from models.weights.load import load_network
from utils.checkpoints.foreign import read_torch
from utils.config.sections import section_options

logger = logging.getLogger("synco")

# At this size every stage of a Swin has its full windows (of at most 14 cells)
_SWIN_SIZE = 448


class Trunk(nn.Module):
    """Images (N,3,H,W) to maps (N,C,h,w): `widths` are their channels, `strides` their strides."""

    widths: list[int]
    strides: list[int]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps, the largest first."""
        raise NotImplementedError

    @property
    def pretrained(self) -> nn.Module:
        """Return what a pretraining made; what a trunk adds to it starts at random."""
        return cast(nn.Module, getattr(self, "body", self))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N,C,H,W)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each position by itself."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResNetTrunk(Trunk):
    """The stages of a timm ResNet, with or without `layer4`."""

    def __init__(self, body: ResNet, last_stage: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = body.conv1, body.bn1, body.act1
        self.maxpool = body.maxpool
        self.layer1, self.layer2, self.layer3 = body.layer1, body.layer2, body.layer3
        # Otherwise `layer4` belongs to the head of a C4 detector.
        if last_stage:
            self.layer4 = body.layer4
        stages = body.feature_info[1 : 5 if last_stage else 4]
        self.widths = [cast(int, info["num_chs"]) for info in stages]
        # stems for small images shrink less than timm's `feature_info` says
        stem = next(conv for conv in body.conv1.modules() if isinstance(conv, nn.Conv2d))
        shrinks = stem.stride[0] * (1 if isinstance(body.maxpool, nn.Identity) else 2)
        self.strides = [shrinks * cast(int, info["reduction"]) // 4 for info in stages]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return three or four maps of images of any size."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        maps = []
        for number in range(1, len(self.widths) + 1):
            x = getattr(self, f"layer{number}")(x)
            maps.append(x)
        return maps


class SwinTrunk(Trunk):
    """The four stages of a timm Swin, each under its own layer norm (Liu et al. 2021).

    The last norm is the pretrained one.
    """

    def __init__(self, body: SwinTransformer) -> None:
        super().__init__()
        self.body = body
        self.widths = [info["num_chs"] for info in body.feature_info]
        self.strides = [info["reduction"] for info in body.feature_info]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths[:-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps of images of any size, or of the built one if the Swin is no dense."""
        x = self.body.patch_embed(images)
        maps = []
        for stage, norm in zip(self.body.layers, [*self.norms, self.body.norm], strict=True):
            x = stage(x)
            maps.append(norm(x).permute(0, 3, 1, 2))
        return maps


class ViTTaps(Trunk):
    """A plain ViT's maps after four of its blocks, enlarged or shrunk to four strides.

    As BEiT (Bao et al. 2022, arXiv:2106.08254) and MAE feed UPerNet: no final norm, the width kept.
    `taps` counts blocks from 1; empty: after d/3, d/2, 2d/3 and d of d blocks. Images have the size
    that the ViT was built for (see `resize_positions`).
    """

    def __init__(self, body: VisionTransformer, taps: Sequence[int] = ()) -> None:
        super().__init__()
        depth, width = len(body.blocks), body.embed_dim
        taps = tuple(taps) or (depth // 3, depth // 2, depth * 2 // 3, depth)
        if len(taps) != 4 or not all(1 <= tap <= depth for tap in taps):
            raise ValueError(f"taps: {list(taps)}; give four blocks, each from 1 to {depth}")
        body.norm = nn.Identity()  # no map passes it; DDP would wait for its gradient
        self.body = body
        self.blocks = [tap - 1 for tap in taps]
        patch = body.patch_embed.patch_size[0]
        up = partial(nn.ConvTranspose2d, width, width, kernel_size=2, stride=2)
        twice = nn.Sequential(up(), nn.BatchNorm2d(width), nn.GELU(), up())
        levels = [twice, up(), nn.Identity(), nn.MaxPool2d(2)]
        self.strides = [patch // 4, patch // 2, patch, patch * 2]
        if patch == 8:  # one octave finer, so that the strides stay 4 to 32
            levels = [up(), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)]
            self.strides = [4, 8, 16, 32]
        self.levels = nn.ModuleList(levels)
        self.widths = [width] * 4

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps of images of the built size."""
        maps = self.body.forward_intermediates(
            images, indices=self.blocks, norm=False, intermediates_only=True
        )
        return [level(tokens) for level, tokens in zip(self.levels, maps, strict=True)]


class ViTTokens(Trunk):
    """The patch tokens of a plain ViT's last `count` blocks under its final norm, at one stride.

    For linear probes (DINOv2, Oquab et al. 2023, arXiv:2304.07193, section 7.4).
    """

    def __init__(self, body: VisionTransformer, count: int = 1) -> None:
        super().__init__()
        self.body, self.count = body, count
        self.widths = [body.embed_dim] * count
        self.strides = [body.patch_embed.patch_size[0]] * count

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return `count` maps of images of the built size, the last block's last."""
        maps = self.body.forward_intermediates(
            images, indices=self.count, norm=True, intermediates_only=True
        )
        return cast(list[Tensor], maps)


def build_trunk(body: nn.Module, taps: Sequence[int] = ()) -> Trunk:
    """Return the trunk of a body with four strides; `taps` are for ViTs (see `ViTTaps`)."""
    kind = family(body)
    if kind == "resnet":
        return ResNetTrunk(cast(ResNet, body))
    if kind == "swin":
        return SwinTrunk(cast(SwinTransformer, body))
    return ViTTaps(cast(VisionTransformer, body), taps)


def family(body: nn.Module) -> str:
    """Return `resnet`, `swin` or `vit`; ValueError for a backbone of another build."""
    if isinstance(body, ResNet):
        if not len(getattr(body, "layer4", ())):
            raise ValueError(
                "MODEL.BACKBONE.NAME: this ResNet has three stages, a dense head needs four; use "
                "resnet18"
            )
        return "resnet"
    for kind, name in ((SwinTransformer, "swin"), (VisionTransformer, "vit")):
        if isinstance(body, kind):
            return name
    raise ValueError(
        f"MODEL.BACKBONE.NAME: a {type(body).__name__} has no dense maps here; use a ResNet, a "
        "Swin or a ViT"
    )


def resize_positions(body: nn.Module, height: int, width: int) -> None:
    """Interpolate a ViT's positions to images of `height` x `width`, multiples of its patch."""
    with torch.no_grad():
        cast(VisionTransformer, body).set_input_size(img_size=(height, width))


def pretrained_body(
    cfg: CfgNode,
    weights: Path | None,
    which: str = "",
    *,
    swin_size: int = 0,
    output_stride: int = 32,
) -> Backbone:
    """Build the backbone of `cfg` and load `weights` into it, every tensor or none.

    A ViT is built for the pretraining's images; `resize_positions` comes after the load. A Swin
    takes any size (see `dense_swin`), unless `swin_size` fixes it to squares as earlier versions
    did. `output_stride` 8 or 16 dilates the last stages of a ResNet.
    """
    swin = "swin" in cfg.MODEL.BACKBONE.NAME
    body = build_backbone(
        **section_options(cfg.MODEL.BACKBONE),
        img_size=(swin_size or _SWIN_SIZE) if swin else cfg.DATA.IMG_SIZE,
        use_checkpoint=cfg.TRAIN.USE_CHECKPOINT,
        output_stride=output_stride,
    )
    if weights is not None:
        logger.info(load_network(body, read_torch(weights), str(weights), which))
    if isinstance(body, SwinTransformer) and not swin_size:
        dense_swin(body)
    return body
