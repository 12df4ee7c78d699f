"""The region proposal network of every detector: torchvision's, with the published choices."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from yacs.config import CfgNode

_RATIOS = (0.5, 1.0, 2.0)
_FOREGROUND, _BACKGROUND = 0.7, 0.3  # IoU of an anchor with an object (Ren et al. 2015)


def distance(kind: str, deltas: Tensor, wanted: Tensor) -> Tensor:
    """Sum the `l1` or `smooth_l1` (beta 1/9) distances of encoded boxes (n,4)."""
    if kind == "l1":
        return F.l1_loss(deltas, wanted, reduction="sum")
    return F.smooth_l1_loss(deltas, wanted, beta=1 / 9, reduction="sum")


class _Head(RPNHead):
    # torchvision's box coder gives boxes the type of what a head put out. Under autocast that would
    # be bfloat16, in which numbers above 512 are multiples of 4.
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 and at the maps' own `strides`.

    torchvision divides the image's size by the map's. Where that leaves a remainder (a map of 13
    cells over 800 pixels), its anchors lie at 61 pixels instead of 64.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], strides: Sequence[int]) -> None:
        super().__init__(tuple(map(tuple, sizes)), (_RATIOS,) * len(sizes))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (A,4) of each image, those of all its maps in one."""
        # Maps are bfloat16 under autocast, in which numbers above 512 are multiples of 4.
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        steps = [[torch.full((), stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, steps))
        return [anchors] * len(image_list.image_sizes)


class _Matcher(Matcher):
    """Match anchors to objects; the best anchor of an object needs an IoU of `least` only."""

    def __init__(self, least: float) -> None:
        super().__init__(_FOREGROUND, _BACKGROUND, allow_low_quality_matches=True)
        self.least = least

    def __call__(self, match_quality_matrix: Tensor) -> Tensor:
        matches = super().__call__(match_quality_matrix)
        best = match_quality_matrix.max(dim=0).values
        # torchvision takes an object's best anchor however small the overlap is
        return torch.where((matches >= 0) & (best < self.least), self.BELOW_LOW_THRESHOLD, matches)


class Proposals(RegionProposalNetwork):
    """torchvision's network with `box_loss` l1 or smooth_l1, as `distance` has them."""

    box_loss = "smooth_l1"

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and of boxes over the sampled anchors."""
        chosen, rejected = self.fg_bg_sampler(labels)
        positive = torch.where(torch.cat(chosen))[0]
        sampled = torch.cat([positive, torch.where(torch.cat(rejected))[0]])
        wanted = torch.cat(regression_targets)[positive]
        box_loss = distance(self.box_loss, pred_bbox_deltas[positive], wanted)
        objectness_loss = F.binary_cross_entropy_with_logits(
            objectness.flatten()[sampled], torch.cat(labels)[sampled]
        )
        return objectness_loss, box_loss / sampled.numel()


def build_proposals(rcnn: CfgNode, width: int, strides: Sequence[int]) -> Proposals:
    """Build the network of a `MODEL.RCNN` section on maps of `width` channels.

    `strides` are those of the trunk's maps. C4 has the last map only; a pyramid has one more map,
    which is every second cell of the last.
    """
    sizes = list(map(int, rcnn.ANCHOR_SIZES))
    if rcnn.NECK == "c4":
        anchors = Anchors([sizes], [strides[-1]])
    else:
        anchors = Anchors([[size] for size in sizes], [*strides, 2 * strides[-1]])
    network = Proposals(
        anchors,
        _Head(width, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=_FOREGROUND,
        bg_iou_thresh=_BACKGROUND,
        batch_size_per_image=rcnn.RPN_BATCH,
        positive_fraction=0.5,
        pre_nms_top_n=dict(zip(("training", "testing"), rcnn.RPN_PRE_NMS, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), rcnn.RPN_POST_NMS, strict=True)),
        nms_thresh=0.7,
    )
    network.proposal_matcher = _Matcher(rcnn.RPN_LEAST_IOU)
    network.box_loss = rcnn.RPN_LOSS
    return network
