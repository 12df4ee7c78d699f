"""The heads against torchvision's own, against sums by hand, and the published parameter counts."""

import math
from typing import Any

import pytest
import shapes
import torch
from test_detectors import batch, config
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, box_iou

from detection.defaults import load_detection_config
from detection.model import build_detector
from detection.rcnn.heads import RegionHeads, RegionPool, Regions, build_pyramid_heads
from detection.rcnn.proposals import Proposals, build_proposals
from engine.optim import parameter_groups

STRIDES = [4, 8, 16, 32]


def rcnn(**changes: Any) -> Any:
    keys = {f"MODEL__RCNN__{key}": value for key, value in changes.items()}
    return config("fpn", **keys).MODEL.RCNN


def maps(width: int = 32, size: int = 96) -> dict[str, Tensor]:
    return {str(i): torch.randn(2, width, size // s, size // s) for i, s in enumerate(STRIDES)}


def proposals() -> list[Tensor]:
    corners = torch.rand(2, 40, 2) * 50
    return list(torch.cat([corners, corners + 5 + torch.rand(2, 40, 2) * 40], dim=2))


def test_by_default_heads_are_those_of_torchvision() -> None:
    heads = build_pyramid_heads(rcnn(MASKS=True, SCORE_THRESH=0.0), STRIDES, 3)
    theirs = roi_heads.RoIHeads(
        MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        heads.box_head,
        heads.box_predictor,
        *(0.5, 0.5, 32, 0.25, None, 0.0, 0.5, 100),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        mask_head=heads.mask_head,
        mask_predictor=heads.mask_predictor,
    )
    features, regions, (_, targets) = maps(), proposals(), batch()
    sizes = [(96, 96), (96, 96)]
    targets = [{**t, "masks": nn.functional.pad(t["masks"], (0, 24, 0, 16))} for t in targets]
    results = []
    for module in (heads, theirs):
        torch.manual_seed(0)
        losses = module.train()(features, list(regions), sizes, targets)[1]
        results.append((losses, module.eval()(features, list(regions), sizes)[0]))
    (losses, found), (expected, wanted) = results
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)
    for ours, other in zip(found, wanted, strict=True):
        assert len(ours["boxes"])
        assert all(torch.equal(ours[name], other[name]) for name in other)


# ---- pooling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [30, 150, 300, 600])
def test_an_aligned_cell_is_the_value_at_its_centre(side: int) -> None:
    """On maps whose values are the columns' centres in pixels, each cell is its centre's column."""
    features = {}
    for number, stride in enumerate(STRIDES):
        columns = (torch.arange(1024 // stride) + 0.5) * stride + 10000 * number
        features[str(number)] = columns.expand(1, 1, len(columns), len(columns)).contiguous()
    box = torch.tensor([[200.0, 210.0, 200.0 + side, 210.0 + side]])
    cells = RegionPool(STRIDES, 7, 0, aligned=True)(features, [box], [(1024, 1024)])
    level = min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2
    centres = 10000 * level + 200 + (torch.arange(7) + 0.5) * side / 7
    assert torch.allclose(cells[0, 0], centres.expand(7, 7), atol=1e-2)


def test_not_aligned_is_what_torchvision_pools() -> None:
    features, regions, sizes = maps(), proposals(), [(96, 96), (96, 90)]
    ours = RegionPool(STRIDES, 7, 2, aligned=False)(features, regions, sizes)
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, regions, sizes)
    assert torch.equal(ours, theirs)
    aligned = RegionPool(STRIDES, 7, 0, aligned=True)(features, regions, sizes)
    assert not torch.allclose(ours, aligned, atol=1e-2)


def test_a_canvas_twice_as_high_as_the_images_does_not_change_the_strides() -> None:
    """torchvision would take a stride of 4 for one of 2."""
    pool = build_detector(config("fpn"), 3, None).roi_heads.box_roi_pool
    features, box = maps(), [torch.tensor([[0.0, 0.0, 40.0, 40.0]])] * 2
    low = pool(features, box, [(48, 96), (48, 96)])
    assert torch.equal(low, pool(features, box, [(96, 96), (96, 96)]))
    stems = {"cifar": [1, 0.5, 0.25, 0.125], "cifar_stride2": [0.5, 0.25, 0.125, 0.0625]}
    for stem, scales in stems.items():
        changes = {"MODEL__BACKBONE__NAME": "resnet18", "MODEL__BACKBONE__STEM": stem}
        detector = build_detector(config("fpn", **changes), 3, None)
        assert detector.roi_heads.box_roi_pool.scales == scales


# ---- losses --------------------------------------------------------------------------------------


def giou(a: list[float], b: list[float]) -> float:
    inner = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    union = sum(areas) - inner
    return inner / union - (hull - union) / hull


@pytest.mark.parametrize("kind", ["l1", "smooth_l1", "giou"])
def test_the_box_loss_by_hand(kind: str) -> None:
    """Four regions, two of them on objects: the sum over these two divided by four."""
    heads = build_pyramid_heads(rcnn(BOX_LOSS=kind), STRIDES, 3)
    boxes = torch.tensor([[10.0, 10, 30, 30], [40, 40, 80, 60], [0, 0, 9, 9], [50, 5, 60, 20]])
    truth = torch.tensor([[12.0, 8, 34, 30], [44, 38, 80, 66], [0, 0, 5, 5], [0, 0, 5, 5]])
    labels = torch.tensor([2, 3, 0, 0])
    deltas = torch.randn(4, 4, 4)
    regions = Regions([boxes[:1], boxes[1:]], [labels[:1] * 0, labels[1:] * 0], *[
        [x[:1], x[1:]] for x in (labels, truth)
    ])  # fmt: skip
    found = heads.box_losses((torch.randn(4, 4), deltas.flatten(1)), regions)["loss_box_reg"]
    total = 0.0
    for row, label in ((0, 2), (1, 3)):
        delta = deltas[row, label]
        if kind == "giou":
            decoded = heads.box_coder.decode_single(delta[None], boxes[row : row + 1])[0]
            total += 10 * (1 - giou(decoded.tolist(), truth[row].tolist()))
            continue
        for x, y in zip(delta.tolist(), encoded(boxes[row], truth[row]), strict=True):
            far = abs(x - y)
            total += far if kind == "l1" else (
                far - 1 / 18 if far > 1 / 9 else 4.5 * far * far
            )  # fmt: skip
    assert float(found) == pytest.approx(total / 4, rel=1e-5)


def encoded(box: Tensor, truth: Tensor) -> list[float]:
    """Encode with Faster R-CNN's weights 10, 10, 5, 5."""
    (w, h), (tw, th) = [((b[2:] - b[:2]).tolist()) for b in (box, truth)]
    dx, dy = ((truth[:2] + truth[2:]) / 2 - (box[:2] + box[2:]) / 2).tolist()
    return [10 * dx / w, 10 * dy / h, 5 * math.log(tw / w), 5 * math.log(th / h)]


@pytest.mark.parametrize("kind", ["l1", "smooth_l1"])
def test_the_proposals_loss_is_that_of_its_key(kind: str) -> None:
    network = build_proposals(rcnn(RPN_LOSS=kind), 32, STRIDES)
    labels = [torch.tensor([1.0, 0, -1, 1]), torch.tensor([0.0, 0, 1, -1])]
    deltas, wanted, logits = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 1)
    found = network.compute_loss(logits, deltas, labels, [wanted[:4], wanted[4:]])
    far = (deltas - wanted)[[0, 3, 6]].abs()
    if kind == "smooth_l1":
        far = torch.where(far < 1 / 9, 4.5 * far.square(), far - 1 / 18)
        theirs = super(Proposals, network).compute_loss(
            logits, deltas, labels, [wanted[:4], wanted[4:]]
        )
        assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    assert float(found[1]) == pytest.approx(float(far.sum()) / 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_anchors_lie_at_the_strides_of_their_maps(dtype: torch.dtype) -> None:
    """Also where a map's size does not divide the image's, and on maps of half precision."""
    network = build_proposals(rcnn(ANCHOR_SIZES=[32, 64, 128, 256, 512]), 32, STRIDES)
    sides = (200, 100, 50, 25, 13)  # of 800 pixels
    levels = [torch.zeros(1, 32, side, side, dtype=dtype) for side in sides]
    images = ImageList(torch.zeros(1, 3, 800, 800), [(800, 800)])
    (anchors,) = network.anchor_generator(images, levels)
    assert anchors.dtype == torch.float32
    parts = anchors.split([3 * side * side for side in sides])
    for stride, level in zip([4, 8, 16, 32, 64], parts, strict=True):
        squares = level.view(-1, 3, 4)[:, 1]
        centres = (squares[:, :2] + squares[:, 2:]) / 2
        side = round(len(squares) ** 0.5)
        places = torch.arange(side) * float(stride)
        assert torch.equal(centres[:side, 0], places)
        assert torch.equal(centres[::side, 1], places)
        assert (squares[:, 2:] - squares[:, :2]).unique().tolist() == [8 * stride]


def test_an_object_that_no_anchor_overlaps_enough_stays_unmatched() -> None:
    quality = torch.tensor([[0.8, 0.5, 0.1, 0.0], [0.1, 0.0, 0.2, 0.0]])
    any_overlap = build_proposals(rcnn(), 32, STRIDES).proposal_matcher
    assert any_overlap(quality).tolist() == [0, -2, 1, -1]
    published = build_proposals(rcnn(RPN_LEAST_IOU=0.3), 32, STRIDES).proposal_matcher
    assert published(quality).tolist() == [0, -2, -1, -1]
    assert published(quality + 0.15).tolist() == [0, -2, 1, -1]


def test_aligned_masks_are_cut_where_the_aligned_pool_cuts() -> None:
    """A mask that is the left half of its box is the left half of the target, whatever the size."""
    heads = build_pyramid_heads(rcnn(MASKS=True, ALIGNED=True), STRIDES, 3)
    mask = torch.zeros(1, 96, 96, dtype=torch.uint8)
    mask[0, 20:60, 10:30] = 1
    box = torch.tensor([[10.0, 20.0, 50.0, 60.0]])
    zero, two = torch.tensor([0]), torch.tensor([2])
    logits = torch.full((1, 4, 28, 28), -20.0)
    logits[0, 2, :, :14] = 20.0
    target = [{"masks": mask, "labels": two}]
    shown = Regions([box], [zero], [two], [box])
    assert float(heads.mask_loss(logits, shown, target)) < 1e-6
    assert float(heads.mask_loss(-logits, shown, target)) > 19


# ---- what is built -------------------------------------------------------------------------------


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_four_convolutions_and_a_layer_have_the_published_size() -> None:
    heads = build_pyramid_heads(
        rcnn(BOX_HEAD="4conv1fc", MASKS=True, MASK_NORM=True, PYRAMID_WIDTH=256, HEAD_WIDTH=1024),
        STRIDES,
        80,
    )
    convolutions = 4 * (256 * 256 * 9 + 2 * 256)
    assert count(heads.box_head) == convolutions + 256 * 49 * 1024 + 1024
    assert count(heads.mask_head) == convolutions
    plain = build_pyramid_heads(rcnn(MASKS=True), STRIDES, 3)
    assert not [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("box_loss", ["l1", "giou"])
def test_the_published_choices_train_every_parameter_under_autocast(box_loss: str) -> None:
    changes = {"BOX_HEAD": "4conv1fc", "MASKS": True, "MASK_NORM": True, "ALIGNED": True}
    changes |= {"BOX_LOSS": box_loss, "RPN_LOSS": "l1", "RPN_LEAST_IOU": 0.3, "SCORE_THRESH": 0.0}
    keys = {f"MODEL__RCNN__{key}": value for key, value in changes.items()}
    detector = build_detector(config("fpn", **keys), 3, None)
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        sum(detector(images, targets).values()).backward()
    assert [n for n, p in detector.named_parameters() if p.grad is None] == []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector.eval()(images)
    assert {result["boxes"].dtype for result in found} == {torch.float32}
    assert isinstance(detector.roi_heads, RegionHeads)


def test_swin_exempts_76_tensors_by_the_published_rule() -> None:
    """And all else decays: biases, and the batch norms of the head."""
    keys = shapes.opts(
        **{"MODEL__BACKBONE__NAME": "swin_tiny"},
        **{"MODEL__RCNN__MASKS": True, "MODEL__RCNN__BOX_HEAD": "4conv1fc"},
        **{"OPTIM__NAME": "adamw", "OPTIM__EXCLUDE_RULE": "norms"},
    )
    cfg = load_detection_config([], keys, {})
    detector = build_detector(cfg, 3, None)
    decays, exempt = parameter_groups(detector, cfg.OPTIM)
    assert len(exempt["params"]) == 76
    names = {id(p): name for name, p in detector.named_parameters()}
    assert all(names[id(p)].startswith("backbone.trunk.") for p in exempt["params"])
    assert sum(names[id(p)].endswith(".bias") for p in decays["params"]) > 70
    assert len(decays["params"]) + 76 == len(names)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"BOX_HEAD": "3fc"}, ["BOX_HEAD", "'3fc'", "4conv1fc"]),
        ({"BOX_HEAD": "4conv1fc", "NORM": "frozen"}, ["BOX_HEAD", "'frozen'", "sync or batch"]),
        ({"MASK_NORM": True, "NORM": "frozen", "MASKS": True}, ["MASK_NORM", "'frozen'"]),
        ({"MASK_NORM": True}, ["MASK_NORM", "MASKS"]),
        ({"NECK": "c4", "BOX_HEAD": "4conv1fc"}, ["BOX_HEAD", "c4", "'2fc'"]),
        ({"BOX_LOSS": "iou"}, ["BOX_LOSS", "'iou'", "giou"]),
        ({"RPN_LOSS": "giou"}, ["RPN_LOSS", "'giou'", "smooth_l1, l1"]),
        ({"RPN_LEAST_IOU": 0.8}, ["RPN_LEAST_IOU", "0.7"]),
    ],
)
def test_heads_that_cannot_be_are_refused_by_key(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^MODEL\.RCNN\.") as error:
        rcnn(**changes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_oracle_of_this_file_is_sound() -> None:
    a, b = [0.0, 0.0, 4.0, 4.0], [2.0, 2.0, 6.0, 6.0]
    assert giou(a, b) == pytest.approx(4 / 28 - 8 / 36)
    assert float(box_iou(torch.tensor([a]), torch.tensor([b]))) == pytest.approx(4 / 28)
