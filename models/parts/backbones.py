"""Backbones from timm behind timm's own contract: ``module(x) -> (N, num_features)``.

``module.num_features`` is the width and ``module.forward_features(x)`` the last map or token sequence. The
module is timm's, not a wrapper, so its state dict carries timm's key names and loads back into timm as it is.
"""

import difflib
import functools
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

RESNETS = ("resnet8", "resnet18", "resnet34", "resnet50", "resnet101")
_TIMM_NAMES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
}
# MoCo v3's ViTs (spec 1.4): 12 heads also at width 384, so vit_small is not deit_small. With a convolutional
# stem they have one block fewer (Xiao et al. 2021, arXiv:2106.14881).
_MOCOV3_VITS: dict[str, dict[str, Any]] = {
    "vit_small": {"embed_dim": 384, "depth": 12},
    "vit_base": {"embed_dim": 768, "depth": 12},
    "vit_conv_small": {"embed_dim": 384, "depth": 11, "conv_stem": True},
    "vit_conv_base": {"embed_dim": 768, "depth": 11, "conv_stem": True},
}
BACKBONES = (*RESNETS, *_TIMM_NAMES, *_MOCOV3_VITS)
STEMS = ("imagenet", "cifar", "cifar_stride2")


class Backbone(nn.Module):
    """What ``build_backbone`` returns, for type checkers: a timm module without a classifier."""

    num_features: int

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map or token sequence of images (N, 3, H, W)."""
        raise NotImplementedError


def build_backbone(
    name: str,
    *,
    img_size: int = 224,
    drop_path: float = 0.0,
    stem: str = "imagenet",
    patch_size: int = 0,
    num_tokens: int = 1,
    zero_init_residual: bool = False,
    freeze_patch_embed: bool = False,
    use_checkpoint: bool = False,
) -> Backbone:
    """Build the backbone ``name`` (one of ``BACKBONES`` or ``timm/<name>``) without a classifier.

    ``stem`` concerns ResNets, ``patch_size`` (0: the model's own) and ``freeze_patch_embed`` transformers,
    ``num_tokens`` plain ViTs: 2 adds SiT's rotation token (timm's ``reg_token``) to the class token.
    Raises ``ValueError`` naming the key for an unknown name or an option the backbone does not have.
    """
    if name in RESNETS:
        _refuse(name, patch_size=patch_size, freeze_patch_embed=freeze_patch_embed)
        _refuse(name, num_tokens=num_tokens != 1 and num_tokens)
        backbone = _resnet(name, stem, drop_path, zero_init_residual)
    else:
        options: dict[str, Any] = {"img_size": img_size, "drop_path_rate": drop_path}
        if patch_size:
            options["patch_size"] = patch_size
        if num_tokens != 1:
            options["reg_tokens"] = _extra_tokens(name, num_tokens)
        backbone = _transformer(name, options)  # first, so that an unknown name is called unknown
        _refuse(name, stem=stem != "imagenet" and stem, zero_init_residual=zero_init_residual)
    if freeze_patch_embed:
        _freeze_patch_embed(backbone, name)
    if use_checkpoint:
        _checkpoint_activations(backbone, name)
    return cast(Backbone, backbone)


def feature_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the last feature map (N, F, h, w) of any backbone; class tokens are dropped."""
    return _as_map(backbone, backbone.forward_features(images))


def summaries_and_map(backbone: Backbone, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what sums an image up, (N, F) each, and the last feature map (N, F, h, w), in one pass.

    A ViT's class tokens are the summaries, in their order; elsewhere it is the pooled feature.
    """
    features = backbone.forward_features(images)
    if features.ndim == 3:
        summaries = features[:, : getattr(backbone, "num_prefix_tokens", 1)].unbind(1)
    else:
        summaries = (cast(Any, backbone).forward_head(features),)
    return summaries, _as_map(backbone, features)


@torch.no_grad()
def map_geometry(backbone: Backbone) -> tuple[int, int]:
    """Return how many pixels a cell of the last feature map spans and the map's width, measured on zeros."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or (128, 128)
    training, device = backbone.training, next(backbone.parameters()).device
    features = feature_map(backbone.eval(), torch.zeros(1, 3, *size, device=device))
    backbone.train(training)
    return size[-1] // features.shape[-1], features.shape[1]


def _as_map(backbone: Backbone, features: Tensor) -> Tensor:
    if features.ndim == 3:  # (N, prefix + h*w, F), a plain ViT
        tokens = features[:, getattr(backbone, "num_prefix_tokens", 1) :]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(f"feature_map: {tokens.shape[1]} tokens are no square grid; use square images")
        return tokens.transpose(1, 2).unflatten(2, (side, side))
    channels_last = features.shape[-1] == backbone.num_features != features.shape[1]
    return features.permute(0, 3, 1, 2) if channels_last else features


def _refuse(name: str, **options: object) -> None:
    for option, value in options.items():
        if value:
            raise ValueError(
                f"MODEL.BACKBONE.{option.upper()}: {value!r} does not apply to {name}; remove it"
            )


def _extra_tokens(name: str, num_tokens: int) -> int:
    if not name.startswith(("deit_", "vit_", "timm/")):
        raise ValueError(
            f"MODEL.BACKBONE.NUM_TOKENS: {num_tokens} does not apply to {name}, which has no class token; "
            "remove it"
        )
    if num_tokens < 1:
        raise ValueError(f"MODEL.BACKBONE.NUM_TOKENS: {num_tokens} must be 1 or more")
    return num_tokens - 1


def _checkpoint_activations(backbone: nn.Module, name: str) -> None:
    recomputed = getattr(backbone, "blocks", backbone)  # of a ViT the blocks, not a stem before them
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in recomputed.modules()):
        raise ValueError(
            f"--use-checkpoint: {name} has batch norm, whose statistics recomputing would count twice; "
            "remove the flag"
        )
    if not hasattr(backbone, "set_grad_checkpointing"):
        raise ValueError(f"--use-checkpoint: {name} has no activation checkpointing in timm; remove the flag")
    cast(Any, backbone).set_grad_checkpointing()


def _resnet(name: str, stem: str, drop_path: float, zero_init_residual: bool) -> nn.Module:
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    layers: dict[str, tuple[Any, tuple[int, ...]]] = {
        "resnet8": (BasicBlock, (1, 1, 1, 0)),
        "resnet18": (BasicBlock, (2, 2, 2, 2)),
        "resnet34": (BasicBlock, (3, 4, 6, 3)),
        "resnet50": (Bottleneck, (3, 4, 6, 3)),
        "resnet101": (Bottleneck, (3, 4, 23, 3)),
    }
    block, depths = layers[name]
    narrow: dict[str, Any] = {"channels": (32, 64, 128, 256)} if name == "resnet8" else {}
    backbone: Any = ResNet(
        block,
        tuple(max(depth, 1) for depth in depths),
        num_classes=0,
        drop_path_rate=drop_path,
        zero_init_last=zero_init_residual,
        **narrow,
    )
    if name == "resnet8":  # He et al. 2016, section 4.2, n = 1: three stages
        backbone.layer4 = nn.Sequential()
        backbone.num_features = backbone.head_hidden_size = 128
    if stem not in STEMS:
        raise ValueError(f"MODEL.BACKBONE.STEM: {stem!r} is not one of {', '.join(STEMS)}")
    if stem != "imagenet":  # small images: no 4x reduction before the first stage
        width = backbone.conv1.out_channels
        backbone.conv1 = nn.Conv2d(
            3, width, 3, stride=2 if stem == "cifar_stride2" else 1, padding=1, bias=False
        )
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone


def _transformer(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    if name in _MOCOV3_VITS:
        return _mocov3_vit(**_MOCOV3_VITS[name], **options)
    timm_name = _TIMM_NAMES.get(name, name.removeprefix("timm/"))
    if name not in _TIMM_NAMES and not (name.startswith("timm/") and timm.is_model(timm_name)):
        known = [*BACKBONES, *(f"timm/{model}" for model in timm.list_models())]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"MODEL.BACKBONE.NAME: {name!r} is unknown{hint} Known: {', '.join(BACKBONES)}, or timm/<name>"
        )
    if name in _TIMM_NAMES:
        return _with_extra_tokens(timm.create_model(timm_name, pretrained=False, num_classes=0, **options))
    return _any_timm_model(timm_name, options)


def _with_extra_tokens(vit: nn.Module) -> nn.Module:
    """Start all class tokens of a ViT that has several like SiT, at a standard deviation of 0.02."""
    if getattr(vit, "reg_token", None) is not None:
        nn.init.trunc_normal_(cast(Any, vit).cls_token, std=0.02)
        nn.init.trunc_normal_(cast(Any, vit).reg_token, std=0.02)
    return vit


def _any_timm_model(timm_name: str, options: dict[str, Any]) -> nn.Module:
    """Build any timm model with the options it knows; its width is measured, since some report another."""
    import timm

    size = options["img_size"]
    wanted = {key: value for key, value in options.items() if value and key != "img_size"}
    try:
        backbone: Any = timm.create_model(timm_name, pretrained=False, num_classes=0, **options)
    except TypeError:  # a convolutional network takes any size and knows no img_size
        try:
            backbone = timm.create_model(timm_name, pretrained=False, num_classes=0, **wanted)
        except TypeError as error:
            raise ValueError(
                f"MODEL.BACKBONE: timm/{timm_name} does not take {', '.join(wanted)} ({error}); set them to 0"
            ) from error
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, 3, size, size))
    if features.ndim != 2:
        raise ValueError(f"MODEL.BACKBONE.NAME: timm/{timm_name} gives {tuple(features.shape)}, no vector")
    backbone.num_features = features.shape[1]
    return backbone.train()


def _freeze_patch_embed(backbone: nn.Module, name: str) -> None:
    """Freeze the patch projection (MoCo v3, section 4.3: random patch projection stabilises training)."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if projection is None:
        raise ValueError(f"MODEL.BACKBONE.FREEZE_PATCH_EMBED: {name} has no patch embedding; set it to False")
    projection.requires_grad_(False)


def _mocov3_vit(patch_size: int = 16, conv_stem: bool = False, **options: Any) -> nn.Module:
    """Build the ViT of MoCo v3: fixed 2-D sin-cos positions, Xavier initialisation (spec 1.4)."""
    from timm.models.vision_transformer import VisionTransformer

    if conv_stem:
        if patch_size != 16:
            raise ValueError(f"MODEL.BACKBONE.PATCH_SIZE: {patch_size}: a convolutional stem spans 16 pixels")
        options["embed_layer"] = ConvStem
    norm_layer = functools.partial(nn.LayerNorm, eps=1e-6)
    vit: Any = VisionTransformer(
        patch_size=patch_size, num_classes=0, num_heads=12, qkv_bias=True, norm_layer=norm_layer, **options
    )
    for path, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            if path.endswith("qkv"):  # each of q, k, v as a matrix of its own
                bound = math.sqrt(6.0 / (module.out_features // 3 + module.in_features))
                nn.init.uniform_(module.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    if not conv_stem:
        bound = math.sqrt(6.0 / (3 * patch_size**2 + vit.embed_dim))
        nn.init.uniform_(vit.patch_embed.proj.weight, -bound, bound)
        nn.init.zeros_(vit.patch_embed.proj.bias)
    nn.init.normal_(vit.cls_token, std=1e-6)
    rows, cols = vit.patch_embed.grid_size
    table = sincos_positions(rows, cols, vit.embed_dim, vit.num_prefix_tokens)
    vit.pos_embed = nn.Parameter(table, requires_grad=False)
    return _with_extra_tokens(vit)


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 and a 1x1, for 16-pixel patches (Xiao et al. 2021, section 4)."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **_: Any
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"DATA.IMG_SIZE: {img_size} is not a multiple of the stem's {patch_size} pixels")
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

    def forward(self, images: Tensor) -> Tensor:
        """Return patches (N, h*w, F) of images (N, 3, H, W)."""
        return self.stem(images).flatten(2).transpose(1, 2)


def sincos_positions(rows: int, cols: int, width: int, num_tokens: int = 1) -> Tensor:
    """Return fixed 2-D positions (1, num_tokens + rows*cols, width), the class tokens' rows zero.

    Token (r, c) gets [sin(r w), cos(r w), sin(c w), cos(c w)] with w_i = 10000^(-i / (width/4)): the row
    first (spec 1.4, verified against the published weights).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in (row, col)]
    table = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(num_tokens, width, dtype=table.dtype), table])[None].float()
