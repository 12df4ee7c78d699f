"""The vision transformers of MoCo v3 (Chen, Xie and He 2021, arXiv:2104.02057, section 4)."""

import functools
import math
from typing import NamedTuple

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class _Shape(NamedTuple):
    width: int
    depth: int
    conv_stem: bool = False


# 12 heads also at width 384, so vit_small is not deit_small. With a convolutional stem there is one
# block fewer (Xiao et al. 2021, arXiv:2106.14881).
MOCOV3_VITS = {
    "vit_small": _Shape(384, depth=12),
    "vit_base": _Shape(768, depth=12),
    "vit_conv_small": _Shape(384, depth=11, conv_stem=True),
    "vit_conv_base": _Shape(768, depth=11, conv_stem=True),
}


def mocov3_vit(
    name: str,
    *,
    img_size: int = 224,
    patch_size: int = 16,
    drop_path_rate: float = 0.0,
    reg_tokens: int = 0,
    in_chans: int = 3,
) -> nn.Module:
    """Build a ViT of `MOCOV3_VITS`: fixed 2-D sin-cos positions, Xavier initialisation."""
    shape = MOCOV3_VITS[name]
    if shape.conv_stem and patch_size != 16:
        raise ValueError(
            f"MODEL.BACKBONE.PATCH_SIZE: {patch_size}: a convolutional stem spans 16 pixels"
        )
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=shape.width,
        depth=shape.depth,
        drop_path_rate=drop_path_rate,
        reg_tokens=reg_tokens,
        embed_layer=ConvStem if shape.conv_stem else PatchEmbed,
        num_classes=0,
        num_heads=12,
        qkv_bias=True,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
    )
    _initialise(vit)
    if not shape.conv_stem:
        # Xavier's bound of the linear layer that the projection of patches is
        bound = math.sqrt(6.0 / (in_chans * patch_size**2 + vit.embed_dim))
        nn.init.uniform_(vit.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(vit.patch_embed.proj.bias)
    rows, cols = vit.patch_embed.grid_size
    table = sincos_positions(rows, cols, vit.embed_dim, vit.num_prefix_tokens)
    vit.pos_embed = nn.Parameter(table, requires_grad=False)
    return vit


def _initialise(vit: nn.Module) -> None:
    for path, module in vit.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if path.endswith("qkv"):  # q, k and v are three separate matrices
            bound = math.sqrt(6.0 / (module.out_features // 3 + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    # as in MoCo v3's code; DeiT has 0.02
    nn.init.normal_(vit.cls_token, std=1e-6)  # type: ignore[arg-type]


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 and a 1x1: 16-pixel patches (Xiao et al. 2021, 4)."""

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        bias: bool = True,
        **_: object,  # what timm passes for its own patch embedding
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        for width in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [
                nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            in_chans = width
        self.stem = nn.Sequential(*layers, nn.Conv2d(embed_dim, embed_dim, 1, bias=bias))
        self.flatten = True  # False: a map, as timm's patch embedding names it

    def forward(self, images: Tensor) -> Tensor:
        """Return patches (N, h*w, F), or their map (N, h, w, F), of images (N, 3, H, W)."""
        patches = self.stem(images).permute(0, 2, 3, 1)
        return patches.flatten(1, 2) if self.flatten else patches


def sincos_positions(rows: int, cols: int, width: int, num_tokens: int = 1) -> Tensor:
    """Return fixed 2-D positions (1, num_tokens + rows*cols, width), zero for class tokens.

    Token (r, c) gets [sin(r w), cos(r w), sin(c w), cos(c w)] with w_i = 10000^(-i / (width/4)).
    The row comes first, as in the published weights.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, col)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(num_tokens, width, dtype=table.dtype), table])[None].float()
