"""Evaluations and log lines across a kill: the files of a resumed run are those of an uninterrupted one."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs

from utils.checkpoints import file as checkpoint
from utils.checkpoints import folder as retention

KEYS: dict[str, Any] = {
    "TRAIN__EPOCHS": 3,
    "KNN__EVERY_EPOCHS": 1,
    "KNN__K": (5,),
    "CHECKPOINT__EVERY_STEPS": 3,
    "CHECKPOINT__KEEP_BEST": "knn5_top1",
    "LOG__PRINT_FREQ": 5,  # no divisor of the steps between checkpoints
}


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the pace."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in runs.CLOCK} for line in lines]


def records(folder: Path) -> dict[str, Any]:
    kept = {}
    for path in checkpoint.committed(folder):
        record = checkpoint.read_record(path)
        kept[path.name] = (record["evaluated"], record["best"])
    return kept


def kill_in_evaluation(rank: int, *, epoch: int, where: str) -> None:
    """SIGKILL before the evaluation after an epoch, or just before its result is noted or logged."""
    from engine import meter
    from engine.checkpointing import Checkpoints

    owner, name = {
        "before": (Checkpoints, "evaluated"),
        "noting": (Checkpoints, "_note_evaluation"),
        "logging": (meter.Meter, "record"),
    }[where]
    original, count = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if rank == 0 and count == epoch:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def fail_to_evaluate(rank: int) -> None:
    from pretraining import evaluations

    def fails(*_: Any) -> None:
        raise ValueError("a validation image cannot be read")

    evaluations.features_knn = fails


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert forked.run("main_pretrain", runs.arguments("moby", root, "w", **KEYS), root / "log") == [
        0
    ]
    return root / "moby" / "w"


@pytest.mark.parametrize("where", ["before", "noting", "logging"])
def test_a_kill_around_an_evaluation_changes_no_file(
    where: str, whole: Path, tmp_path: Path
) -> None:
    argv, folder = runs.arguments("moby", tmp_path, "k", **KEYS), tmp_path / "moby" / "k"
    fault = partial(kill_in_evaluation, epoch=2, where=where)
    assert forked.run("main_pretrain", argv, tmp_path / "log", prepare=fault) == [-signal.SIGKILL]
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]
    assert runs.digest(folder) == runs.digest(whole)
    assert rows(folder) == rows(whole)
    # the checkpoint that the run resumed from stays too
    assert records(folder).items() >= records(whole).items()


def test_the_first_line_after_a_resume_has_the_mean_of_the_whole_window(
    whole: Path, tmp_path: Path
) -> None:
    argv, folder = runs.arguments("moby", tmp_path, "k", **KEYS), tmp_path / "moby" / "k"
    for step in (4, 8, 14):  # the checkpoints of 3, 6 and 12 lie inside windows of five
        fault = partial(runs.kill_at, step=step)
        assert forked.run("main_pretrain", argv, tmp_path / "log", prepare=fault) == [
            -signal.SIGKILL
        ]
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]
    assert rows(folder) == rows(whole)


def test_the_windows_of_two_ranks_are_kept_apart(tmp_path: Path) -> None:
    found = []
    for tag, steps in (("whole", ()), ("killed", (4,))):
        argv = runs.arguments("moby", tmp_path, tag, world=2, **KEYS)
        for step in steps:
            fault = partial(runs.kill_at, step=step)
            forked.run("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=fault)
        assert forked.run("main_pretrain", argv, tmp_path / "log", ranks=2) == [0, 0]
        found.append(rows(tmp_path / "moby" / tag))
    assert found[0] == found[1]


def test_an_evaluation_that_fails_costs_no_epoch(whole: Path, tmp_path: Path) -> None:
    argv, folder = runs.arguments("moby", tmp_path, "f", **KEYS), tmp_path / "moby" / "f"
    assert forked.run("main_pretrain", argv, tmp_path / "log", prepare=fail_to_evaluate) == [2]
    # the epoch is saved although its evaluation failed
    assert runs.steps_saved(folder)[-1] == runs.STEPS
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]
    assert rows(folder) == rows(whole)
    # the checkpoint that the run resumed from stays too
    assert records(folder).items() >= records(whole).items()


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_while_later_checkpoints_are_set_aside_loses_none(
    call: int, before: bool, tmp_path: Path
) -> None:
    import torch

    for step in (1, 2, 3):
        checkpoint.save(
            tmp_path, step, {"w": torch.full((3,), float(step))}, meta={"evaluated": {}}
        )
    pid = os.fork()
    if pid == 0:
        count, real = 0, os.replace

        def replace(*args: Any) -> None:
            nonlocal count
            if before and count == call:
                os._exit(9)
            real(*args)
            if count == call:
                os._exit(9)
            count += 1

        os.replace = replace
        retention.set_aside(tmp_path, after=1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    found = checkpoint.newest_valid(tmp_path)
    assert found is not None
    retention.set_aside(tmp_path, after=1)  # the same command again
    retention.prune(tmp_path, keep_last=2)
    aside = tmp_path / "set_aside"
    for step in (2, 3):
        state = checkpoint.load(aside / f"ckpt_{step:08d}.pt")
        assert state["w"][0] == step
        assert checkpoint.is_valid(aside / f"ckpt_{step:08d}.pt")
    assert runs.steps_saved(tmp_path) == [1]


def test_a_run_that_ends_within_an_epoch_saves_and_evaluates_its_last_step(tmp_path: Path) -> None:
    """TRAIN.STEPS: 15 steps of 11 an epoch, killed before and after its only whole epoch."""
    keys = {**KEYS, "TRAIN__STEPS": 15, "KNN__EVERY_EPOCHS": 4, "CHECKPOINT__EVERY_STEPS": 4}
    argv, whole = runs.arguments("moby", tmp_path, "w", **keys), tmp_path / "moby" / "w"
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]
    assert runs.outcome(whole)[:2] == ("done", 15)
    assert runs.steps_saved(whole)[-1] == 15
    text = (whole / "log.txt").read_text()
    assert "15 steps = 1.364 epochs of 11 steps" in text
    assert "epoch 1.364 done" in text
    # the rate has come down: its schedule ends with the run
    lines = rows(whole)
    assert [line["step"] for line in lines if "knn5_top1" in line] == [15]
    assert lines[-2]["lr"] < 0.2 * max(line["lr"] for line in lines if "lr" in line)

    argv, folder = runs.arguments("moby", tmp_path, "k", **keys), tmp_path / "moby" / "k"
    for step in (6, 13):
        fault = partial(runs.kill_at, step=step)
        assert forked.run("main_pretrain", argv, tmp_path / "log", prepare=fault) == [
            -signal.SIGKILL
        ]
    fault = partial(kill_in_evaluation, epoch=1, where="logging")
    assert forked.run("main_pretrain", argv, tmp_path / "log", prepare=fault) == [-signal.SIGKILL]
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]
    assert runs.digest(folder) == runs.digest(whole)
    assert rows(folder) == rows(whole)
