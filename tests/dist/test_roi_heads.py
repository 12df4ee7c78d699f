"""Synchronised norms in RoI heads where one rank has no region: all go on, with the same statistics."""

import math

import torch
from forked import Pool
from torch import Tensor

from detection.rcnn.cascade import build_cascade_heads
from detection.defaults import load_detection_config
from models.parts.norm import convert_sync_batch_norm
from utils import distributed

KEYS = """MODEL.RCNN.CASCADE [0.5,0.6,0.7] MODEL.RCNN.BOX_HEAD 4conv1fc MODEL.RCNN.BOX_LOSS giou
    MODEL.RCNN.ALIGNED True MODEL.RCNN.MASKS True MODEL.RCNN.MASK_NORM True
    MODEL.RCNN.PYRAMID_WIDTH 8 MODEL.RCNN.HEAD_WIDTH 16 MODEL.RCNN.ROI_BATCH 16"""


def step() -> tuple[float, list[Tensor], list[Tensor]]:
    """Train one step; the second rank's image shows nothing, and nothing is proposed."""
    rcnn = load_detection_config([], KEYS.split(), {}).MODEL.RCNN
    heads = convert_sync_batch_norm(build_cascade_heads(rcnn, [4, 8, 16, 32], 3))
    count = 0 if distributed.rank() else 1
    target = {
        "boxes": torch.tensor([[10.0, 20.0, 40.0, 50.0]])[:count],
        "labels": torch.tensor([2])[:count],
        "masks": torch.ones(count, 64, 64, dtype=torch.uint8),
    }
    proposals = torch.tensor([[8.0, 20, 40, 52], [0, 0, 20, 20], [30, 5, 64, 40]])[: 3 * count]
    features = {str(i): torch.randn(1, 8, 16 >> i, 16 >> i) for i in range(4)}
    loss = sum(heads(features, [proposals], [(64, 64)], [target])[1].values())
    loss.backward()
    gradients = [p.grad.clone() for p in heads.parameters()]
    return float(loss.detach()), gradients, [b.clone() for b in heads.buffers()]


def test_a_rank_without_regions_does_not_stop_or_spoil_the_others(ranks: Pool) -> None:
    results = ranks.run(step)
    for loss, gradients, statistics in results:
        assert math.isfinite(loss)
        assert all(torch.isfinite(tensor).all() for tensor in gradients + statistics)
    (_, _, ours), (_, _, theirs) = results
    assert len(ours) > 60
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
