"""Swin on images of any size, as the published detectors and segmenters use it.

timm's block shifts a map and then pads it to whole windows. The published one (the Swin forks of
mmdetection and mmsegmentation, and Hugging Face's) pads first and shifts the padded map. Both are
one network where a map's sides are multiples of the window. Elsewhere timm's last rows and columns
attend to the first ones.
"""

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn


def dense_swin(body: SwinTransformer) -> SwinTransformer:
    """Make a timm Swin take any image size, in place; its state dict and windows stay.

    Odd blocks always shift, also where one window holds the whole map.
    """
    patches = cast(PatchEmbed, body.patch_embed)
    patches.strict_img_size = False
    # sides become multiples of the patch; timm means TorchScript by "final"
    patches.dynamic_img_pad = True  # type: ignore[misc]
    for stage in body.layers:
        for block in cast(nn.Sequential, stage.blocks):
            # the class only: a wrapper would change the names of the tensors
            block.__class__ = _DenseBlock
            dense = cast(_DenseBlock, block)
            if any(dense.target_shift_size):
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
