"""Swin at sizes whose maps are no multiple of the window: a slow oracle, and transformers."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor

from models.parts.backbones import build_backbone
from models.parts.resolution import at_size, dense_swin, is_dense_swin
from models.weights.export import to_huggingface

SHIFT = 3  # of windows of 7


def small_swin(img_size: int = 224) -> SwinTransformer:
    """Return a narrow Swin whose attention is far from uniform."""
    torch.manual_seed(0)
    swin = SwinTransformer(
        img_size=img_size, embed_dim=8, depths=(2, 2, 2, 2), num_heads=(1, 2, 2, 4), num_classes=0
    )
    for name, parameter in swin.named_parameters():
        if "bias_table" in name:
            torch.nn.init.normal_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter, gain=1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # padded cells have it as their key
    return swin.eval()


def slow_block(block: SwinTransformerBlock, x: Tensor, shift: int) -> Tensor:
    """Return a block's output (H, W, C), one query at a time."""
    height, width, channels = x.shape
    rows, cols = -(-height // 7) * 7, -(-width // 7) * 7
    padded = torch.zeros(rows, cols, channels, dtype=x.dtype)
    padded[:height, :width] = block.norm1(x)
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(padded).view(rows, cols, 3, heads, -1).unbind(2)

    def place(row: int, col: int) -> tuple[tuple[int, ...], int, int]:
        """Return what cells that see each other share, and the place in the window."""
        moved_row, moved_col = (row - shift) % rows, (col - shift) % cols
        group = (moved_row // 7, moved_col // 7, int(row < shift), int(col < shift))
        return group, moved_row % 7, moved_col % 7

    places = {(row, col): place(row, col) for row in range(rows) for col in range(cols)}
    out = torch.zeros(height, width, channels, dtype=x.dtype)
    for row in range(height):
        for col in range(width):
            group, own_row, own_col = places[row, col]
            seen = [cell for cell in places if places[cell][0] == group]
            for head in range(heads):
                scores = torch.stack(
                    [
                        (q[row, col, head] @ k[r, c, head]) / math.sqrt(channels / heads)
                        + block.attn.relative_position_bias_table[
                            (own_row - places[r, c][1] + 6) * 13 + own_col - places[r, c][2] + 6,
                            head,
                        ]
                        for r, c in seen
                    ]
                ).softmax(0)
                values = torch.stack([v[r, c, head] for r, c in seen])
                part = slice(head * channels // heads, (head + 1) * channels // heads)
                out[row, col, part] = scores @ values
    x = x + block.attn.proj(out)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("size", [(9, 11), (10, 7), (5, 7)])
@pytest.mark.parametrize("odd", [0, 1])
@torch.no_grad()
def test_a_block_is_the_slow_oracles(size: tuple[int, int], odd: int) -> None:
    block = dense_swin(small_swin()).layers[1].blocks[odd].double()
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    expected = torch.stack([slow_block(block, image, SHIFT * odd) for image in x])
    torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_transformers_gives_the_same_map_at_256(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    swin = small_swin(img_size=256)
    state, config = to_huggingface(swin, 256)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 256, 256)
    found = dense_swin(swin).forward_features(images).flatten(1, 2)
    torch.testing.assert_close(
        found, theirs(images).last_hidden_state, rtol=1e-5, atol=1e-5 * float(found.abs().max())
    )


@torch.no_grad()
def test_whole_windows_are_the_pretrained_network_and_the_tensors_stay() -> None:
    swin = small_swin(img_size=448)  # maps of 112, 56, 28, 14
    dense = dense_swin(copy.deepcopy(swin))
    images = torch.randn(2, 3, 448, 448)
    torch.testing.assert_close(dense.forward_features(images), swin.forward_features(images))
    assert {k: v.shape for k, v in dense.state_dict().items()} == {
        k: v.shape for k, v in swin.state_dict().items()
    }


@torch.no_grad()
def test_any_size_goes_in_and_padding_is_to_the_patch() -> None:
    dense = dense_swin(small_swin())
    image = torch.randn(1, 3, 61, 83)
    padded = torch.zeros(1, 3, 64, 84)
    padded[:, :, :61, :83] = image
    found = dense.forward_features(image)
    assert found.shape == (1, 2, 3, 64)
    assert torch.equal(found, dense.forward_features(padded))


def test_a_mask_that_an_evaluation_made_serves_a_training_step() -> None:
    dense = dense_swin(small_swin())
    images = torch.randn(1, 3, 72, 72)
    with torch.inference_mode():
        dense(images)
    dense(images).sum().backward()
    assert all(parameter.grad is not None for parameter in dense.parameters())


@torch.no_grad()
def test_frozen_features_at_another_size_are_those_of_the_dense_network() -> None:
    swin = build_backbone("swin_tiny").eval()
    images = torch.randn(1, 3, 96, 160)
    resized = at_size(swin, (96, 160))
    assert at_size(swin, (224, 224)) is swin
    assert at_size(resized, (64, 64)) is resized
    assert not is_dense_swin(swin)
    expected = dense_swin(copy.deepcopy(swin)).forward_features(images)
    assert torch.equal(resized.forward_features(images), expected)
