"""A run that stops on a number that is not finite keeps its batch, and ``--replay`` finds the cause."""

import os
import re
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch

from utils.checkpoints import file as checkpoint

SMALL_VIT = {"MODEL__BACKBONE__PATCH_SIZE": 4, "CHECKPOINT__EVERY_STEPS": 0}


def spoil_an_image(
    rank: int, *, step: int, ranks: tuple[int, ...] = (0, 1), where: int = 3
) -> None:
    """Put a NaN into one image of a step's second view."""
    from data import loader

    make = loader.GlobalLoader._resident_batch

    def wrapper(self: Any, request: Any, images: Any) -> Any:
        batch = make(self, request, images)
        if request.step == step:
            batch.views[1][where, 0, 0, 0] = float("nan")
        return batch

    if rank in ranks:
        loader.GlobalLoader._resident_batch = wrapper


def spoil_a_weight(rank: int, *, step: int, value: float) -> None:
    """Set one weight of the online projector before a step."""
    from engine import loop as engine

    original = engine.forward_and_backward

    def wrapper(state: Any, batches: Any, function: Any, progress: Any) -> Any:
        if progress.step == step:
            weight = dict(state.module.named_parameters())["online.backbone.layer1.0.conv1.weight"]
            weight.data[0, 0, 0, 0] = value
        return original(state, batches, function, progress)

    engine.forward_and_backward = wrapper


def disk_full_at(rank: int, *, step: int) -> None:
    spoil_an_image(rank, step=step)
    runs.at_step(
        step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    )


def stop(tmp_path: Path, prepare: Any, ranks: int = 1, **keys: Any) -> tuple[Path, str]:
    """Run to the stop; return the folder and what rank 0 said."""
    argv = runs.arguments("moby", tmp_path, "t", world=ranks, **keys)
    jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=ranks, prepare=prepare)
    assert [job.wait() for job in jobs] == [3] * ranks, jobs[0].text()
    assert all("Traceback" not in job.text() for job in jobs)
    return tmp_path / "moby" / "t", jobs[0].text()


def replayed(tmp_path: Path, file: Path, *flags: str) -> str:
    (job,) = forked.start(
        "main_pretrain", ["--replay", str(file), "--device", "cpu", *flags], tmp_path / "re"
    )
    assert job.wait() == 0, job.text()
    return job.text()


def test_an_image_that_is_not_finite_is_found(tmp_path: Path) -> None:
    folder, text = stop(tmp_path, partial(spoil_an_image, step=4))
    file = folder / "nonfinite_00000004.pt"
    assert f"--replay {file}" in text
    kept = checkpoint.load(file)
    index = int(kept["parts"][0]["indices"][0][3])
    before = runs.final_state(folder)
    assert before["step"] == 3
    # the weights are those of step 4 before its update: another step than the checkpoint's, and
    # finite
    weights = {name: value for name, value in kept["framework"].items() if "running_" not in name}
    assert all(torch.isfinite(value).all() for value in weights.values())
    name = "online.backbone.conv1.weight"
    assert not torch.equal(kept["framework"][name], before["framework"][name])
    listing = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    text = replayed(tmp_path, file)
    assert re.search(rf"NOT FINITE in the input: samples {index}\b", text)
    assert re.search(
        r"fp32: loss nan; the first output that is not finite is that of online\.backbone\.conv1 \(Conv2d\): "
        rf"\d+ of \d+ values, whose input is already not finite; samples {index}\b",
        text,
    )
    assert f"the images are to blame, not the network: look at samples {index} " in text
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == listing  # it only looks


def test_a_weight_that_is_not_finite_is_found(tmp_path: Path) -> None:
    folder, _ = stop(tmp_path, partial(spoil_a_weight, step=4, value=float("inf")))
    text = replayed(tmp_path, folder / "nonfinite_00000004.pt")
    assert "verdict: the weights are not finite, before any forward" in text
    assert re.search(
        r"fp32: loss nan; the first output .* online\.backbone\.layer1\.0\.conv1 \(Conv2d\)", text
    )


def test_two_ranks_keep_the_part_of_the_one_whose_loss_is_not_finite(tmp_path: Path) -> None:
    prepare = partial(spoil_an_image, step=4, ranks=(1,))
    folder, _ = stop(tmp_path, prepare, ranks=2, MODEL__BACKBONE__NAME="deit_tiny", **SMALL_VIT)
    assert [path.name for path in folder.glob("nonfinite_*")] == ["nonfinite_00000004.pt"]
    kept = checkpoint.load(folder / "nonfinite_00000004.pt")
    assert kept["world"] == 2
    assert 1 in [part["rank"] for part in kept["parts"]]
    text = replayed(tmp_path, folder / "nonfinite_00000004.pt")
    (part,) = [part for part in kept["parts"] if part["rank"] == 1]
    assert (
        f"rank 1: 64 images, its loss was nan; NOT FINITE in the input: samples {part['indices'][0][3]}"
        in text
    )


def test_a_full_disk_does_not_hide_the_first_error(tmp_path: Path) -> None:
    folder, text = stop(tmp_path, partial(disk_full_at, step=4))
    assert re.search("^error: step 4: the gradient norm is nan", text, re.MULTILINE)
    assert "the batch of step 4 is not kept for --replay" in text
    assert not list(folder.glob("nonfinite_*"))


def test_a_loss_that_only_the_run_had_is_not_reproduced(tmp_path: Path) -> None:
    folder, _ = stop(tmp_path, partial(overflow_gradient, step=4))
    text = replayed(tmp_path, folder / "nonfinite_00000004.pt")
    assert "verdict: not reproduced: this batch is finite on one process" in text


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    for name, message in (("other.pt", "holds no batch"), ("none.pt", "no such file")):
        (job,) = forked.start("main_pretrain", ["--replay", str(tmp_path / name)], tmp_path / "log")
        assert job.wait() == 2
        assert message in job.text()
        assert "Traceback" not in job.text()


def test_only_two_files_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "moby" / "t"
    folder.mkdir(parents=True)
    for age, step in ((30, 9), (20, 1), (10, 2)):
        (folder / f"nonfinite_{step:08d}.pt").touch()
        os.utime(folder / f"nonfinite_{step:08d}.pt", (time.time() - age, time.time() - age))
    stop(tmp_path, partial(spoil_an_image, step=0))
    kept = sorted(path.name for path in folder.glob("nonfinite_*"))
    assert kept == ["nonfinite_00000000.pt", "nonfinite_00000002.pt"]


@pytest.mark.parametrize("method", ["synco", "sit"])
def test_the_replay_has_the_loss_of_the_run(method: str, tmp_path: Path) -> None:
    """With the draws of the step: synthetic negatives, drop path, corruption."""
    from engine import replay

    argv = runs.arguments(method, tmp_path, "t")
    fault = partial(overflow_gradient, step=4)
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log", prepare=fault)
    assert job.wait() == 3, job.text()
    file = tmp_path / method / "t" / "nonfinite_00000004.pt"
    loss = replay.load_kept(file)["parts"][0]["loss"]
    assert f"fp32: loss {loss:.4g}, all outputs and gradients are finite" in replayed(
        tmp_path, file
    )


def overflow_gradient(rank: int, *, step: int) -> None:
    """Spoil the gradient, not the loss."""
    from engine import loop as engine

    original = engine.forward_and_backward

    def wrapper(state: Any, batches: Any, function: Any, progress: Any) -> Any:
        out = original(state, batches, function, progress)
        if progress.step == step:
            next(p for p in state.module.parameters() if p.grad is not None).grad.fill_(
                float("inf")
            )
        return out

    engine.forward_and_backward = wrapper
