"""Build backbones of timm: `module(images)` returns features (N, num_features).

`module.num_features` is their width, and `module.forward_features(images)` returns the last feature
map or token sequence. The module is timm's own, so its state dict loads into timm as it is.
"""

import difflib
import functools
import logging
import math
from typing import Any, NamedTuple, TypeAlias, cast

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from models.parts.mocov3_vit import MOCOV3_VITS, mocov3_vit
from models.parts.norm import set_norm_eps

logger = logging.getLogger("synco")

Options: TypeAlias = dict[str, Any]  # of `timm.create_model`


class _ResNetShape(NamedTuple):
    block: type[BasicBlock | Bottleneck]
    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)


_RESNETS = {
    # He et al. 2016, section 4.2, n = 1: three stages; `_resnet` takes the fourth away
    "resnet8": _ResNetShape(BasicBlock, (1, 1, 1, 1), (32, 64, 128, 256)),
    "resnet18": _ResNetShape(BasicBlock, (2, 2, 2, 2)),
    "resnet34": _ResNetShape(BasicBlock, (3, 4, 6, 3)),
    "resnet50": _ResNetShape(Bottleneck, (3, 4, 6, 3)),
    "resnet101": _ResNetShape(Bottleneck, (3, 4, 23, 3)),
}
TIMM_NAMES = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
}
BACKBONES = (*_RESNETS, *TIMM_NAMES, *MOCOV3_VITS)
STEMS = ("imagenet", "cifar", "cifar_stride2")


class Backbone(nn.Module):
    """The type of what `build_backbone` returns: a timm module without a classifier."""

    num_features: int
    head_hidden_size: int

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map or token sequence of images (N, 3, H, W)."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """Return the pooled features (N, F) of a map."""
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
    norm_eps: float = 0.0,
    use_checkpoint: bool = False,
    output_stride: int = 32,
    channels: int = 3,
) -> Backbone:
    """Build the backbone `name` (one of `BACKBONES` or `timm/<name>`) without a classifier.

    `stem` is for ResNets, `patch_size` (0: the model's own) and `freeze_patch_embed` are for
    transformers. `num_tokens` is for plain ViTs: 2 adds SiT's rotation token (timm's `reg_token`)
    to the class token. `norm_eps` (0: the model's own) is the eps of all layer norms but those
    before the MLPs. `output_stride` 8 or 16 dilates the last stages of a ResNet in place of
    shrinking their maps; the tensors stay the same. Raises `ValueError` naming the key for an
    unknown name, an option that the backbone does not have, and images smaller than a patch.
    """
    if name in _RESNETS:
        _refuse(name, patch_size=patch_size, freeze_patch_embed=freeze_patch_embed)
        _refuse(name, num_tokens=num_tokens != 1 and num_tokens)
        backbone = _resnet(name, stem, drop_path, zero_init_residual, output_stride, channels)
    else:
        options: Options = {"img_size": img_size, "drop_path_rate": drop_path}
        options |= {"in_chans": channels} if channels != 3 else {}
        if patch_size:
            options["patch_size"] = patch_size
        if num_tokens != 1:
            # timm counts them apart from the class token
            options["reg_tokens"] = _extra_tokens(name, num_tokens)
        # Before the other checks, so that an unknown name is reported as unknown.
        backbone = _transformer(name, options)
        _refuse(name, stem=stem != "imagenet" and stem, zero_init_residual=zero_init_residual)
        if output_stride != 32:
            raise ValueError(f"OUTPUT_STRIDE: {output_stride} is for ResNets, not {name}; set 32")
    if freeze_patch_embed:
        _freeze_patch_embed(backbone, name)
    if norm_eps:
        set_norm_eps(backbone, name, norm_eps)
    if use_checkpoint:
        _checkpoint_activations(backbone, name)
    return cast(Backbone, backbone)


def feature_map(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the last feature map (N, F, h, w) of any backbone, without class tokens."""
    return _as_map(backbone, backbone.forward_features(images))


def summaries_and_map(backbone: Backbone, images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return summaries of the images, (N, F) each, and the last feature map (N, F, h, w).

    The summaries of a ViT are its class tokens, in their order. Other backbones have one: the
    pooled feature.
    """
    features = backbone.forward_features(images)
    if features.ndim == 3:
        summaries = features[:, : getattr(backbone, "num_prefix_tokens", 1)].unbind(1)
    else:
        summaries = (backbone.forward_head(features),)
    return summaries, _as_map(backbone, features)


@torch.no_grad()
def map_geometry(backbone: Backbone) -> tuple[int, int]:
    """Return the stride of the last feature map in pixels, and its number of channels."""
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or (128, 128)
    training, device = backbone.training, next(backbone.parameters()).device
    # eval: the zeros must not enter the statistics of batch norms
    features = feature_map(backbone.eval(), torch.zeros(1, 3, *size, device=device))
    backbone.train(training)
    return size[-1] // features.shape[-1], features.shape[1]


def _as_map(backbone: Backbone, features: Tensor) -> Tensor:
    if features.ndim == 3:  # (N, prefix + h*w, F), a plain ViT
        tokens = features[:, getattr(backbone, "num_prefix_tokens", 1) :]
        side = math.isqrt(tokens.shape[1])
        if side * side != tokens.shape[1]:
            raise ValueError(
                f"feature_map: {tokens.shape[1]} tokens are no square grid; use square images"
            )
        return tokens.transpose(1, 2).unflatten(2, (side, side))
    # timm's Swin returns (N, h, w, F), its ResNets (N, F, h, w)
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
            f"MODEL.BACKBONE.NUM_TOKENS: {num_tokens} does not apply to {name}, which has no class "
            "token; remove it"
        )
    if num_tokens < 1:
        raise ValueError(f"MODEL.BACKBONE.NUM_TOKENS: {num_tokens} must be 1 or more")
    return num_tokens - 1


def _checkpoint_activations(backbone: nn.Module, name: str) -> None:
    recomputed = getattr(backbone, "blocks", backbone)  # of a ViT only its blocks, not the stem
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in recomputed.modules()):
        raise ValueError(
            f"--use-checkpoint: {name} has batch norm, whose statistics recomputing would count "
            "twice; remove the flag"
        )
    if not hasattr(backbone, "set_grad_checkpointing"):
        raise ValueError(
            f"--use-checkpoint: {name} has no activation checkpointing in timm; remove the flag"
        )
    cast(ResNet, backbone).set_grad_checkpointing()  # any timm model has it so


def _resnet(
    name: str, stem: str, drop_path: float, zero_init: bool, output_stride: int, channels: int
) -> nn.Module:
    shape = _RESNETS[name]
    resnet = ResNet(
        shape.block,  # type: ignore[arg-type]  # timm means the class
        shape.depths,
        num_classes=0,
        channels=shape.widths,
        drop_path_rate=drop_path,
        zero_init_last=zero_init,
        in_chans=channels,
        output_stride=output_stride,
    )
    backbone = cast(Backbone, resnet)
    if name == "resnet8":
        backbone.layer4 = nn.Sequential()
        backbone.num_features = backbone.head_hidden_size = 128
    if stem not in STEMS:
        raise ValueError(f"MODEL.BACKBONE.STEM: {stem!r} is not one of {', '.join(STEMS)}")
    if stem != "imagenet":  # small images: no 4x reduction before the first stage
        width = cast(nn.Conv2d, backbone.conv1).out_channels
        stride = 2 if stem == "cifar_stride2" else 1
        conv = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        # as timm starts the convolutions that stay
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        backbone.conv1 = conv
        backbone.maxpool = nn.Identity()
    return backbone


def _transformer(name: str, options: Options) -> nn.Module:
    if name in MOCOV3_VITS:
        _check_patches(options["img_size"], options.get("patch_size", 16), stem="conv" in name)
        vit = mocov3_vit(name, **options)
        return _with_deit_tokens(vit) if "reg_tokens" in options else vit
    timm_name = TIMM_NAMES.get(name, name.removeprefix("timm/"))
    if name not in TIMM_NAMES and not (name.startswith("timm/") and timm.is_model(timm_name)):
        known = [*BACKBONES, *(f"timm/{model}" for model in timm.list_models())]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(
            f"MODEL.BACKBONE.NAME: {name!r} is unknown{hint} Known: {', '.join(BACKBONES)}, or "
            "timm/<name>"
        )
    if name in TIMM_NAMES:
        _check_patches(options["img_size"], options.get("patch_size", 4 if "swin" in name else 16))
        return _with_deit_tokens(
            timm.create_model(timm_name, pretrained=False, num_classes=0, **options)
        )
    return _any_timm_model(timm_name, options)


def _with_deit_tokens(backbone: nn.Module) -> nn.Module:
    """Start the class tokens with std 0.02, as DeiT's and SiT's codes do; timm has 1e-6."""
    for name in ("cls_token", "reg_token"):
        if getattr(backbone, name, None) is not None:
            nn.init.trunc_normal_(getattr(backbone, name), std=0.02)
    return backbone


def _any_timm_model(timm_name: str, options: Options) -> nn.Module:
    """Build any timm model."""
    size, channels = options["img_size"], options.get("in_chans", 3)
    wanted = {key: value for key, value in options.items() if value and key != "img_size"}
    try:
        built = timm.create_model(timm_name, pretrained=False, num_classes=0, **options)
    except TypeError:  # a convolutional network takes any size and knows no img_size
        try:
            built = timm.create_model(timm_name, pretrained=False, num_classes=0, **wanted)
        except TypeError as error:
            raise ValueError(
                f"MODEL.BACKBONE: timm/{timm_name} does not take {', '.join(wanted)} ({error}); "
                "set them to 0"
            ) from error
    except (RuntimeError, AssertionError, ArithmeticError, ValueError) as error:
        raise _unfit_size(timm_name, size, error) from error
    backbone = cast(Backbone, built)
    # Measured: some models report another width. In eval mode, so that no statistics change.
    backbone.num_features = _width_at(backbone.eval(), timm_name, size, channels)
    return backbone.train()


@torch.enable_grad()
def _width_at(backbone: nn.Module, timm_name: str, size: int, channels: int) -> int:
    """Return the width of a timm model's features. Warn of pixels that do not influence them."""
    # Noise without a generator, whose state would change the run.
    pixels = torch.arange(channels * size * size, dtype=torch.float32).mul(12.9898).sin()
    images = pixels.view(1, channels, size, size).requires_grad_()
    # Norms and scales that start at 0 shut a residual branch, and through the shortcuts alone
    # a network sees few pixels. They count as they will when they have learned.
    shut = [
        parameter
        for name, parameter in backbone.named_parameters()
        if parameter.ndim <= 1 and not name.endswith("bias") and not parameter.any()
    ]
    for parameter in shut:
        parameter.data.fill_(1.0)
    try:
        features = backbone(images)
    except (RuntimeError, AssertionError, ArithmeticError, ValueError) as error:
        raise _unfit_size(timm_name, size, error) from error
    if features.ndim != 2:
        raise ValueError(
            f"MODEL.BACKBONE.NAME: timm/{timm_name} gives {tuple(features.shape)}, no vector"
        )
    width = int(features.shape[1])
    # unequal weights: the plain sum of layer-normed features is constant and has no gradient
    (gradient,) = torch.autograd.grad((features * torch.linspace(1.0, 2.0, width)).sum(), images)
    for parameter in shut:
        parameter.data.zero_()
    seen = gradient.abs().amax((0, 1, 3)).nonzero()
    stages = getattr(backbone, "feature_info", None) or [{"reduction": 32}]
    if len(seen) and int(seen.max()) < size - 1:
        _warn_of_cut(size, size - 1 - int(seen.max()), int(stages[-1]["reduction"]))
    return width


def _unfit_size(timm_name: str, size: int, error: Exception) -> ValueError:
    published = timm.models.get_pretrained_cfg(timm_name)
    own = published.input_size[-1] if published else 224
    return ValueError(
        f"DATA.IMG_SIZE: timm/{timm_name} cannot take images of {size} pixels ({error}); "
        f"use its published size, {own}, or a multiple of 32"
    )


def _check_patches(img_size: int, patch: int, stem: bool = False) -> None:
    if img_size < patch:
        raise ValueError(
            f"DATA.IMG_SIZE: {img_size} is smaller than a patch of the backbone, {patch} pixels; "
            f"use {patch} or more, or a smaller MODEL.BACKBONE.PATCH_SIZE"
        )
    # its convolutions would give one patch more than there are positions
    if img_size % patch and stem:
        raise ValueError(
            f"DATA.IMG_SIZE: {img_size} is not a multiple of the stem's {patch} pixels; "
            f"use {_nearest(img_size, patch)}"
        )
    if img_size % patch:
        _warn_of_cut(img_size, img_size % patch, patch)


@functools.cache  # once, not again for the target network
def _warn_of_cut(img_size: int, num_cut: int, multiple: int) -> None:
    logger.warning(
        "DATA.IMG_SIZE: %d is not a multiple of %d: the backbone never sees the last %d rows and "
        "columns of an image; use %s",
        *(img_size, multiple, num_cut, _nearest(img_size, multiple)),
    )


def _nearest(img_size: int, multiple: int) -> str:
    below = img_size // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def _freeze_patch_embed(backbone: nn.Module, name: str) -> None:
    """Freeze the patch projection, for stable training (arXiv:2104.02057, section 4)."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if projection is None:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_PATCH_EMBED: {name} has no patch embedding; set it to False"
        )
    projection.requires_grad_(False)
