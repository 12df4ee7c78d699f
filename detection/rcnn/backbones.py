"""Trunks under the necks of detectors: maps of several strides, of one width."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import cast

import torch.nn.functional as F
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models.parts.backbones import Backbone, feature_map
from models.parts.trunks import LayerNorm2d, ResNetTrunk, Trunk

NormLayer = Callable[[int], nn.Module]


class Pyramid(nn.Module):
    """A trunk under a feature pyramid (Lin et al. 2017): four strides, a fifth by subsampling."""

    def __init__(self, trunk: Trunk, width: int, norm: NormLayer | None) -> None:
        super().__init__()
        self.trunk, self.strides = trunk, trunk.strides
        self.fpn = FeaturePyramidNetwork(trunk.widths, width, LastLevelMaxPool(), norm)
        self.out_channels = width

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return five maps of images (N,3,H,W)."""
        # torchvision takes maps by name, in this order.
        maps = enumerate(self.trunk(images))
        return self.fpn(OrderedDict((str(number), level) for number, level in maps))


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
        # With a patch of 16 the strides are 4, 8, 16 and 32.
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
        patch = cast(VisionTransformer, body).patch_embed.patch_size[0]
        self.strides = [patch // 4, patch // 2, patch, patch * 2]

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return five maps of images (N,3,S,S), S the size the backbone was built for."""
        last = feature_map(self.body, images)
        maps = OrderedDict((str(number), level(last)) for number, level in enumerate(self.levels))
        # Every second cell, as `LastLevelMaxPool` of the other pyramid makes its fifth map.
        maps["pool"] = F.max_pool2d(maps["3"], kernel_size=1, stride=2)
        return maps


class C4Trunk(nn.Module):
    """The stages of a ResNet up to `layer3` as one map; the RoI head owns the last one."""

    def __init__(self, body: ResNet) -> None:
        super().__init__()
        # Without `layer4`: it runs on regions, in the head.
        self.trunk = ResNetTrunk(body, last_stage=False)
        self.out_channels, self.strides = self.trunk.widths[-1], self.trunk.strides

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Return {"0": the last map} of images (N,3,H,W)."""
        return OrderedDict([("0", self.trunk(images)[-1])])


class Stage5(nn.Module):
    """The last stage of a ResNet on regions, under one more norm: `Res5ROIHeadsExtraNorm` of MoCo.

    He et al. 2020, appendix: the norm makes the features' scale that of a fine-tuned network.
    """

    def __init__(self, body: ResNet, norm: NormLayer | None) -> None:
        super().__init__()
        self.layer4 = cast(nn.Module, body.layer4)
        self.out_channels = body.num_features
        self.norm = norm(self.out_channels) if norm else nn.Identity()

    def forward(self, regions: Tensor) -> Tensor:
        """Map regions (R,C,14,14) to (R,F,7,7)."""
        return self.norm(self.layer4(regions))
