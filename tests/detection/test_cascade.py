"""Cascade R-CNN: sizes, what moves between stages, what is averaged in a test, and the recipes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_detectors import batch, config
from test_heads import STRIDES, count, maps, proposals, rcnn
from torch import Tensor

from detection.defaults import load_detection_config
from detection.model import build_detector
from detection.rcnn.cascade import CascadeHeads, StageBoxes, build_cascade_heads, moved, refined
from detection.rcnn.heads import RegionHeads, Regions, build_pyramid_heads

RECIPES = Path(__file__).parents[2] / "detection" / "configs"
CASCADE = {"CASCADE": [0.5, 0.6, 0.7], "BOX_HEAD": "4conv1fc", "BOX_LOSS": "giou", "ALIGNED": True}
SIZES = [(96, 96), (96, 96)]


def cascade(**changes: Any) -> CascadeHeads:
    torch.manual_seed(0)
    return build_cascade_heads(rcnn(**{**CASCADE, "MASKS": True, **changes}), STRIDES, 3)


def padded_targets() -> list[dict[str, Tensor]]:
    _, targets = batch()
    pad = torch.nn.functional.pad
    return [{**t, "masks": pad(t["masks"], (0, 24, 0, 32))[:, :96, :96]} for t in targets]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("coco_swin_tiny_cascade_1x", 85_629_804),
        ("coco_swin_small_cascade_1x", 106_947_708),
        ("coco_swin_base_cascade_1x", 144_977_002),
        ("coco_swin_tiny_mask_1x", 47_798_959),
    ],
)
def test_the_published_parameter_counts(name: str, parameters: int) -> None:
    cfg = load_detection_config([str(RECIPES / f"{name}.yaml")], [], {})
    with torch.device("meta"):
        detector = build_detector(cfg, 80, None)
    assert count(detector) == parameters
    if "cascade" in name:
        assert [count(s.box_head) + count(s.box_predictor) for s in detector.roi_heads.stages] == [
            15_618_449
        ] * 3
        assert count(detector.roi_heads.stages[0].mask_head) + count(
            detector.roi_heads.stages[0].mask_predictor
        ) == 2_643_280  # fmt: skip


def test_three_boxes_move_as_by_hand() -> None:
    """One on an object, one in the background, and one that is an object and is removed."""
    stage = cascade().stages[1]
    assert isinstance(stage, RegionHeads)
    boxes = torch.tensor([[10.0, 20, 30, 60], [40, 40, 90, 80], [5, 5, 25, 45]])
    truth = torch.tensor([[12.0, 20, 34, 60], [0, 0, 1, 1], [5, 5, 25, 45]])
    labels = torch.tensor([2, 0, 1])
    deltas = torch.zeros(3, 4, 4)
    deltas[0, 2] = torch.tensor([2.0, -1.0, 10 * math.log(1.5), 0.0])
    deltas[1, 3] = torch.tensor([4.0, 0.0, 0.0, 10 * math.log(0.5)])
    deltas[0, 1] = deltas[1, 2] = deltas[1, 0] = 7.0  # other classes' deltas
    logits = torch.tensor([[0.0, 9, 1, 0], [9, 0, 1, 2], [0, 0, 0, 0]])
    regions = Regions([boxes], [labels * 0], [labels], [truth])
    (found,) = refined(stage, (logits, deltas.flatten(1)), regions, [(70, 93)])
    # centre (20, 40) of 20 x 40 moves by 2/20 and -1/20 of the sides, and becomes half as wide again
    # centre (65, 60) of 50 x 40 moves by 4/20 of 50 and halves its height; cut at 93 and 70
    by_hand = torch.tensor([[22 - 15, 38 - 20, 22 + 15, 38 + 20], [75 - 25, 60 - 10, 93, 70]])
    assert torch.allclose(found, by_hand.float(), atol=1e-4)


def test_objects_among_the_regions_are_trained_on_once_a_stage() -> None:
    heads, targets = cascade(), padded_targets()
    seen: list[list[int]] = []
    for stage in heads.stages:
        inner = stage.sample

        def watched(regions: Any, target: Any, inner: Any = inner) -> Regions:
            sampled = inner(regions, target)
            pairs = zip(sampled.boxes, target, strict=True)
            seen.append([int((b == t["boxes"]).all(dim=1).sum()) for b, t in pairs])
            return sampled

        stage.sample = watched
    heads(maps(), proposals(), SIZES, targets)
    assert seen == [[1, 1]] * 3


def test_stages_are_stricter_and_finer() -> None:
    heads = cascade()
    thresholds = [s.proposal_matcher.high_threshold for s in heads.stages]
    assert thresholds == [s.proposal_matcher.low_threshold for s in heads.stages] == [0.5, 0.6, 0.7]
    assert not any(s.proposal_matcher.allow_low_quality_matches for s in heads.stages)
    weights = [tuple(round(w, 1) for w in s.box_coder.weights) for s in heads.stages]
    assert weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30.3, 30.3, 14.9, 14.9)]
    assert heads.weights == [1.0, 0.5, 0.25]
    sampler = heads.stages[2].fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (32, 0.25)


def test_one_stage_of_weight_one_is_faster_rcnn() -> None:
    one = {"CASCADE": [0.5], "CASCADE_WEIGHTS": [1.0], "CASCADE_XY": [0.1], "CASCADE_WH": [0.2]}
    options = {"BOX_HEAD": "2fc", "BOX_LOSS": "smooth_l1", "ALIGNED": True, "MASKS": True}
    heads = cascade(**one, **options)
    single = build_pyramid_heads(rcnn(**options), STRIDES, 3)
    (stage,) = heads.stages
    for part in ("box_head", "mask_head"):
        getattr(single, part).load_state_dict(getattr(stage, part).state_dict())
    single.box_predictor, single.mask_predictor = stage.box_predictor, stage.mask_predictor
    features, regions, targets = maps(), proposals(), padded_targets()
    sampled, losses = [], []
    for module, sample in ((stage, heads), (single, single)):
        torch.manual_seed(1)
        sampled.append(module.sample(list(regions), targets))
        torch.manual_seed(1)
        losses.append(sample(features, list(regions), SIZES, targets)[1])
    for ours, theirs in zip(vars(sampled[0]).values(), vars(sampled[1]).values(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {name.removesuffix("/1"): loss for name, loss in losses[0].items()} == losses[1]


def test_losses_are_weighted_by_stage() -> None:
    features, regions, targets = maps(), proposals(), padded_targets()
    results = []
    for weights in ([1.0, 1.0, 1.0], [1.0, 0.5, 0.25]):
        heads = cascade(CASCADE_WEIGHTS=weights)
        torch.manual_seed(1)
        results.append(heads(features, list(regions), SIZES, targets)[1])
    names = ("loss_classifier", "loss_box_reg", "loss_mask")
    assert set(results[0]) == {f"{name}/{stage}" for name in names for stage in (1, 2, 3)}
    for name, loss in results[0].items():
        weight = {"1": 1.0, "2": 0.5, "3": 0.25}[name[-1]]
        assert float(results[1][name].detach()) == pytest.approx(
            weight * float(loss.detach()), rel=1e-6
        )


def test_in_a_test_logits_and_mask_probabilities_are_averaged() -> None:
    heads = cascade(SCORE_THRESH=0.0, MAX_DETECTIONS=1000).eval()
    features, regions = maps(), [p[:6] for p in proposals()]
    with torch.no_grad():
        for stage in heads.stages:  # or all classes would be about as likely
            stage.box_predictor.cls_score.weight.normal_(std=2.0)
            stage.box_predictor.bbox_pred.weight.normal_(std=0.5)
        found, losses = heads(features, regions, SIZES)
        boxes, logits = regions, []
        for number, stage in enumerate(heads.stages):
            stage_logits, deltas = stage.predict(features, boxes, SIZES)
            logits.append(stage_logits)
            if number < 2:
                boxes = moved(stage, deltas, boxes, stage_logits[:, 1:].argmax(1) + 1, SIZES)
        mean = sum(logits) / 3
        expected = heads.stages[2].results((mean, deltas), boxes, SIZES)
        of_softmaxes = sum(logit.softmax(1) for logit in logits) / 3
        assert not torch.allclose(of_softmaxes, mean.softmax(1), atol=1e-2), "the two differ here"
        final = [result["boxes"] for result in found]
        masks = [stage.predict_masks(features, final, SIZES).sigmoid() for stage in heads.stages]
    assert losses == {}
    rows = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours["boxes"], theirs["boxes"], atol=1e-4)
        assert torch.allclose(ours["scores"], theirs["scores"], atol=1e-6)
        assert torch.equal(ours["labels"], theirs["labels"])
        for label, mask in zip(ours["labels"], ours["masks"], strict=True):
            by_hand = sum(stage[rows, label] for stage in masks) / 3
            assert torch.allclose(mask[0], by_hand, atol=1e-6)
            rows += 1
    assert rows > 5


def test_without_proposals_nothing_is_found() -> None:
    with torch.no_grad():
        found, _ = cascade().eval()(maps(), [torch.zeros(0, 4)] * 2, SIZES)
    assert [len(result["boxes"]) for result in found] == [0, 0]
    assert [tuple(result["masks"].shape) for result in found] == [(0, 1, 28, 28)] * 2


@pytest.mark.parametrize("reg", ["class", "agnostic"])
def test_every_parameter_trains_and_boxes_are_float32_under_autocast(reg: str) -> None:
    keys = {**CASCADE, "CASCADE_REG": reg, "MASKS": True, "SCORE_THRESH": 0.0}
    detector = build_detector(
        config("fpn", **{f"MODEL__RCNN__{key}": value for key, value in keys.items()}), 3, None
    )
    between: list[Tensor] = []
    for stage in detector.roi_heads.stages:
        inner = stage.sample

        def watched(boxes: Any, targets: Any, inner: Any = inner) -> Regions:
            between.extend(boxes)
            return inner(boxes, targets)

        stage.sample = watched
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
        sum(losses.values()).backward()
        assert [n for n, p in detector.named_parameters() if p.grad is None] == []
        with torch.no_grad():
            results = detector.eval()(images)
    assert {boxes.dtype for boxes in between} == {torch.float32}
    for result in results:
        assert {result[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}
        assert len(result["boxes"])
        assert not torch.equal(result["boxes"], result["boxes"].bfloat16().float())


def test_deltas_of_all_classes_together_are_one_set() -> None:
    logits, deltas = StageBoxes(8, 3, agnostic=True)(torch.randn(5, 8))
    assert (logits.shape, deltas.shape) == ((5, 4), (5, 16))
    assert all(torch.equal(deltas[:, :4], deltas[:, i : i + 4]) for i in (4, 8, 12))
    assert StageBoxes(8, 3, agnostic=False)(torch.randn(5, 8))[1][:, :4].abs().max() == 0


def test_a_batch_without_objects_and_regions_is_trained_on() -> None:
    """A batch norm over no region would become NaN for good."""
    heads = cascade(MASK_NORM=True)
    nothing = [
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 96, 96, dtype=torch.uint8),
        }
    ] * 2
    losses = heads(maps(), [torch.zeros(0, 4)] * 2, SIZES, nothing)[1]
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in heads.parameters())
    assert all(torch.isfinite(buffer).all() for buffer in heads.buffers())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"CASCADE_WEIGHTS": [1.0]}, ["CASCADE_WEIGHTS", "3 stages"]),
        ({"CASCADE_XY": [0.1, 0.05]}, ["CASCADE_XY", "3 stages"]),
        ({"CASCADE_WH": [0.1, 0.05, 0.0]}, ["CASCADE_WH", "at least"]),
        ({"CASCADE": [0.5, 0.6, 1.7]}, ["CASCADE", "between 0 and 1"]),
        ({"CASCADE_REG": "both"}, ["CASCADE_REG", "agnostic"]),
        ({"NECK": "c4", "BOX_HEAD": "2fc"}, ["CASCADE", "c4", "fpn"]),
    ],
)
def test_cascades_that_cannot_be_are_refused_by_key(
    changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=r"^MODEL\.RCNN\.") as error:
        rcnn(**{**CASCADE, **changes})
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("size", "schedule", "drop_path"),
    [
        ("tiny", "1x", 0.0),
        ("tiny", "3x", 0.2),
        ("small", "1x", 0.2),
        ("small", "3x", 0.2),
        ("base", "1x", 0.3),
        ("base", "3x", 0.3),
    ],
)
def test_the_cascade_recipes_of_swin_are_the_published_ones(
    size: str, schedule: str, drop_path: float
) -> None:
    path = RECIPES / f"coco_swin_{size}_cascade_{schedule}.yaml"
    cfg = load_detection_config([str(path)], [], {})
    heads = cfg.MODEL.RCNN
    assert cfg.MODEL.BACKBONE.NAME == f"swin_{size}"
    assert cfg.MODEL.BACKBONE.DROP_PATH == drop_path
    assert (heads.CASCADE, heads.BOX_HEAD, heads.CASCADE_REG) == (
        [0.5, 0.6, 0.7],
        "4conv1fc",
        "class",
    )
    assert (heads.BOX_LOSS, heads.RPN_LOSS, heads.RPN_POST_NMS[0]) == ("giou", "smooth_l1", 2000)
    assert (heads.NORM, heads.MASK_NORM, heads.ALIGNED) == ("sync", False, True)
    plan = (87960, [58640, 80630]) if schedule == "1x" else (263880, [197910, 241890])
    assert (cfg.DETECTION.MAX_ITER, cfg.DETECTION.STEPS) == plan
    assert cfg.OPTIM.EXCLUDE_RULE == "norms"
