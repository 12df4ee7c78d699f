"""A linear probe that learns beside a run: it learns, it is resumed, and the run does not notice it."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch

ROOT = Path(__file__).resolve().parents[2]
WITH = {"PROBE__ONLINE": True, "KNN__EVERY_EPOCHS": 1, "KNN__K": [5], "PROBE__LR": 0.01}


def trained(
    method: str, root: Path, tag: str, world: int = 1, **keys: Any
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Run to the end; return checkpoint, lines of metrics.jsonl without the clock, and output."""
    argv = runs.arguments(method, root, tag, world=world, **keys)
    jobs = forked.start("main_pretrain", argv, root / f"{tag}.log", ranks=world)
    assert [job.wait() for job in jobs] == [0] * world, jobs[0].text()
    return runs.final_state(root / method / tag), lines(root / method / tag), jobs[0].text()


def lines(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in runs.CLOCK} for row in rows]


@pytest.mark.parametrize(("method", "world"), [("moco_v2", 1), ("sit", 1), ("mocov3", 2)])
def test_the_run_is_bit_identical_with_and_without(method: str, world: int, tmp_path: Path) -> None:
    with_probe, rows, _ = trained(method, tmp_path, "with", world, **WITH)
    without, plain, _ = trained(
        method, tmp_path, "without", world, **{**WITH, "PROBE__ONLINE": False}
    )
    assert set(with_probe) - set(without) == {"probe"}
    for part in ("framework", "optimizer", "scaler", "step"):
        assert same(with_probe[part], without[part]), part
    for row in rows:
        row.pop("probe_loss", None)
        row.pop("probe_top1", None)
    assert rows == plain


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_it_learns_and_a_killed_run_resumes_it_bit_identically(tmp_path: Path) -> None:
    keys = {**WITH, "TRAIN__EPOCHS": 2}
    whole, rows, _ = trained("byol", tmp_path, "whole", **keys)
    found = [row["probe_top1"] for row in rows if "probe_top1" in row]
    assert len(found) == 2
    assert found[-1] > 30  # of ten classes
    losses = [row["probe_loss"] for row in rows if "probe_loss" in row]
    assert losses[-1] < losses[0] - 0.3

    argv = runs.arguments("byol", tmp_path, "killed", **keys)
    (job,) = forked.start(
        "main_pretrain", argv, tmp_path / "log", prepare=partial(runs.kill_at, step=8)
    )
    assert job.wait() != 0
    resumed, again, text = trained("byol", tmp_path, "killed", **keys)
    assert "resumed from" in text
    assert same(resumed["probe"], whole["probe"])
    assert same(resumed["framework"], whole["framework"])
    assert again == rows


def test_it_may_come_and_go_with_a_resume(tmp_path: Path) -> None:
    off, on = {**WITH, "PROBE__ONLINE": False}, {**WITH, "CHECKPOINT__EVERY_STEPS": 4}
    whole, _, _ = trained("byol", tmp_path, "whole", **off)
    argv = runs.arguments("byol", tmp_path, "t", **off)
    (job,) = forked.start(
        "main_pretrain", argv, tmp_path / "log", prepare=partial(runs.kill_at, step=5)
    )
    assert job.wait() != 0
    later, rows, text = trained("byol", tmp_path, "t", **on)
    assert "the checkpoint holds no on-line probe" in text
    assert "probe_top1" in rows[-1]
    assert same(later["framework"], whole["framework"])
    argv = runs.arguments("byol", tmp_path, "t", "--eval", **off)
    assert forked.run("main_pretrain", argv, tmp_path / "log") == [0]


def test_images_without_labels_are_refused_by_name(tmp_path: Path) -> None:
    # what the command line alone does not tell: see test_before_torch
    data = runs.image_folder(tmp_path / "data", train=8, val=8)
    keys = {"DATA__PATH": str(data), "DATA__DATASET": "folder", "TRAIN__BATCH_SIZE": 8}
    argv = runs.arguments("byol", tmp_path, "t", **{**WITH, **keys})
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log")
    assert job.wait() == 2
    assert "PROBE.ONLINE: DATA.DATASET 'folder' has training images without labels" in job.text()


@pytest.mark.parametrize("layout", ["zip", "packed"])
def test_a_set_without_test_images_is_refused_by_name(layout: str, tmp_path: Path) -> None:
    """Of a zip and of a packed set only the programs that open it know what splits it has."""
    data = runs.image_folder(tmp_path / "data", train=8, val=8)
    packed = tmp_path / "packed"
    packed.mkdir()
    if layout == "zip":
        shutil.make_archive(str(packed / "train"), "zip", data / "train")
        names = sorted((data / "train").glob("*/*"))
        folders = sorted({name.parent for name in names})
        rows = [f"{name.parent.name}/{name.name}\t{folders.index(name.parent)}" for name in names]
        (packed / "train_map.txt").write_text("\n".join(rows))
    else:
        pack = [sys.executable, str(ROOT / "tools" / "pack.py"), "--data-path", str(data)]
        pack += ["--output", str(packed / "train.pack"), "--workers", "0"]
        subprocess.run(pack, check=True, capture_output=True)
    keys = {"DATA__PATH": str(packed), "DATA__DATASET": layout, "TRAIN__BATCH_SIZE": 8}
    argv = runs.arguments("byol", tmp_path, "t", **{**WITH, **keys})
    (job,) = forked.start("main_pretrain", argv, tmp_path / "log")
    assert job.wait() == 2
    assert "PROBE.ONLINE: the probe is tested on labelled images of a split val; " in job.text()
    assert "; or set PROBE.ONLINE to False" in job.text()
