"""Detectron2's files: the converter's names, the published configurations, one line where it is absent."""

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from detection import train_net
from detection.convert_to_detectron2 import convert
from detection.defaults import load_detection_config
from models.parts.backbones import build_backbone
from models.weights.find import find_network
from utils.config import strict_yaml

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "detection" / "configs" / "detectron2"


# ---- conversion ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet50() -> dict[str, torch.Tensor]:
    return dict(build_backbone("resnet50").state_dict())


def moco(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return a checkpoint as MoCo v2 writes it: the encoder with its head, the key encoder, the queue."""
    head = {f"fc.{i}.{kind}": torch.randn(3) for i in (0, 2) for kind in ("weight", "bias")}
    encoder = {**state, **head}
    tensors = {f"module.encoder_q.{key}": t for key, t in encoder.items()}
    # small: it is not read
    tensors |= {f"module.encoder_k.{key}": torch.zeros(1) for key in encoder}
    return {
        "epoch": 1,
        "arch": "resnet50",
        "state_dict": {**tensors, "module.queue": torch.randn(2, 4)},
    }


def read(path: Path) -> Any:
    """Read the file with numpy as the only outsider, as Detectron2 needs it."""
    import pickle

    allowed = {"numpy._core.multiarray", "numpy._core.numeric", "numpy.core.multiarray", "numpy"}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            assert module in allowed, f"{module}.{name}: arrays and strings only"
            return super().find_class(module, name)

    with path.open("rb") as file:
        return Reader(file).load()


def expected_names() -> set[str]:
    """Write out Detectron2's names of R-50, with the counters and the head that MoCo's converter keeps."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"stem.conv1.weight", *(f"stem.conv1.norm.{part}" for part in norm)}
    names |= {f"stem.fc.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            convs = ["conv1", "conv2", "conv3"] + (["shortcut"] if block == 0 else [])
            for conv in convs:
                names |= {f"res{stage}.{block}.{conv}.weight"}
                names |= {f"res{stage}.{block}.{conv}.norm.{part}" for part in norm}
    return names


def test_moco_resnet50_gives_the_322_published_arrays(
    resnet50: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    checkpoint = moco(resnet50)
    assert find_network(checkpoint).place == "state_dict.module.encoder_q"
    torch.save(checkpoint, tmp_path / "moco.pth.tar")
    assert convert(tmp_path / "moco.pth.tar", tmp_path / "moco.pkl") == 322
    content = read(tmp_path / "moco.pkl")
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert (content["__author__"], content["matching_heuristics"]) == ("MOCO", True)
    model = content["model"]
    assert model.keys() == expected_names()
    assert all(isinstance(array, np.ndarray) for array in model.values())
    state = checkpoint["state_dict"]
    for ours, theirs in {
        "layer3.2.bn2.running_var": "res4.2.conv2.norm.running_var",
        "layer2.0.downsample.1.bias": "res3.0.shortcut.norm.bias",
        "layer4.0.downsample.0.weight": "res5.0.shortcut.weight",
        "bn1.weight": "stem.conv1.norm.weight",
    }.items():
        assert np.array_equal(model[theirs], state[f"module.encoder_q.{ours}"].numpy())


def test_our_own_checkpoint_converts_without_its_head(
    resnet50: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    ours = {f"online.backbone.{key}": t for key, t in resnet50.items()}
    torch.save(
        {"framework": {**ours, "online.projector.0.weight": torch.zeros(2)}}, tmp_path / "ours.pt"
    )
    names = expected_names() - {name for name in expected_names() if "fc" in name}
    assert convert(tmp_path / "ours.pt", tmp_path / "ours.pkl") == len(names) == 318
    assert read(tmp_path / "ours.pkl")["model"].keys() == names


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    torch.save(build_backbone("deit_tiny").state_dict(), tmp_path / "vit.pt")
    with pytest.raises(ValueError, match=r"vit\.pt.*no ResNet"):
        convert(tmp_path / "vit.pt", tmp_path / "vit.pkl")
    with pytest.raises(ValueError, match=r"\.pkl"):
        convert(tmp_path / "vit.pt", tmp_path / "vit.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["vit.pt"]


def test_the_converter_is_a_command(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "detection/convert_to_detectron2.py",
        tmp_path / "lost.pt",
        tmp_path / "x.pkl",
    ]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "lost.pt" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


# ---- configurations ------------------------------------------------------------------------------


def merged(name: str) -> dict[str, Any]:
    """Return a file over its bases, as flat keys."""
    tree = strict_yaml.load((CONFIGS / f"{name}.yaml").read_text())
    base = tree.pop("_BASE_", None)
    flat = dict(leaves(tree))
    return {**(merged(base.removesuffix(".yaml")) if base else {}), **flat}


def leaves(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_published_configurations_are_all_there() -> None:
    bases = [
        "coco_R_50_C4_1x",
        "coco_R_50_C4_2x",
        "pascal_voc_R_50_C4_12k",
        "pascal_voc_R_50_C4_24k",
    ]
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    wanted = {
        f"{base}{end}" for base in [*bases, "coco_R_50_FPN_1x"] for end in ("", "_moco", "_synco")
    }
    assert names == wanted | {"Base-RCNN-C4-BN", "Base-RCNN-FPN-BN", "coco_R_50_C4_2x_moco_resume"}


@pytest.mark.parametrize(
    ("name", "iterations", "steps"),
    [
        ("coco_R_50_C4_1x", 90000, [60000, 80000]),
        ("coco_R_50_C4_2x", 180000, [120000, 160000]),
        ("pascal_voc_R_50_C4_12k", 12000, [9000, 11000]),
        ("pascal_voc_R_50_C4_24k", 24000, [18000, 22000]),
    ],
)
@pytest.mark.parametrize("method", ["", "_moco", "_synco"])
def test_a_configuration_follows_the_published_table(
    name: str, iterations: int, steps: list[int], method: str
) -> None:
    keys, voc = merged(name + method), name.startswith("pascal")
    assert (keys["SOLVER.MAX_ITER"], keys["SOLVER.STEPS"]) == (iterations, steps)
    assert keys["DATASETS.TRAIN"] == (
        ["voc_2007_trainval", "voc_2012_trainval"] if voc else ["coco_2017_train"]
    )
    assert keys["DATASETS.TEST"] == (["voc_2007_test"] if voc else ["coco_2017_val"])
    assert keys["INPUT.MIN_SIZE_TRAIN"] == list(range(480 if voc else 640, 801, 32))
    assert keys["INPUT.MIN_SIZE_TEST"] == 800
    assert keys["MODEL.MASK_ON"] is not voc
    assert keys.get("MODEL.ROI_HEADS.NUM_CLASSES") == (20 if voc else None)
    assert keys.get("SOLVER.WARMUP_ITERS") == (100 if voc else None)
    assert {
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.NORM": "naiveSyncBN",
        "TEST.PRECISE_BN.ENABLED": True,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.02,
    }.items() <= keys.items()
    if method:
        assert keys["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
        assert keys["MODEL.PIXEL_STD"] == [58.395, 57.12, 57.375]
        assert (keys["INPUT.FORMAT"], keys["MODEL.RESNETS.STRIDE_IN_1X1"]) == ("RGB", False)
        assert keys["OUTPUT_DIR"].startswith(f"./output/{'voc' if voc else 'coco'}/")


def test_both_routes_build_the_same_pyramid_detector() -> None:
    theirs = merged("coco_R_50_FPN_1x")
    cfg = load_detection_config([str(CONFIGS.parent / "coco_r50_fpn_bn_1x.yaml")], [], {})
    ours = cfg.MODEL.RCNN
    convolutions, layers = (theirs[f"MODEL.ROI_BOX_HEAD.NUM_{part}"] for part in ("CONV", "FC"))
    assert ours.BOX_HEAD == f"{convolutions}conv{layers}fc"
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    assert {theirs[f"MODEL.{part}.NORM"] for part in parts} == {"naiveSyncBN"}
    assert (ours.NORM, ours.MASK_NORM, ours.MASKS) == ("sync", True, theirs["MODEL.MASK_ON"])
    rpn = {key.split(".")[-1]: value for key, value in theirs.items() if ".RPN." in key}
    assert ours.RPN_PRE_NMS == [rpn["PRE_NMS_TOPK_TRAIN"], rpn["PRE_NMS_TOPK_TEST"]]
    assert ours.RPN_POST_NMS == [rpn["POST_NMS_TOPK_TRAIN"], rpn["POST_NMS_TOPK_TEST"]]
    # Detectron2's defaults: ROIAlignV2 with adaptive samples, smooth L1 with a beta of 0
    assert not any("POOLER_TYPE" in key or "SMOOTH_L1" in key for key in theirs)
    assert (ours.ALIGNED, ours.RPN_LOSS, ours.BOX_LOSS) == (True, "l1", "l1")
    sizes = theirs["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert ours.ANCHOR_SIZES == [size for level in sizes for size in level]
    assert cfg.DETECTION.MIN_SIZES == theirs["INPUT.MIN_SIZE_TRAIN"]
    plan = (cfg.DETECTION.MAX_ITER, cfg.DETECTION.STEPS)
    assert plan == (theirs["SOLVER.MAX_ITER"], theirs["SOLVER.STEPS"])


def test_the_hand_made_resume_is_the_published_one() -> None:
    keys = merged("coco_R_50_C4_2x_moco_resume")
    assert (keys["SOLVER.MAX_ITER"], keys["SOLVER.WARMUP_FACTOR"], keys["SOLVER.BASE_LR"]) == (
        45000,
        0.0,
        0.01,
    )
    assert keys["SOLVER.STEPS"] == [120000, 160000]


# ---- the training script -------------------------------------------------------------------------


def test_without_detectron2_there_is_one_line_with_the_install_command() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*pip install [^\n]*detectron2[^\n]*\n", done.stderr)


BLOCKED = """
import sys
sys.modules["detectron2"] = None
from detection import train_net
train_net.run_main(train_net.main)
"""


class Registry(dict[str, Any]):
    def register(self, kind: Any) -> None:
        assert kind.__name__ not in self
        self[kind.__name__] = kind


def test_the_head_has_one_more_norm_after_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run against stand-ins of Detectron2's public names, since it does not install here."""

    class Res5ROIHeads:
        @classmethod
        def _build_res5_block(cls, cfg: Any) -> Any:
            return nn.Sequential(nn.Conv2d(3, 8, 1)), 8

    registry = Registry()
    modules = {
        "detectron2": {},
        "detectron2.layers": {"get_norm": lambda name, width: {"BN": nn.BatchNorm2d}[name](width)},
        "detectron2.modeling": {},
        "detectron2.modeling.roi_heads": {
            "ROI_HEADS_REGISTRY": registry,
            "Res5ROIHeads": Res5ROIHeads,
        },
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    train_net.register_heads()
    train_net.register_heads()
    cfg = types.SimpleNamespace(
        MODEL=types.SimpleNamespace(RESNETS=types.SimpleNamespace(NORM="BN"))
    )
    stage, channels = registry["Res5ROIHeadsExtraNorm"]._build_res5_block(cfg)
    assert [name for name, _ in stage.named_children()] == ["0", "norm"]
    assert (stage.norm.num_features, channels) == (8, 8)


def test_detectron2_is_imported_nowhere_else() -> None:
    rooms = ("models", "data", "utils", "tools", "detection")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")] + list(
        ROOT.glob("*.py")
    )
    pattern = re.compile(r"^\s*(from|import) detectron2", re.MULTILINE)
    assert [path.name for path in files if pattern.search(path.read_text())] == ["train_net.py"]
