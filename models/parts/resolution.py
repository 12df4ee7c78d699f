"""Use a backbone at other image sizes than the one it was built for."""

import copy
from typing import Protocol, TypeVar, cast

from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn

from models.parts.backbones import Backbone, feature_map
from models.parts.dense_swin import dense_swin, is_dense_swin

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


def _twin(module: M) -> M:
    """Return a copy without gradients that shares the tensors, so that many sizes cost nothing."""
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
