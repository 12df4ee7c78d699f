"""Whole runs: killed and resumed to the same bits, on two processes, evaluated, drawn, and they learn."""

import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import runs
import shapes
from PIL import Image

from detection import pictures
from detection.sources.annotations import DetectionData, Objects

MAIN = "detection.main_detection"
VOC = {
    **{"DATA__DATASET": "voc", "DETECTION__CLASSES": ",".join(shapes.CLASSES)},
    **{"DETECTION__TRAIN_SPLIT": "2007_trainval", "DETECTION__TEST_SPLIT": "2007_test"},
    **{"DETECTION__MAX_ITER": 6, "DETECTION__EVAL_PERIOD": 3, "LOG__PICTURES": 2},
    **{"CHECKPOINT__EVERY_STEPS": 2, "MODEL__RCNN__NORM": "batch"},
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


def arguments(
    root: Path,
    output: Path,
    tag: str,
    *flags: str,
    batch: int = 2,
    weights: str = "none",
    **keys: Any,
) -> list[str]:
    """Return a command line; `keys` come last."""
    return [
        *("--data-path", str(root), "--output", str(output), "--tag", tag, "--device", "cpu"),
        *("--pretrained", weights, "--batch-size", str(batch), *flags),
        *("--opts", *shapes.opts(**{**VOC, **keys})),
    ]


@pytest.fixture(scope="module")
def whole(voc_root: Path, output: Path) -> Path:
    """Run to the end without a fault and return the folder."""
    jobs = forked.start(MAIN, arguments(voc_root, output, "whole"), output / "whole.log")
    assert jobs[0].wait() == 0, jobs[0].text()
    return output / "rcnn" / "whole"


def test_a_run_leaves_metrics_and_a_picture(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result.keys() == {"weights", "step", "AP", "AP50", "AP75", "AP50/area"}
    assert (result["weights"], result["step"]) == ("none", 6)
    assert runs.status(whole)["state"] == "done"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "AP50" in line] == [3, 6]
    assert {"loss_classifier", "loss_objectness", "grad_norm"} <= lines[0].keys()
    with Image.open(whole / "detections.png") as picture:
        assert picture.size == (2 * pictures.TILE, 2 * (pictures.TILE + pictures.BAND))


def test_a_picture_shows_the_truth_and_says_why_nothing_was_found(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "white").save(tmp_path / "a.png")
    box = np.array([[10.0, 10.0, 30.0, 30.0]], dtype=np.float32)
    objects = Objects(box, np.array([1]), np.zeros(1, dtype=bool))
    data = DetectionData((tmp_path / "a.png",), (0,), (objects,), ("cell",), (1,))
    item = {"index": 0, "label": 1, "box": box[0].tolist(), "score": 0.4}
    assert pictures.heading([item]) == "no detection above 0.5 (best score 0.40)"
    assert pictures.heading([]) == "no detection above 0.5 (best score 0.00)"
    assert pictures.heading([item, {**item, "score": 0.6}]) == "found: 1 above 0.5"
    drawn = []
    for score in (0.4, 0.6):
        pictures.draw_grid(data, [{**item, "score": score}], 5, tmp_path / "d.png")
        with Image.open(tmp_path / "d.png") as picture:
            # the left edge of the box, in the truth and in what was found
            x, y = 10 * pictures.TILE // 40, pictures.BAND + 20 * pictures.TILE // 40
            drawn.append([picture.getpixel((left + x, y)) for left in (0, pictures.TILE)])
    colour = drawn[0][0]
    assert colour != (255, 255, 255)
    assert drawn == [[colour, (255, 255, 255)], [colour, colour]]


def test_killed_and_resumed_ends_with_the_same_bits(
    voc_root: Path, output: Path, whole: Path
) -> None:
    argv = arguments(voc_root, output, "killed")
    (job,) = forked.start(MAIN, argv, output / "killed.log", prepare=partial(runs.kill_at, step=5))
    assert job.wait() == -signal.SIGKILL
    assert runs.steps_saved(output / "rcnn" / "killed")[-1] == 4
    (job,) = forked.start(MAIN, argv, output / "killed.log")
    assert job.wait() == 0, job.text()
    assert runs.resumed_at(job.text()) == 4
    assert runs.digest(output / "rcnn" / "killed") == runs.digest(whole)
    killed = json.loads((output / "rcnn" / "killed" / "result.json").read_text())
    assert killed == json.loads((whole / "result.json").read_text())


def test_an_optimiser_of_timm_trains_is_killed_and_goes_on(voc_root: Path, output: Path) -> None:
    keys = {"OPTIM__NAME": "timm/lamb", "DETECTION__EVAL_PERIOD": 0}
    argv = arguments(voc_root, output, "lamb", **keys)
    (job,) = forked.start(MAIN, argv, output / "lamb.log")
    assert job.wait() == 0, job.text()
    argv = arguments(voc_root, output, "lambs", **keys)
    (job,) = forked.start(MAIN, argv, output / "lambs.log", prepare=partial(runs.kill_at, step=5))
    assert job.wait() == -signal.SIGKILL
    (job,) = forked.start(MAIN, argv, output / "lambs.log")
    assert job.wait() == 0, job.text()
    assert runs.digest(output / "rcnn" / "lambs") == runs.digest(output / "rcnn" / "lamb")


def test_two_processes_train_and_one_finds_the_same_metrics(voc_root: Path, output: Path) -> None:
    """Five test images, so that the shares differ; synchronised norms."""
    changes = {"MODEL__RCNN__NORM": "sync", "DETECTION__TEST_SPLIT": "2007_test+2007_trainval"}
    argv = arguments(voc_root, output, "two", batch=1, **changes)
    jobs = forked.start(MAIN, argv, output / "two.log", ranks=2)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text()
    result = json.loads((output / "rcnn" / "two" / "result.json").read_text())
    argv = arguments(voc_root, output, "two", "--eval", batch=2, **changes)
    (job,) = forked.start(MAIN, argv, output / "eval.log")
    assert job.wait() == 0, job.text()
    found = dict(re.findall(r"([\w/]+) (\d+\.\d\d)", job.text().rsplit("trainval: ", 1)[1]))
    assert found == {key: f"{result[key]:.2f}" for key in ("AP", "AP50", "AP75", "AP50/area")}


@pytest.mark.parametrize(
    ("flags", "keys", "words"),
    [
        (["--data-path", "/nowhere"], {}, ["--data-path", "/nowhere"]),
        (["--pretrained", "/nowhere.pt"], {}, ["/nowhere.pt"]),
        (["--pretrained", ""], {}, ["--pretrained", "none"]),
        (["--epochs", "3"], {}, ["TRAIN.EPOCHS"]),
        (["--batch-size", "64"], {}, ["8 images", "BATCH_SIZE"]),
        (["--eval"], {}, ["--eval", "no checkpoint"]),
        ([], {"DETECTION__CLASSES": "square,disc"}, ["triangle", "DETECTION.CLASSES"]),
        ([], {"MODEL__BACKBONE__NAME": "resnet81"}, ["resnet81", "did you mean"]),
    ],
)
def test_an_error_is_one_line(
    voc_root: Path, output: Path, flags: list[str], keys: dict[str, Any], words: list[str]
) -> None:
    (job,) = forked.start(
        MAIN, arguments(voc_root, output, "bad", *flags, **keys), output / "bad.log"
    )
    assert job.wait() == 2
    (line,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line


def test_another_start_is_another_run(
    voc_root: Path, output: Path, whole: Path, tmp_path: Path
) -> None:
    import torch

    from models.parts.backbones import build_backbone

    torch.save(build_backbone("timm/test_resnet").state_dict(), tmp_path / "other.pt")
    argv = arguments(voc_root, output, "whole", weights=str(tmp_path / "other.pt"))
    (job,) = forked.start(MAIN, argv, output / "other.log")
    assert job.wait() == 2
    assert "other data" in job.text()
    (job,) = forked.start(
        MAIN, arguments(voc_root, output, "whole", MODEL__RCNN__NECK="c4"), output / "c4.log"
    )
    assert job.wait() == 2
    assert "MODEL.RCNN.NECK: 'fpn' -> 'c4'" in job.text()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_network_that_which_names_is_taken_and_in_the_result(
    voc_root: Path, output: Path, tmp_path: Path, which: str
) -> None:
    import torch

    from models.parts.backbones import build_backbone

    networks = {
        name: build_backbone("timm/test_resnet").state_dict() for name in ("student", "teacher")
    }
    torch.save(networks, tmp_path / "both.pt")
    tag = f"which-{which}"
    still = {"OPTIM__BASE_LR": 0.0, "OPTIM__WARMUP_LR": 0.0, "MODEL__RCNN__NORM": "frozen"}
    argv = arguments(
        *(voc_root, output, tag, "--which", which), weights=str(tmp_path / "both.pt"), **still
    )
    (job,) = forked.start(MAIN, argv, output / f"{tag}.log")
    assert job.wait() == 0, job.text()
    assert f"took {which}" in job.text()
    folder = output / "rcnn" / tag
    assert json.loads((folder / "result.json").read_text())["network"] == which
    other = "student" if which == "teacher" else "teacher"
    trained = [t for t in runs.final_state(folder)["framework"].values() if t.ndim == 4]
    name = next(name for name, tensor in networks[which].items() if tensor.ndim == 4)
    assert any(torch.equal(tensor, networks[which][name]) for tensor in trained)
    assert not any(torch.equal(tensor, networks[other][name]) for tensor in trained)


def test_the_coco_command_of_the_readme_runs(coco_root: Path, output: Path, tmp_path: Path) -> None:
    """Two iterations on a miniature of COCO's layout, with a tiny backbone and small images."""
    pytest.importorskip("faster_coco_eval")
    import torch

    from models.parts.backbones import build_backbone

    readme = (forked.ROOT / "detection" / "README.md").read_text().splitlines()
    recipe = "detection/configs/coco_swin_tiny_cascade_1x.yaml"
    (command,) = [line for line in readme if line.startswith("python ") and recipe in line.split()]
    torch.save(build_backbone("timm/test_resnet").state_dict(), tmp_path / "weights.pt")
    places = {recipe: forked.ROOT / recipe, "D": coco_root, "FILE": tmp_path / "weights.pt"}
    places |= {"O": output, "T": "readme"}
    small = shapes.opts(
        **{
            "DETECTION__CROP_SIZES": [64],
            "DETECTION__CROP_RANGE": [30, 60],
            "DETECTION__MAX_ITER": 2,
        },
        **{"DETECTION__EVAL_PERIOD": 0, "LOG__PRINT_FREQ": 1, "MODEL__RCNN__SCORE_THRESH": 0.0},
        **{"OPTIM__BASE_LR": None, "OPTIM__WARMUP_LR": None, "OPTIM__LR_BATCH": None},
    )
    argv = [str(places.get(word, word)) for word in command.split()[2:]]
    argv += ["--device", "cpu", "--opts", *small]
    (job,) = forked.start(MAIN, argv, output / "readme.log")
    assert job.wait() == 0, job.text()
    folder = output / "coco_swin_tiny_cascade_1x" / "readme"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {f"loss_mask/{stage}" for stage in (1, 2, 3)} <= lines[0].keys()
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] == 2
    assert {"AP", "AP50", "mask/AP", "mask/AP50"} <= result.keys()


# ---- minutes -------------------------------------------------------------------------------------

LEARN = {
    **{"DETECTION__MAX_ITER": 150, "DETECTION__EVAL_PERIOD": 0, "DETECTION__STEPS": [120]},
    **{"DETECTION__WARMUP_ITERS": 10, "OPTIM__CLIP_GRAD": 10.0, "CHECKPOINT__EVERY_STEPS": 0},
}


KINDS = {  # what to change, and the AP50 of boxes and masks that it has to pass
    "fpn": ({"MODEL__BACKBONE__NAME": "resnet18"}, 90),
    "cascade": (
        {
            "MODEL__BACKBONE__NAME": "resnet18",
            "MODEL__RCNN__CASCADE": [0.5, 0.6, 0.7],
            "MODEL__RCNN__BOX_HEAD": "4conv1fc",
            "MODEL__RCNN__BOX_LOSS": "giou",
            "MODEL__RCNN__ALIGNED": True,
            "DETECTION__MAX_ITER": 250,
            "DETECTION__STEPS": [200],
        },
        90,
    ),
    # stride 16 from random weights needs far longer: it has to be well on its way
    "c4": (
        {"MODEL__RCNN__ROI_BATCH": 16, "DETECTION__MAX_ITER": 300, "DETECTION__STEPS": [250]},
        40,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("neck", KINDS)
def test_a_handful_of_images_is_learned_by_heart(coco_root: Path, output: Path, neck: str) -> None:
    pytest.importorskip("faster_coco_eval")
    changes, least = KINDS[neck]
    keys = {**LEARN, **changes, "MODEL__RCNN__MASKS": True}
    keys["MODEL__RCNN__NECK"] = "c4" if neck == "c4" else "fpn"
    keys |= {"DATA__DATASET": "coco", "DETECTION__CLASSES": None}
    keys |= {"DETECTION__TRAIN_SPLIT": "train2017", "DETECTION__TEST_SPLIT": "train2017"}
    (job,) = forked.start(
        MAIN, arguments(coco_root, output, neck, batch=4, **keys), output / f"{neck}.log"
    )
    assert job.wait(limit=1800) == 0, job.text()
    result = json.loads((output / "rcnn" / neck / "result.json").read_text())
    assert result["AP50"] > least
    assert result["mask/AP50"] > least


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "root"),
    [("mini_coco", "coco_mini"), ("mini_coco_cascade", "coco_mini"), ("mini_bccd", "")],
)
def test_the_recipes_of_the_packs_run(packs: Path, output: Path, name: str, root: str) -> None:
    if root:
        pytest.importorskip("faster_coco_eval")
    cfg = str(forked.ROOT / "detection" / "configs" / f"{name}.yaml")
    argv = [
        "--cfg",
        cfg,
        "--data-path",
        str(packs / root),
        "--pretrained",
        "none",
        "--output",
        str(output),
    ]
    argv += [
        "--opts",
        "DETECTION.MAX_ITER",
        "20",
        "DETECTION.EVAL_PERIOD",
        "0",
        "LOG.TENSORBOARD",
        "False",
    ]
    (job,) = forked.start(MAIN, argv, output / f"{name}.log")
    assert job.wait(limit=1800) == 0, job.text()
    lines = (output / name / "default" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert losses[-1] < losses[0]
