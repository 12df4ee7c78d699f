"""The closing summary of a run: best value and its epoch, weights, and a command that works."""

import argparse
import json
import logging
import math
from pathlib import Path

import pytest
import runs
import torch
from PIL import Image
from torch import nn

from engine.plan import Plan
from engine.run import Run
from engine.state import TrainState
from main_pretrain import next_commands
from models import framework_options
from utils.checkpoints import file as checkpoint
from utils.cli.closing import best_text, command, epoch_of, watched
from utils.config.schema import declare
from utils.schedules import LearningRate


def test_the_watched_value_is_keep_best_else_the_highest_top1_else_the_first() -> None:
    best = {"knn10_top1": 80.0, "knn20_top1": 81.0, "knn10_top5": 99.0, "lr3/top1": 90.0}
    assert watched(best, "") == "knn20_top1"
    assert watched(best, "knn10_top5") == "knn10_top5"
    assert watched({"AP": 3.0, "AP50": 9.0}, "") == "AP"
    assert watched({}, "") == ""


def test_the_epoch_of_the_best_value_is_the_first_that_reached_it(tmp_path: Path) -> None:
    assert math.isnan(epoch_of(tmp_path, "top1", 81.25))
    rows = [{"loss": 2.0}, {"top1": 80.0, "epoch": 1}, {"top1": 81.25, "epoch": 2}]
    rows += [{"top1": 81.25, "epoch": 3}, {"top1": 79.0, "epoch": 4}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert best_text(tmp_path, {"top1": 81.25}, "") == "top1 81.25 after epoch 2"
    assert best_text(tmp_path, {"top1": 81.5}, "") == "top1 81.50"
    assert best_text(tmp_path, {}, "") == ""


def test_the_next_command_carries_run_data_and_backbone_but_not_the_pretraining() -> None:
    args = argparse.Namespace(
        cfg="configs/demo.yaml",
        opts=["DATA.IMG_SIZE=32", "OPTIM.BASE_LR", "0.1", "MODEL.BACKBONE.STEM", "cifar"],
    )
    flags = {"OUTPUT": "my runs", "TAG": "t", "TRAIN.BATCH_SIZE": 8, "DATA.DATASET": "zip"}
    assert command("main_linear.py", args, flags) == (
        "python main_linear.py --cfg configs/demo.yaml --output 'my runs' --tag t --dataset zip "
        "--opts DATA.IMG_SIZE=32 MODEL.BACKBONE.STEM=cifar"
    )
    flags["DATA.DATASET"] = "cifar10"
    assert "--dataset cifar10" in command("main_linear.py", args, flags)


def complete(folder: Path, keep_best: str = "") -> tuple[Run, TrainState, Plan]:
    """Return a run of one step whose last checkpoint is saved, and which has its lock."""
    cfg = declare(framework_options()).defaults()
    cfg.CHECKPOINT.KEEP_BEST = keep_best
    run = Run(cfg, folder, torch.device("cpu"))
    run.open_folder()
    module = nn.Linear(1, 1)
    state = TrainState(module, torch.optim.SGD(module.parameters(), 0.1), module)
    rate = LearningRate("cosine", 0.1, 0.0, 0.0, 0, 1, 1)
    plan = Plan(1, 1, 8, 1, 0.0, (rate,))
    if not run.resume(state, plan):
        with run.reporting(state, plan):
            state.step = 1
            run.checkpoint(state, plan)
            run.checkpoints.evaluated(state, plan, {"knn10_top1": 50.0})
            run.done(state)
    return run, state, plan


def test_a_complete_run_says_what_it_gave_and_a_second_start_when_it_did(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="synco"):
        run, *_ = complete(tmp_path, "knn10_top1")
    weights = checkpoint.path_of(tmp_path, 1)
    assert "done in 0:00:0" in caplog.text
    assert "best          knn10_top1 50.00 after epoch 1" in caplog.text
    assert f"weights       {weights}" in caplog.text
    assert f"best weights  {weights}" in caplog.text
    run.close()
    status = runs.status(tmp_path)
    caplog.clear()
    run, state, plan = complete(tmp_path, "knn10_top1")
    run.next_commands = ["python one.py", "python two.py"]
    with caplog.at_level(logging.INFO, logger="synco"), run.reporting(state, plan):
        run.done(state)
    run.close()
    assert f"this run is complete: done {status['time']}, at step 1" in caplog.text
    assert "next          python one.py" in caplog.text
    assert runs.status(tmp_path) == status  # who asks later reads when it was completed


def test_a_hash_is_short_and_a_small_head_has_a_number_of_parameters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, _, plan = complete(tmp_path)
    run.fingerprint = f"weights {'0d697c7b2741' * 5}0000, data 4000:227fc1a1ea60"
    with caplog.at_level(logging.INFO, logger="synco"):
        run.describe(nn.Linear(10, 3), plan, 4000)
    run.close()
    assert "Linear with 33 trained parameters" in caplog.text
    assert "(weights 0d697c7b2741, data 4000:227fc1a1ea60)" in caplog.text


def test_pictures_and_configuration_of_a_run_are_in_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, *_ = complete(tmp_path)
    run.write_extra("views.png", lambda path: Image.new("RGB", (2, 2)).save(path))
    run.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == ["pictures/views"]
    assert b"KEEP_BEST" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_run_without_labels_is_not_told_to_probe() -> None:
    args = argparse.Namespace(cfg="configs/own_images.yaml", opts=[])
    labelled = next_commands(args, {}, Path("o/own_images/a b"), True)
    assert labelled[0].startswith("python main_linear.py --cfg")
    unlabelled = next_commands(args, {}, Path("o/own_images/a b"), False)
    assert unlabelled == [
        "python tools/convert.py export 'o/own_images/a b' --to timm --output backbone.pth",
        "python tools/report.py 'o/own_images/a b'",
    ]
