"""Use a backbone at other image sizes than the one it was built for."""

import copy
import logging
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.parts.backbones import Backbone, feature_map

logger = logging.getLogger("synco")

M = TypeVar("M", bound=nn.Module)


class _Resizable(Protocol):
    def set_input_size(self, **options: object) -> None: ...


def at_size(backbone: Backbone, size: tuple[int, int]) -> Backbone:
    """Return the backbone for images of `size` (H, W): itself if it takes any size, else a copy.

    The copy has no gradients and shares the tensors. A ViT's has interpolated positions, a Swin's
    takes any size (see `dense_swin`). Raises ValueError for a transformer of a fixed size.
    """
    patches = getattr(backbone, "patch_embed", None)
    built_for = getattr(patches, "img_size", None)
    if built_for is None or tuple(built_for) == tuple(size) or is_dense_swin(backbone):
        return backbone
    if isinstance(backbone, SwinTransformer):
        return cast(Backbone, dense_swin(_twin(backbone)))
    if not (hasattr(backbone, "set_input_size") and hasattr(patches, "set_input_size")):
        raise ValueError(
            f"{type(backbone).__name__} works only on images of {built_for}, not of {size}"
        )
    resized = _twin(backbone)
    cast(_Resizable, resized).set_input_size(img_size=tuple(size), **_window_options(backbone))
    return resized


def take_sizes(backbone: Backbone, sizes: Mapping[str, int], channels: int = 3) -> None:
    """Let a backbone train on images of several sizes, named by their keys, in place.

    Its state dict stays. A ViT interpolates its positions in each forward, so that they learn from
    all sizes. A Swin pads maps to whole windows. What a backbone gives for the size that it was
    built for changes only where a Swin's maps are not whole windows. Raises ValueError for one that
    cannot.
    """
    if isinstance(backbone, SwinTransformer):
        _warn_of_cut_windows(backbone)
        dense_swin(backbone, always_shift=False)
    elif isinstance(backbone, (VisionTransformer, Eva)):
        backbone.dynamic_img_size = True  # type: ignore[misc]  # timm means TorchScript by "final"
        patches = cast(PatchEmbed, backbone.patch_embed)
        # timm reads the grid of the patches off a map
        patches.flatten, patches.output_fmt = False, Format.NHWC
        patches.strict_img_size = False
    for key, size in sizes.items():
        _try(backbone, key, (channels, size, size))


def evaluate_as_trained(backbone: Backbone) -> None:
    """Let a backbone compute for its own size what one does that `take_sizes` has trained."""
    if isinstance(backbone, SwinTransformer):
        dense_swin(backbone, always_shift=False)


def _warn_of_cut_windows(swin: SwinTransformer) -> None:
    """Say where weights trained by `take_sizes` are another network in timm's own Swin."""
    for stage in swin.layers:
        for block in cast("Iterable[SwinTransformerBlock]", stage.blocks):
            height, width = cast("tuple[int, int]", block.input_resolution)
            rows, cols = cast("tuple[int, int]", block.window_size)
            if any(block.shift_size) and (height % rows or width % cols):
                _say_cut(height, width, rows, cols)
                return


@cache  # once for the online and the target network
def _say_cut(*sides: int) -> None:
    logger.warning(
        "DATA.IMG_SIZE: a map of %d x %d is not made of whole windows of %d x %d. In timm these "
        "weights will give slightly other features than here; images of 224 have whole windows",
        *sides,
    )


@torch.no_grad()
def _try(backbone: Backbone, key: str, shape: tuple[int, int, int]) -> None:
    training = backbone.training
    images = next(backbone.parameters()).new_zeros(1, *shape)
    try:
        # eval: the zeros must not enter the statistics of batch norms
        found = tuple(backbone.eval()(images).shape)
    except (RuntimeError, AssertionError, ArithmeticError, ValueError) as error:
        raise ValueError(
            f"{key}: with views of several sizes {type(backbone).__name__} cannot take images of "
            f"{shape[1]} pixels ({str(error).rstrip('.')}); use another size or backbone"
        ) from error
    finally:
        backbone.train(training)
    assert found == (1, backbone.num_features)


def _twin(module: M) -> M:
    """Return a copy without gradients that shares the tensors."""
    # shared, since a copy is kept for each image size
    shared = [(id(p), nn.Parameter(p.detach(), requires_grad=False)) for p in module.parameters()]
    # deepcopy takes what the dictionary holds for a copy; a new size replaces tables, never fills
    return copy.deepcopy(module, dict(shared))


def _window_options(body: nn.Module) -> dict[str, object]:
    """Return the windows of a Swin V2, which timm would change with the size."""
    stages = [stage for stage in getattr(body, "layers", []) if hasattr(stage, "blocks")]
    windows = [
        tuple(stage.blocks[0].window_size)
        for stage in stages
        if hasattr(stage.blocks[0], "window_size")
    ]
    if not windows:
        return {}
    return {"window_size": windows[0] if len(set(windows)) == 1 else windows}


def size_multiple(backbone: Backbone) -> int:
    """Return what image sides must be a multiple of: a ViT's patch, 32 for Swin, else 1."""
    patches = getattr(backbone, "patch_embed", None)
    if patches is None:
        return 1
    # each stage of Swin after the first halves its map
    return int(patches.patch_size[0]) * 2 ** max(len(getattr(backbone, "layers", [])) - 1, 0)


def dense_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the last feature map (N, F, h, w) of images of the backbone's size, square or not."""
    grid = getattr(getattr(backbone, "patch_embed", None), "grid_size", None)
    prefix = getattr(backbone, "num_prefix_tokens", None)
    if grid is None or prefix is None:  # no plain ViT
        return feature_map(backbone, images)
    return backbone.forward_features(images)[:, prefix:].transpose(1, 2).unflatten(2, tuple(grid))


def dense_swin(body: SwinTransformer, always_shift: bool = True) -> SwinTransformer:
    """Make a timm Swin take any image size, in place; its state dict and windows stay.

    The result is what the published detectors and segmenters use (the Swin forks of mmdetection and
    mmsegmentation, and Hugging Face's). Odd blocks always shift, also where one window holds the
    whole map. Without `always_shift` they shift as they did at the size that `body` was built for.
    """
    # timm's block shifts a map and then pads it to whole windows; the published one pads first.
    # Both are one network where a map's sides are multiples of the window. Elsewhere timm's last
    # rows and columns attend to the first ones.
    patches = cast(PatchEmbed, body.patch_embed)
    patches.strict_img_size = False
    # sides become multiples of the patch; timm means TorchScript by "final"
    patches.dynamic_img_pad = True  # type: ignore[misc]
    for stage in body.layers:
        for block in cast(nn.Sequential, stage.blocks):
            # the class only: a wrapper would change the names of the tensors
            block.__class__ = _DenseBlock
            dense = cast(_DenseBlock, block)
            if always_shift and any(dense.target_shift_size):
                dense.shift_size = (dense.window_size[0] // 2, dense.window_size[1] // 2)
            dense.register_buffer("attn_mask", None, persistent=False)  # was that of the built size
    return body


def is_dense_swin(body: nn.Module) -> bool:
    """Tell whether `dense_swin` made this backbone take any size."""
    return any(isinstance(part, _DenseBlock) for part in body.modules())


class _DenseBlock(SwinTransformerBlock):
    def _attn(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, cols = self.window_size
        # Zeros after norm1: a padded cell is seen, as the published block has it, with the bias of
        # the keys as its key.
        x = F.pad(x, (0, 0, 0, -width % cols, 0, -height % rows))
        padded = x.shape[1:3]
        mask = None
        if any(self.shift_size):
            x = x.roll((-self.shift_size[0], -self.shift_size[1]), (1, 2))
            mask = _shift_mask(padded, self.window_size, self.shift_size, x.device, x.dtype)
        x = x.unflatten(1, (-1, rows)).unflatten(3, (-1, cols))  # (N, down, rows, across, cols, C)
        down, across = x.shape[1], x.shape[3]
        x = self.attn(x.transpose(2, 3).reshape(-1, rows * cols, channels), mask=mask)
        x = x.view(batch, down, across, rows, cols, channels).transpose(2, 3)
        x = x.reshape(batch, *padded, channels)
        if any(self.shift_size):
            x = x.roll(self.shift_size, (1, 2))
        return x[:, :height, :width]


@lru_cache(maxsize=16)  # the four stages of a few image sizes
@torch.inference_mode(False)  # a tensor of inference mode could not take part in a training step
def _shift_mask(
    padded: torch.Size,
    window: tuple[int, int],
    shift: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Return (windows, cells, cells): 0 where two cells were neighbours before the shift, or -100.

    After the roll the last window of a row or column holds cells from both ends of the map.
    """
    labels = torch.zeros(padded, device=device)
    for axis, (side, cells, moved) in enumerate(zip(padded, window, shift, strict=True)):
        parts = torch.zeros(side, device=device)
        if moved:
            parts[-cells:-moved], parts[-moved:] = 1, 2
        labels += parts[:, None] * 3 if axis == 0 else parts
    windows = labels.unflatten(0, (-1, window[0])).unflatten(2, (-1, window[1]))
    windows = windows.transpose(1, 2).flatten(2).flatten(0, 1)
    apart = windows[:, :, None] != windows[:, None, :]
    return torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill_(apart, -100.0)
