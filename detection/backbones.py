"""Pretrained backbones as detectors use them: maps of several strides, of one width."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.parts.backbones import Backbone, feature_map

NormLayer = Callable[[int], nn.Module]


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (N,C,H,W)."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise each position by itself."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def family(body: nn.Module) -> str:
    """Return `resnet`, `swin` or `vit`; ValueError for a backbone of another build."""
    from timm.models.resnet import ResNet
    from timm.models.swin_transformer import SwinTransformer
    from timm.models.vision_transformer import VisionTransformer

    for kind, name in ((ResNet, "resnet"), (SwinTransformer, "swin"), (VisionTransformer, "vit")):
        if isinstance(body, kind):
            if name == "resnet" and not len(getattr(body, "layer4", ())):
                raise ValueError(
                    "MODEL.BACKBONE.NAME: this ResNet has three stages, a detector needs four; "
                    "use resnet18"
                )
            return name
    raise ValueError(
        f"MODEL.BACKBONE.NAME: a {type(body).__name__} has no detector here; use a ResNet, a Swin "
        "or a ViT"
    )


class ResNetTrunk(nn.Module):
    """The stages of a timm ResNet, with or without layer4: {"0": stride 4, "1": stride 8, ...}."""

    def __init__(self, body: Any, last_stage: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1, self.maxpool = (
            body.conv1,
            body.bn1,
            body.act1,
            body.maxpool,
        )
        self.layer1, self.layer2, self.layer3 = body.layer1, body.layer2, body.layer3
        if last_stage:
            self.layer4 = body.layer4

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return the maps of images (N,3,H,W)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        maps = OrderedDict()
        for number in range(4 if hasattr(self, "layer4") else 3):
            x = maps[str(number)] = getattr(self, f"layer{number + 1}")(x)
        return maps


class SwinTrunk(nn.Module):
    """The four stages of a timm Swin, each under its own layer norm (Liu et al. 2021).

    The last norm is the pretrained one.
    """

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in swin_widths(body)[:3])

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return the maps of images (N,3,H,W), H and W those the backbone was built for."""
        x = self.body.patch_embed(images)
        maps = OrderedDict()
        for number, stage in enumerate(self.body.layers):
            x = stage(x)
            norm = self.body.norm if number == 3 else self.norms[number]
            maps[str(number)] = norm(x).permute(0, 3, 1, 2)
        return maps


def swin_widths(body: Any) -> list[int]:
    """Return the channels of a Swin's four stages."""
    return [info["num_chs"] for info in body.feature_info]


class Pyramid(nn.Module):
    """A trunk under a feature pyramid (Lin et al. 2017): four strides, a fifth by subsampling."""

    def __init__(
        self, trunk: nn.Module, widths: list[int], width: int, norm: NormLayer | None
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.fpn = FeaturePyramidNetwork(widths, width, LastLevelMaxPool(), norm)
        self.out_channels = width

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return five maps of images (N,3,H,W)."""
        return self.fpn(self.trunk(images))


class SimplePyramid(nn.Module):
    """A plain ViT under a simple feature pyramid (ViTDet, Li et al. 2022, arXiv:2203.16527, 3).

    All strides come from the last map, after the backbone's final norm. Attention is global in
    every block.
    """

    def __init__(self, body: Backbone, width: int) -> None:
        super().__init__()
        self.body = body
        full, half, quarter = (body.num_features // share for share in (1, 2, 4))
        up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
        twice = nn.Sequential(up(full, half), LayerNorm2d(half), nn.GELU(), up(half, quarter))
        scales = (twice, up(full, half), nn.Identity(), nn.MaxPool2d(2))
        widths = (quarter, half, full, full)
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(channels, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for scale, channels in zip(scales, widths, strict=True)
        )
        self.out_channels = width

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return five maps of images (N,3,S,S), S the size the backbone was built for."""
        last = feature_map(self.body, images)
        maps = OrderedDict((str(number), level(last)) for number, level in enumerate(self.levels))
        maps["pool"] = F.max_pool2d(maps["3"], kernel_size=1, stride=2)
        return maps


class C4Trunk(nn.Module):
    """The stages of a ResNet up to `layer3` as one map; the RoI head owns the last one."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.trunk = ResNetTrunk(body, last_stage=False)
        self.out_channels = body.feature_info[3]["num_chs"]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return {"0": the last map} of images (N,3,H,W)."""
        return OrderedDict([("0", self.trunk(images)["2"])])


class Stage5(nn.Module):
    """The last stage of a ResNet on regions, under one more norm: `Res5ROIHeadsExtraNorm` of MoCo.

    He et al. 2020, appendix: the norm makes the features' scale that of a fine-tuned network.
    """

    def __init__(self, body: Any, norm: NormLayer | None) -> None:
        super().__init__()
        self.layer4 = body.layer4
        self.out_channels = body.num_features
        self.norm = norm(self.out_channels) if norm else nn.Identity()

    def forward(self, regions: Tensor) -> Tensor:
        """Map regions (R,C,14,14) to (R,F,7,7)."""
        return self.norm(self.layer4(regions))


def resize_positions(body: Any, size: int) -> None:
    """Interpolate a ViT's positions to square images; ValueError if patches do not fit `size`."""
    patch = body.patch_embed.patch_size[0]
    if size % (2 * patch):
        raise ValueError(
            f"DETECTION.CANVAS: {size} is no multiple of two patches ({2 * patch}), which the "
            "pyramid halves"
        )
    with torch.no_grad():
        body.set_input_size(img_size=(size, size))


def freeze_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm by a fixed scale and shift that no longer move."""
    from torchvision.ops import FrozenBatchNorm2d

    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, child.eps)
            for key in ("weight", "bias", "running_mean", "running_var"):
                getattr(frozen, key).copy_(getattr(child, key).detach())
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child)
