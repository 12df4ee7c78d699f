"""Masks of detections: pasted into the image on the device, encoded for COCO by workers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Detection = dict[str, Any]  # index, label, score, box [x1, y1, x2, y2]; rle for Mask R-CNN

_NUMBERS = 1 << 25  # values that one pasting may make: 128 MiB


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
    """Yield bool (m,W,H) of masks (n,1,S,S) in images of (height, width) `size`, some at a time.

    A pixel belongs to the mask where the probability at its centre is at least 0.5, interpolated
    between the centres of the box's cells and falling to 0 outside (Detectron2, mmdetection). The
    columns come first because COCO's encoding counts down the columns.
    """
    cells = masks.shape[-1]
    share = max(1, _NUMBERS // (size[0] * size[1]))
    for own, box in zip(masks[:, 0].split(share), boxes.split(share), strict=True):
        columns = _weights(box[:, 0], box[:, 2], size[1], cells)
        rows = _weights(box[:, 1], box[:, 3], size[0], cells)
        # Bilinear interpolation is a product of one along x and one along y, so two matrix
        # products do it for all masks, without a loop over boxes that waits for their sizes.
        # Half precision, which autocast would take for the products, moves borders by a pixel.
        with torch.autocast(masks.device.type, enabled=False):
            pasted = columns @ own.transpose(1, 2) @ rows.transpose(1, 2) >= 0.5
        yield pasted


def _weights(first: Tensor, last: Tensor, pixels: int, cells: int) -> Tensor:
    """Return (n,pixels,cells), how much each cell of a box's side counts at each pixel's centre."""
    centres = torch.arange(pixels, device=first.device) + 0.5
    side = (last - first).clamp_min(1e-6)[:, None]
    places = (centres - first[:, None]) / side * cells - 0.5
    distance = places[:, :, None] - torch.arange(cells, device=first.device)
    return (1 - distance.abs()).clamp_min(0)


@dataclass(frozen=True)
class ImageResult:
    """The detections of an image; for Mask R-CNN their masks (n,W,H) as bits, H of a column."""

    rows: list[Detection]
    bits: np.ndarray | None = None
    height: int = 0

    @staticmethod
    def pack(
        rows: list[Detection], masks: Tensor, boxes: Tensor, size: tuple[int, int]
    ) -> "ImageResult":
        """Paste the masks of an image; packed, they reach a worker eight times as fast."""
        parts = [np.packbits(part.cpu().numpy(), axis=2) for part in paste(masks, boxes, size)]
        return ImageResult(rows, np.concatenate(parts), size[0])


class MaskEncoder(Dataset[list[Detection]]):
    """Give detections their `rle`; `encode` is that of COCO's mask API, (H,W,n) to n entries."""

    def __init__(self, encode: Callable[[np.ndarray], list[dict[str, Any]]]) -> None:
        self.encode = encode

    def __getitem__(self, found: ImageResult) -> list[Detection]:
        """Encode the masks of an image."""
        if not found.rows or found.bits is None:
            return found.rows
        masks = np.unpackbits(found.bits, axis=2, count=found.height)
        encoded = self.encode(masks.transpose(2, 1, 0))  # in the order of columns without a copy
        rows = []
        for row, rle in zip(found.rows, encoded, strict=True):
            counts = rle["counts"]
            text = counts.decode("ascii") if isinstance(counts, bytes) else counts
            rows.append({**row, "rle": {"size": list(map(int, rle["size"])), "counts": text}})
        return rows
