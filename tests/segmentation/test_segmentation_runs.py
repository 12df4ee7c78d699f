"""Whole runs: killed and resumed to the same bits, two processes like one, evaluated, drawn, and they learn."""

import json
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import scenes
import torch
from PIL import Image

MAIN = "segmentation.main_segmentation"
CONFIGS = forked.ROOT / "segmentation" / "configs"
TINY = {
    **{"DATA__DATASET": "folders", "DATA__NUM_WORKERS": 0, "LOG__TENSORBOARD": False},
    **{"SEGMENTATION__TRAIN_SPLIT": "train", "SEGMENTATION__TEST_SPLIT": "val"},
    **{"MODEL__BACKBONE__NAME": "timm/test_resnet", "MODEL__SEGMENTER__NORM": "batch"},
    **{"MODEL__SEGMENTER__WIDTH": 8, "MODEL__SEGMENTER__AUX_WIDTH": 8, "OPTIM__BASE_LR": 0.01},
    **{"SEGMENTATION__SCALE": [128, 40], "SEGMENTATION__CROP": [32, 32]},
    **{"SEGMENTATION__MAX_ITER": 6, "SEGMENTATION__EVAL_PERIOD": 3, "LOG__PICTURES": 2},
    **{"SEGMENTATION__WARMUP_ITERS": 2, "CHECKPOINT__EVERY_STEPS": 2, "LOG__PRINT_FREQ": 1},
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


def opts(**keys: Any) -> list[str]:
    return [
        f"{key.replace('__', '.')}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in keys.items()
    ]


def arguments(
    root: Path,
    output: Path,
    tag: str,
    *flags: str,
    batch: int = 4,
    weights: str = "none",
    **keys: Any,
) -> list[str]:
    """Return a command line; `keys` come last."""
    return [
        *("--data-path", str(root), "--output", str(output), "--tag", tag, "--device", "cpu"),
        *("--pretrained", weights, "--batch-size", str(batch), *flags),
        *("--opts", *opts(**{**TINY, **keys})),
    ]


def run(argv: list[str], log: Path, **how: Any) -> Any:
    """Run to the end on one process."""
    (job,) = forked.start(MAIN, argv, log, **how)
    assert job.wait() == 0, job.text()
    return job


@pytest.fixture(scope="module")
def whole(pairs_root: Path, output: Path) -> Path:
    run(arguments(pairs_root, output, "whole"), output / "whole.log")
    return output / "segmenter" / "whole"


def test_a_run_leaves_metrics_and_a_picture(whole: Path) -> None:
    result = json.loads((whole / "result.json").read_text())
    assert result.keys() == {"weights", "step", "mIoU", "mAcc", "aAcc", "iou"}
    assert (result["weights"], result["step"]) == ("none", 6)
    assert list(result["iou"]) == list(scenes.CLASSES)
    known = [value for value in result["iou"].values() if value is not None]
    assert result["mIoU"] == pytest.approx(sum(known) / len(known))
    assert runs.status(whole)["state"] == "done"
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "mIoU" in line] == [3, 6]
    assert {"loss_decode", "loss_auxiliary", "grad_norm"} <= lines[0].keys()
    with Image.open(whole / "segmentation.png") as picture:
        assert picture.size == (3 * 256, 2 * 192)


def test_killed_and_resumed_ends_with_the_same_bits(
    pairs_root: Path, output: Path, whole: Path
) -> None:
    argv = arguments(pairs_root, output, "killed")
    (job,) = forked.start(MAIN, argv, output / "killed.log", prepare=partial(runs.kill_at, step=5))
    assert job.wait() == -signal.SIGKILL
    assert runs.steps_saved(output / "segmenter" / "killed")[-1] == 4
    job = run(argv, output / "killed.log")
    assert runs.resumed_at(job.text()) == 4
    assert runs.digest(output / "segmenter" / "killed") == runs.digest(whole)
    killed = json.loads((output / "segmenter" / "killed" / "result.json").read_text())
    assert killed == json.loads((whole / "result.json").read_text())


@pytest.mark.parametrize("over", ["all", "labelled"])
def test_two_processes_train_like_one(pairs_root: Path, output: Path, over: str) -> None:
    """Draws of dropout are each process's own, so there is none."""
    keys = {"MODEL__SEGMENTER__NORM": "sync", "MODEL__SEGMENTER__DROPOUT": 0.0}
    keys |= {"SEGMENTATION__MAX_ITER": 3, "MODEL__SEGMENTER__LOSS_OVER": over}
    # only the things have a class: many more pixels in one image than in another
    keys |= {"SEGMENTATION__LABEL_MAP": "0:255,1:1,2:2"}
    run(arguments(pairs_root, output, f"one_{over}", **keys), output / "one.log")
    argv = arguments(pairs_root, output, f"two_{over}", batch=2, **keys)
    jobs = forked.start(MAIN, argv, output / "two.log", ranks=2)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text()
    one, two = (runs.final_state(output / "segmenter" / f"{n}_{over}") for n in ("one", "two"))
    for name, tensor in one["framework"].items():
        torch.testing.assert_close(two["framework"][name], tensor, rtol=1e-3, atol=1e-4)


def test_one_process_finds_the_metrics_of_two_and_more_scales_beside_them(
    pairs_root: Path, output: Path
) -> None:
    """Nine test images, so that the shares differ."""
    for number in range(9):
        names = (pairs_root / kind / "nine" / f"{number}.png" for kind in ("images", "labels"))
        scenes.write(*names, number)
    keys = {"MODEL__SEGMENTER__NORM": "sync", "SEGMENTATION__RATIOS": [0.75, 1.5]}
    keys |= {"SEGMENTATION__TEST_SPLIT": "nine", "SEGMENTATION__MAX_ITER": 3}
    argv = arguments(pairs_root, output, "judged", "--multi-scale", batch=2, **keys)
    jobs = forked.start(MAIN, argv, output / "judged.log", ranks=2)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text()
    result = json.loads((output / "segmenter" / "judged" / "result.json").read_text())
    argv = arguments(pairs_root, output, "judged", "--eval", "--multi-scale", batch=4, **keys)
    job = run(argv, output / "eval.log")
    found = dict(re.findall(r"([\w/]+) (\d+\.\d\d)", job.text().rsplit("nine: ", 1)[1]))
    names = [f"{prefix}{name}" for prefix in ("", "ms/") for name in ("mIoU", "mAcc", "aAcc")]
    assert found == {name: f"{result[name]:.2f}" for name in names}
    assert list(result["ms/iou"]) == list(scenes.CLASSES)


def test_a_whole_segmenter_is_judged_as_it_is(pairs_root: Path, output: Path, whole: Path) -> None:
    file = str(next(whole.glob("ckpt_*6.pt")))
    flags = ("--whole", "--eval")
    job = run(arguments(pairs_root, output, "as_is", *flags, weights=file), output / "as_is.log")
    result = json.loads((whole / "result.json").read_text())
    assert f"val: mIoU {result['mIoU']:.2f}, mAcc {result['mAcc']:.2f}" in job.text()
    # and its backbone alone is no segmenter
    argv = arguments(pairs_root, output, "alone", "--eval", weights=file)
    (job,) = forked.start(MAIN, argv, output / "alone.log")
    assert job.wait() == 2
    assert "holds no checkpoint" in job.text()


def test_several_rates_learn_in_one_pass(pairs_root: Path, output: Path) -> None:
    keys = {
        **{"MODEL__SEGMENTER__HEAD": "linear", "MODEL__SEGMENTER__FREEZE": True},
        **{"MODEL__SEGMENTER__AUX_WEIGHT": 0, "SEGMENTATION__LRS": [1e-9, 0.1]},
    }
    run(arguments(pairs_root, output, "grid", **keys), output / "grid.log")
    result = json.loads((output / "segmenter" / "grid" / "result.json").read_text())
    assert result["mIoU"] == max(result["mIoU/lr1e-09"], result["mIoU/lr0.1"])
    assert result["best_lr"] in (1e-9, 0.1)
    state = runs.final_state(output / "segmenter" / "grid")["framework"]
    still, moved = (state[f"decode_head.heads.{n}.conv_seg.bias"] for n in (0, 1))
    assert float(still.abs().max()) < 1e-6 < float(moved.abs().max())


@pytest.mark.parametrize(
    ("flags", "keys", "words"),
    [
        (["--data-path", "/nowhere"], {}, ["--data-path", "/nowhere"]),
        (["--pretrained", "/nowhere.pt"], {}, ["/nowhere.pt"]),
        (["--pretrained", ""], {}, ["--pretrained", "none"]),
        (["--batch-size", "64"], {}, ["8 images", "BATCH_SIZE"]),
        (["--batch-size", "1"], {}, ["--batch-size", "at least 2 images"]),
        (["--eval"], {}, ["--eval", "no checkpoint"]),
        (["--whole"], {}, ["--whole", "name a file"]),
        ([], {"MODEL__BACKBONE__NAME": "resnet81"}, ["resnet81", "did you mean"]),
        ([], {"SEGMENTATION__TEST_SPLIT": "test"}, ["test"]),
    ],
)
def test_an_error_is_one_line(
    pairs_root: Path, output: Path, flags: list[str], keys: dict[str, Any], words: list[str]
) -> None:
    argv = arguments(pairs_root, output, "bad", *flags, **keys)
    (job,) = forked.start(MAIN, argv, output / "bad.log")
    assert job.wait() == 2, job.text()
    (line,) = [line for line in job.text().splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line


def test_another_start_is_another_run(pairs_root: Path, output: Path, whole: Path) -> None:
    argv = arguments(pairs_root, output, "whole", MODEL__SEGMENTER__HEAD="fcn")
    (job,) = forked.start(MAIN, argv, output / "fcn.log")
    assert job.wait() == 2
    assert "MODEL.SEGMENTER.HEAD: 'upernet' -> 'fcn'" in job.text()


# ---- the recipes of the public data sets, two iterations on a miniature of their layout ----------


def ade20k(root: Path) -> Path:
    for split, first in (("training", 0), ("validation", 50)):
        for number in range(first, first + 4):
            scenes.write(
                root / "images" / split / f"ADE_{number}.jpg",
                root / "annotations" / split / f"ADE_{number}.png",
                number,
            )
    return root


SHRUNK = {
    **{"SEGMENTATION__MAX_ITER": 2, "SEGMENTATION__EVAL_PERIOD": 0, "DATA__NUM_WORKERS": 0},
    **{"SEGMENTATION__SCALE": [128, 64], "SEGMENTATION__CROP": [64, 64], "LOG__PICTURES": 1},
    **{"MODEL__SEGMENTER__WIDTH": 16, "SEGMENTATION__STRIDE": [40, 40], "DATA__IMG_SIZE": 32},
    **{"LOG__TENSORBOARD": False},
}


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("ade20k_upernet_swin_tiny", {}),
        ("ade20k_upernet_vit_small", {"MODEL__BACKBONE__NAME": "deit_tiny"}),
        ("ade20k_linear_deit_small", {"MODEL__BACKBONE__NAME": "deit_tiny"}),
        pytest.param("ade20k_upernet_resnet50", {}, marks=pytest.mark.slow),
    ],
)
def test_the_commands_for_ade20k_run(
    recipe: str, keys: dict[str, Any], tmp_path: Path, output: Path
) -> None:
    argv = [
        *("--cfg", str(CONFIGS / f"{recipe}.yaml"), "--data-path", str(ade20k(tmp_path))),
        *("--pretrained", "none", "--output", str(output), "--device", "cpu"),
        *("--opts", *opts(**{**SHRUNK, **keys})),
    ]
    run(argv, output / f"{recipe}.log")
    result = json.loads((output / recipe / "default" / "result.json").read_text())
    assert (result["step"], len(result["iou"])) == (2, 150)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "root", "least"),
    [("mini_pets", "pets", 45), ("mini_ade", "ade", 0), ("mini_voc", "", 0)],
)
def test_the_recipes_of_the_pack_run(
    pack: Path, output: Path, recipe: str, root: str, least: float
) -> None:
    argv = [
        *("--cfg", str(CONFIGS / f"{recipe}.yaml"), "--data-path", str(pack / root)),
        *("--pretrained", "none", "--output", str(output), "--device", "cpu"),
    ]
    (job,) = forked.start(MAIN, argv, output / f"{recipe}.log")
    assert job.wait(limit=1800) == 0, job.text()
    result = json.loads((output / recipe / "default" / "result.json").read_text())
    assert result["mIoU"] > least


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart(pairs_root: Path, output: Path) -> None:
    keys = {
        **{"SEGMENTATION__TEST_SPLIT": "train", "SEGMENTATION__MAX_ITER": 300},
        **{"SEGMENTATION__EVAL_PERIOD": 100, "SEGMENTATION__WARMUP_ITERS": 20},
        **{"MODEL__BACKBONE__NAME": "resnet18", "MODEL__SEGMENTER__WIDTH": 32},
        **{"OPTIM__NAME": "adamw", "OPTIM__BASE_LR": 0.004, "SEGMENTATION__PHOTOMETRIC": False},
        **{"SEGMENTATION__RATIO_RANGE": [1.0, 1.0], "SEGMENTATION__SCALE": [192, 144]},
        **{"SEGMENTATION__CROP": [144, 192], "CHECKPOINT__EVERY_STEPS": 0},
        **{"SEGMENTATION__CAT_MAX_RATIO": 1.0, "LOG__PRINT_FREQ": 50},
    }
    (job,) = forked.start(MAIN, arguments(pairs_root, output, "heart", **keys), output / "h.log")
    assert job.wait(limit=1800) == 0, job.text()
    result = json.loads((output / "segmenter" / "heart" / "result.json").read_text())
    assert result["mIoU"] > 95
