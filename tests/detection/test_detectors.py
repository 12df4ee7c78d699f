"""Detectors of every kind train and detect at small sizes; the pretrained weights are really in them."""

from pathlib import Path
from typing import Any

import pytest
import shapes
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder

from detection.defaults import load_detection_config
from detection.model import Detector, build_detector
from detection.rcnn.backbones import C4Trunk
from engine.plan import iteration_plan
from models.parts.backbones import build_backbone
from models.parts.norm import SyncBatchNorm
from models.parts.resolution import is_dense_swin
from utils.config.load import ConfigError

RECIPES = Path(__file__).parents[2] / "detection" / "configs"
KINDS: dict[str, dict[str, Any]] = {
    "fpn": {"MODEL__BACKBONE__NAME": "timm/test_resnet", "MODEL__RCNN__NECK": "fpn"},
    "c4": {
        **{
            "MODEL__BACKBONE__NAME": "timm/test_resnet",
            "MODEL__RCNN__NECK": "c4",
            "MODEL__RCNN__ROI_BATCH": 8,
        },
        **{"MODEL__RCNN__RPN_POST_NMS": [20, 8], "MODEL__RCNN__MAX_DETECTIONS": 8},
    },
    "swin": {
        **{"MODEL__BACKBONE__NAME": "swin_tiny", "MODEL__RCNN__NECK": "fpn"},
    },
    "vit": {
        **{"MODEL__BACKBONE__NAME": "deit_tiny", "MODEL__RCNN__NECK": "pyramid"},
        **{"DETECTION__CANVAS": 96, "DATA__IMG_SIZE": 64},
    },
}

NORMS = {"sync": "SyncBatchNorm", "batch": "BatchNorm2d", "frozen": "FrozenBatchNorm2d"}


def config(kind: str, **changes: Any) -> Any:
    return load_detection_config([], shapes.opts(**{**KINDS[kind], **changes}), {})


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    images = [torch.rand(3, 64, 96), torch.rand(3, 80, 72)]
    targets = []
    for image in images:
        masks = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        masks[0, 20:50, 10:40] = 1
        box = torch.tensor([[10.0, 20.0, 40.0, 50.0]])
        targets.append({"boxes": box, "labels": torch.tensor([2]), "masks": masks})
    return images, targets


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_trains_every_parameter_and_detects(kind: str, masks: bool) -> None:
    detector = build_detector(
        config(kind, MODEL__RCNN__MASKS=masks, MODEL__RCNN__SCORE_THRESH=0.0), 3, None
    )
    images, targets = batch()
    losses = detector(images, targets)
    assert ("loss_mask" in losses) is masks
    sum(losses.values()).backward()
    without = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert without == [], "DDP would wait for them"
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)
    detector.eval()
    with torch.no_grad():
        (first, _) = detector(images)
    assert first["boxes"].shape == (len(first["labels"]), 4)
    assert len(first["boxes"]) > 0
    assert first["boxes"][:, 2].max() <= 96
    assert first["boxes"][:, 3].max() <= 64
    assert set(first["labels"].tolist()) <= {1, 2, 3}
    assert ("masks" in first) is masks


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_an_image_without_objects_is_trained_on_with_masks(kind: str) -> None:
    detector = build_detector(config(kind, MODEL__RCNN__MASKS=True), 3, None)
    images, targets = batch()
    targets[1] = {name: tensor[:0] for name, tensor in targets[1].items()}
    losses = detector(images, targets)
    assert "loss_mask" in losses
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("kind", ["fpn", "c4"])
def test_boxes_stay_float32_under_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    detector = build_detector(
        config(kind, MODEL__RCNN__MASKS=True, MODEL__RCNN__SCORE_THRESH=0.0), 3, None
    )
    coded: list[Tensor] = []  # boxes and what the losses aim at

    def watch(name: str) -> None:
        inner = getattr(BoxCoder, name)

        def watched(self: BoxCoder, *args: Any) -> Any:
            result = inner(self, *args)
            coded.extend(result if isinstance(result, (list, tuple)) else [result])
            return result

        monkeypatch.setattr(BoxCoder, name, watched)

    watch("encode")
    watch("decode")
    images, targets = batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector(images, targets)
        sum(losses.values()).backward()
        detector.eval()
        with torch.no_grad():
            results = detector(images)
    assert {tensor.dtype for tensor in coded} == {torch.float32}
    for result in results:
        assert {result[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}
        assert len(result["boxes"])
        # none of the numbers has been rounded to a bfloat16 on its way
        assert not torch.equal(result["boxes"], result["boxes"].bfloat16().float())


def weights_file(path: Path, name: str, **options: Any) -> dict[str, Tensor]:
    """Write random weights as a MoCo checkpoint would hold them and return the backbone's."""
    torch.manual_seed(3)
    backbone = build_backbone(name, **options)
    state = {
        key: torch.randn_like(t) if t.is_floating_point() else t
        for key, t in backbone.state_dict().items()
    }
    state = {key: t.abs() if key.endswith("running_var") else t for key, t in state.items()}
    torch.save({"state_dict": {f"module.encoder_q.{key}": t for key, t in state.items()}}, path)
    return state


RENAMES = {  # where a part of the backbone stands in the detector
    "fpn": lambda key: f"backbone.trunk.{key}",
    "c4": lambda key: (
        f"roi_heads.box_head.{key}" if key.startswith("layer4") else f"backbone.trunk.{key}"
    ),
    "swin": lambda key: f"backbone.trunk.body.{key}",
    "vit": lambda key: f"backbone.body.{key}",
}


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        *((kind, norm) for kind in ("fpn", "c4") for norm in NORMS),
        ("swin", "sync"),
        ("vit", "sync"),
    ],
)
def test_the_checkpoint_is_really_in_the_detector(kind: str, norm: str, tmp_path: Path) -> None:
    name = KINDS[kind]["MODEL__BACKBONE__NAME"]
    saved = weights_file(tmp_path / "moco.pt", name, img_size=224 if kind == "swin" else 64)
    detector = build_detector(config(kind, MODEL__RCNN__NORM=norm), 3, tmp_path / "moco.pt")
    inside = detector.state_dict()
    for key, tensor in saved.items():
        if norm == "frozen" and key.endswith("num_batches_tracked"):
            continue
        if key == "pos_embed":  # 4 x 4 patches became 6 x 6, the class token's row first
            assert inside[RENAMES[kind](key)].shape == (1, 37, 192)
            assert torch.equal(inside[RENAMES[kind](key)][:, 0], tensor[:, 0])
            continue
        assert torch.equal(inside[RENAMES[kind](key)], tensor), key
    other = build_detector(config(kind, MODEL__RCNN__NORM=norm), 3, None).state_dict()
    key = next(key for key, tensor in saved.items() if tensor.ndim == 4)
    assert not torch.equal(other[RENAMES[kind](key)], saved[key])


def test_incomplete_weights_are_refused(tmp_path: Path) -> None:
    saved = weights_file(tmp_path / "moco.pt", "timm/test_resnet")
    del saved["layer3.0.conv1.weight"]
    torch.save(saved, tmp_path / "holed.pt")
    with pytest.raises(ValueError, match=r"holed\.pt.*layer3\.0\.conv1\.weight"):
        build_detector(config("fpn"), 3, tmp_path / "holed.pt")
    with pytest.raises(ValueError, match=r"moco\.pt does not fit"):
        build_detector(config("fpn", MODEL__BACKBONE__NAME="resnet18"), 3, tmp_path / "moco.pt")


def norms_of(detector: nn.Module) -> set[str]:
    return {type(m).__name__ for m in detector.modules() if hasattr(m, "running_mean")}


def test_the_norm_is_what_the_key_says() -> None:
    detectors = {
        norm: build_detector(config("c4", MODEL__RCNN__NORM=norm), 3, None) for norm in NORMS
    }
    assert {norm: norms_of(detector) for norm, detector in detectors.items()} == {
        norm: {kind} for norm, kind in NORMS.items()
    }
    extra = detectors["sync"].roi_heads.box_head.norm
    assert isinstance(extra, SyncBatchNorm)
    assert extra.num_features == 96
    # frozen, a new norm would have no statistics
    assert isinstance(detectors["frozen"].roi_heads.box_head.norm, nn.Identity)
    without = build_detector(config("c4", MODEL__RCNN__EXTRA_NORM=False), 3, None)
    assert isinstance(without.roi_heads.box_head.norm, nn.Identity)


def test_frozen_norms_do_not_move() -> None:
    detector = build_detector(config("c4", MODEL__RCNN__NORM="frozen"), 3, None)
    before = {key: t.clone() for key, t in detector.named_buffers() if "running" in key}
    images, targets = batch()
    sum(detector(images, targets).values()).backward()
    assert before
    assert all(torch.equal(t, before[key]) for key, t in detector.named_buffers() if key in before)


def test_c4_hands_stage_five_to_the_head() -> None:
    detector = build_detector(config("c4"), 3, None)
    assert isinstance(detector.backbone, C4Trunk)
    assert not any("layer4" in key for key in detector.backbone.state_dict())
    maps = detector.backbone(torch.rand(1, 3, 64, 96))
    assert {key: tuple(m.shape) for key, m in maps.items()} == {"0": (1, 192, 4, 6)}
    assert detector.roi_heads.box_head(torch.rand(5, 192, 14, 14)).shape == (5, 96, 7, 7)


@pytest.mark.parametrize("kind", ["fpn", "swin", "vit"])
def test_pyramids_have_five_strides(kind: str) -> None:
    maps = build_detector(config(kind), 3, None).eval().backbone(torch.rand(1, 3, 96, 96))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [(32, s, s) for s in (24, 12, 6, 3, 2)]


def test_a_swin_of_an_earlier_run_keeps_its_canvas_and_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    new = build_detector(config("swin"), 3, None)
    assert not caplog.text
    old = build_detector(config("swin", DETECTION__CANVAS=96), 3, None)
    assert "DETECTION.CANVAS: 96" in caplog.text
    assert (is_dense_swin(new), is_dense_swin(old)) == (True, False)
    assert old.state_dict().keys() == new.state_dict().keys()
    assert old.transform([torch.rand(3, 64, 96)], None)[0].tensors.shape == (1, 3, 96, 96)


def test_padding_does_not_move_boxes(coco_root: Path) -> None:
    detector = build_detector(config("fpn"), 3, None)
    images, targets = batch()
    padded, moved = detector.transform(images, targets)
    assert padded.tensors.shape == (2, 3, 96, 96)
    assert padded.image_sizes == [(64, 96), (80, 72)]
    assert torch.equal(moved[0]["boxes"], targets[0]["boxes"])
    canvas = build_detector(config("vit"), 3, None).transform(images[:1], None)[0].tensors
    assert canvas.shape == (1, 3, 96, 96)
    assert canvas[:, :, 64:].abs().max() == 0


def detector_error(kind: str, **changes: Any) -> str:
    with pytest.raises(ValueError, match=r"^[A-Z_.]+( \(--[a-z-]+\))?: ") as error:
        build_detector(config(kind, **changes), 3, None)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (
            "fpn",
            {"MODEL__RCNN__NECK": "pyramid"},
            ["NECK", "'pyramid'", "test_resnet", "fpn or c4"],
        ),
        ("swin", {"MODEL__RCNN__NECK": "c4"}, ["NECK", "swin_tiny", "use fpn"]),
        ("vit", {"DETECTION__CANVAS": 0}, ["CANVAS", "deit_tiny"]),
        ("vit", {"DETECTION__CANVAS": 112}, ["CANVAS", "112", "32"]),
        (
            "vit",
            {"MODEL__BACKBONE__PATCH_SIZE": 14, "DATA__IMG_SIZE": 56, "DETECTION__CANVAS": 112},
            ["NAME", "deit_tiny", "14 pixels", "8, 16"],
        ),
        ("fpn", {"MODEL__BACKBONE__NAME": "resnet8"}, ["NAME", "three stages"]),
        ("fpn", {"MODEL__RCNN__NORM": "group"}, ["NORM", "'group'", "frozen"]),
        ("fpn", {"MODEL__RCNN__ANCHOR_SIZES": [8, 16]}, ["ANCHOR_SIZES", "give 5"]),
        ("fpn", {"MODEL__RCNN__RPN_POST_NMS": [8]}, ["RPN_POST_NMS", "give 2"]),
        ("fpn", {"MODEL__RCNN__ROI_BATCH": 0}, ["ROI_BATCH", "at least 1"]),
        ("fpn", {"DATA__DATASET": "imagefolder"}, ["DATASET", "coco, voc"]),
        ("fpn", {"DATA__DATASET": "voc", "MODEL__RCNN__MASKS": True}, ["MASKS", "boxes only"]),
        ("fpn", {"DETECTION__MAX_SIZE": 70}, ["MAX_SIZE", "70", "80"]),
        ("fpn", {"DETECTION__CANVAS": 64}, ["CANVAS", "64", "96"]),
        ("fpn", {"DETECTION__FLIP": 2.0}, ["FLIP", "between 0 and 1"]),
        ("fpn", {"DETECTION__EVAL_PERIOD": 7}, ["EVAL_PERIOD", "90000", "divisor"]),
    ],
)
def test_what_cannot_be_built_is_refused_by_key(
    kind: str, changes: dict[str, Any], words: list[str]
) -> None:
    message = detector_error(kind, **changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "key", ["AUG.RECIPE", "KNN.K", "TRAIN.EPOCHS", "LINEAR.LRS", "DETECTION.NOISE"]
)
def test_keys_that_no_detector_reads_are_unknown(key: str) -> None:
    with pytest.raises(ConfigError, match="there is no key"):
        load_detection_config([], [key, "1"], {})


def test_every_recipe_builds_a_configuration() -> None:
    read = {
        path.stem: load_detection_config([str(path)], [], {})
        for path in sorted(RECIPES.glob("*.yaml"))
    }
    plans = {
        "coco_r50_c4_1x": (90000, [60000, 80000]),
        "coco_r50_c4_2x": (180000, [120000, 160000]),
        "coco_r50_fpn_1x": (90000, [60000, 80000]),
        "coco_r50_fpn_2x": (180000, [120000, 160000]),
        "voc_r50_c4_12k": (12000, [9000, 11000]),
        "voc_r50_c4_24k": (24000, [18000, 22000]),
    }
    for name, (iterations, steps) in plans.items():
        cfg = read[name]
        assert (cfg.DETECTION.MAX_ITER, cfg.DETECTION.STEPS) == (iterations, steps)
        assert (cfg.OPTIM.NAME, cfg.OPTIM.BASE_LR, cfg.OPTIM.LR_BATCH) == ("sgd", 0.02, 16)
        assert (cfg.OPTIM.MOMENTUM, cfg.OPTIM.WEIGHT_DECAY) == (0.9, 1e-4)
        assert cfg.MODEL.RCNN.NORM == "sync"
        published = ("l1", "l1", True) if "c4" in name else ("smooth_l1", "smooth_l1", False)
        rcnn = cfg.MODEL.RCNN
        assert (rcnn.RPN_LOSS, rcnn.BOX_LOSS, rcnn.ALIGNED) == published
        assert cfg.OPTIM.EXCLUDE_RULE == ("norm_layers" if "c4" in name else "1d")
        assert cfg.MODEL.RCNN.MASKS is name.startswith("coco")
        assert cfg.DETECTION.MIN_SIZES == list(
            range(640 if name.startswith("coco") else 480, 801, 32)
        )
        assert (cfg.DETECTION.TEST_SIZE, cfg.DETECTION.MAX_SIZE) == (800, 1333)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_builds_a_detector(recipe: str) -> None:
    cfg = load_detection_config([str(RECIPES / f"{recipe}.yaml")], [], {})
    with torch.device("meta"):  # no memory for weights
        detector = build_detector(cfg, 3, None)
    assert isinstance(detector, Detector)


def test_the_rate_is_scaled_warmed_up_and_decays_by_iterations() -> None:
    cfg = load_detection_config([str(RECIPES / "voc_r50_c4_24k.yaml")], [], {})
    plan = iteration_plan(cfg.OPTIM, cfg.DETECTION, global_batch=8, section="DETECTION.")
    (rate,) = plan.rates
    assert (plan.total_steps, plan.epochs) == (24000, 3)
    assert rate.at(0) == pytest.approx(0.01 * 0.001)
    assert rate.at(50) == pytest.approx(0.01 * (0.5 + 0.0005))
    expected = {100: 0.01, 17999: 0.01, 18000: 0.001, 21999: 0.001, 22000: 0.0001, 23999: 0.0001}
    assert {step: rate.at(step) for step in expected} == pytest.approx(expected)


def test_a_warm_up_and_drops_after_the_end_are_told(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config("fpn", DETECTION__WARMUP_ITERS=20, DETECTION__STEPS=[50, 60, 70])
    for iterations in (60, 61, 90):
        cfg.defrost()
        cfg.DETECTION.MAX_ITER = iterations
        iteration_plan(cfg.OPTIM, cfg.DETECTION, global_batch=2, section="DETECTION.")
    assert [record.getMessage().split(" without")[0] for record in caplog.records] == [
        f"DETECTION.STEPS: {steps}: the training ends after {iterations} iterations,"
        for steps, iterations in (([60, 70], 60), ([70], 61))
    ]
    caplog.clear()
    cfg.DETECTION.MAX_ITER = 20
    iteration_plan(cfg.OPTIM, cfg.DETECTION, global_batch=2, schedule="poly", section="")
    (record,) = caplog.records
    assert "WARMUP_ITERS: 20 of 20 iterations" in record.getMessage()
    assert "e.g. 2" in record.getMessage()


def test_a_detector_is_what_the_engine_asks_for() -> None:
    detector = build_detector(config("fpn"), 3, None)
    assert isinstance(detector, Detector)
    detector.after_step(None)
