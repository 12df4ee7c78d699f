"""The region proposal network of every detector: torchvision's, with the published choices."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
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


def build_proposals(rcnn: CfgNode, width: int) -> Proposals:
    """Build the network of a `MODEL.RCNN` section on maps of `width` channels."""
    sizes = tuple(map(int, rcnn.ANCHOR_SIZES))
    levels = (sizes,) if rcnn.NECK == "c4" else tuple((size,) for size in sizes)
    anchors = AnchorGenerator(levels, (_RATIOS,) * len(levels))
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
