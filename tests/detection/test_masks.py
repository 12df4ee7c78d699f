"""Masks pasted and encoded, images tested in batches: against loops, and against one at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_detection_data import CPU, config
from torch import Tensor, nn

from detection import masks as pasting
from detection.evaluation import coco_api, detections
from detection.loader import batches_of_test
from detection.masks import ImageResult, MaskEncoder, paste
from detection.sources.datasets import read_split

BOXES = torch.tensor(
    [[3.2, 4.7, 20.1, 15.3], [-4.0, -3.0, 9.5, 30.0], [0.0, 0.0, 31.0, 24.0], [5.0, 5.0, 5.4, 5.3]]
)


def pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (n,H,W)."""
    return torch.cat(list(paste(masks, boxes, size))).transpose(1, 2)


def test_pixels_are_interpolated_at_their_centres() -> None:
    torch.manual_seed(0)
    masks, (height, width) = torch.rand(4, 1, 28, 28), (24, 31)
    x = (torch.arange(width) + 0.5 - BOXES[:, :1]) / (BOXES[:, 2:3] - BOXES[:, :1]) * 2 - 1
    y = (torch.arange(height) + 0.5 - BOXES[:, 1:2]) / (BOXES[:, 3:] - BOXES[:, 1:2]) * 2 - 1
    grid = torch.stack(
        [x[:, None].expand(4, height, width), y[:, :, None].expand(4, height, width)], dim=3
    )
    values = F.grid_sample(masks, grid, align_corners=False)[:, 0]
    sure = (values - 0.5).abs() > 1e-4
    assert sure.float().mean() > 0.99
    assert torch.equal(pasted(masks, BOXES, (height, width)) & sure, (values >= 0.5) & sure)


def test_a_full_mask_covers_the_pixels_whose_centres_are_in_the_box() -> None:
    found = pasted(torch.ones(4, 1, 28, 28), BOXES, (24, 31))
    for mask, (x1, y1, x2, y2) in zip(found, BOXES.tolist(), strict=True):
        for row in range(24):
            for column in range(31):
                inside = x1 <= column + 0.5 <= x2 and y1 <= row + 0.5 <= y2
                corner = min(abs(column + 0.5 - x) for x in (x1, x2)) < 0.35 and (
                    min(abs(row + 0.5 - y) for y in (y1, y2)) < 0.35
                )  # in a corner both directions fall to a half
                assert corner or bool(mask[row, column]) == inside


def test_autocast_moves_no_border() -> None:
    masks = torch.rand(4, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        half = pasted(masks, BOXES, (24, 31))
    assert torch.equal(half, pasted(masks, BOXES, (24, 31)))


def test_many_masks_are_pasted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.rand(4, 1, 28, 28)
    whole = pasted(masks, BOXES, (24, 31))
    monkeypatch.setattr(pasting, "_NUMBERS", 2 * 24 * 31)
    assert [len(part) for part in paste(masks, BOXES, (24, 31))] == [2, 2]
    assert torch.equal(pasted(masks, BOXES, (24, 31)), whole)


def test_encoded_masks_are_the_pasted_ones() -> None:
    api = pytest.importorskip("faster_coco_eval").mask
    masks, size = torch.rand(4, 1, 28, 28), (21, 31)
    rows = [{"index": 0, "label": n, "score": 0.5, "box": []} for n in range(4)]
    found = MaskEncoder(api.encode)[ImageResult.pack(rows, masks, BOXES, size)]
    assert [row["label"] for row in found] == [0, 1, 2, 3]
    for row, mask in zip(found, pasted(masks, BOXES, size), strict=True):
        assert row["rle"]["size"] == list(size)
        assert isinstance(row["rle"]["counts"], str)
        assert np.array_equal(api.decode(row["rle"]), mask.numpy().astype(np.uint8))
    nothing = ImageResult.pack([], masks[:0], BOXES[:0], size)
    assert MaskEncoder(api.encode)[nothing] == []


class Seer(nn.Module):
    """Find two boxes that depend on the image alone, and remember how many images came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        self.sizes.append(len(images))
        results = []
        for image in images:
            generator = torch.Generator().manual_seed(int(image.sum()))
            corner = torch.rand(2, 2, generator=generator) * 30
            results.append(
                {
                    "boxes": torch.cat([corner, corner + 25], dim=1),
                    "labels": torch.tensor([1, 2]),
                    "scores": torch.tensor([0.9, 0.8]),
                    "masks": torch.rand(2, 1, 28, 28, generator=generator),
                }
            )
        return results


def evaluated(root: Path, batch: int, **changes: Any) -> tuple[list[dict[str, Any]], list[int]]:
    cfg = config(MODEL__RCNN__MASKS=True, TRAIN__BATCH_SIZE=batch, **changes)
    model = Seer()
    data = read_split("coco", str(root), "train2017", masks=True)
    found = sorted(detections(model, data, cfg, CPU), key=lambda item: item["index"])
    return found, model.sizes


def test_detections_are_the_same_in_batches_and_with_workers(coco_root: Path) -> None:
    pytest.importorskip("faster_coco_eval")
    alone, sizes = evaluated(coco_root, 1)
    assert sizes == [1] * 8
    together, sizes = evaluated(coco_root, 3)
    assert sizes == [3, 3, 2]  # all are padded to 96 x 96
    assert [item["index"] for item in alone] == sorted(2 * list(range(8)))
    assert together == alone
    workers, _ = evaluated(coco_root, 3, DATA__NUM_WORKERS=1)
    assert workers == alone
    assert coco_api()[2].decode(alone[0]["rle"]).shape == (96, 80)


def test_a_batch_is_padded_as_each_image_alone(coco_root: Path) -> None:
    cfg = config(TRAIN__BATCH_SIZE=3, DETECTION__TEST_SIZE=60)
    data = read_split("coco", str(coco_root), "train2017")
    batches = list(batches_of_test(data, cfg, CPU))
    assert sorted(index for batch in batches for index, _, _ in batch) == list(range(8))
    for batch in batches:
        assert len({tuple(-(-side // 32) for side in image.shape[1:]) for *_, image in batch}) == 1
        assert all(image.dtype == torch.float32 for *_, image in batch)
