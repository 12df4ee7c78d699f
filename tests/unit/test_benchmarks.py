"""Miniatures of the benchmarks: each ends with one line of JSON that holds its figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import benchmarks.__main__ as program
from benchmarks.training import peers, start
from benchmarks.training.step import framework_of
from models import FRAMEWORKS

ROOT = Path(__file__).resolve().parents[2]


def figures(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, float]:
    """Run a benchmark in this process; return its last line."""
    threads = torch.get_num_threads()
    with mock.patch.object(sys, "argv", ["benchmarks", "--rounds", "1", *argv]):
        assert program.main() == 0
    torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


SMALL = ("--batch", "4", "--size", "16")


def test_scale_has_every_method_queue_and_index(capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("--parts", "methods", "queue", "index")
    sizes = ("--queues", "1024", "2048", "--images", "1000", "3000")
    found = figures(capsys, "scale", *SMALL, *parts, *sizes)
    others = [name for name in FRAMEWORKS if name != "moco_v2"]
    assert all(found[f"step_{name}_over_moco_v2"] > 0 for name in others)
    assert found["step_moco_v2_ms"] > 0
    for method in ("moco_v2", "synco"):
        assert found[f"queue_{method}_2048_over_1024"] > 0
    for what in ("order", "indices", "open"):
        assert found[f"index_{what}_3000_ms"] > 0


def test_throughput_has_a_line_for_each_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    for number in range(8):
        Image.new("RGB", (24, 24), (30 * number, 0, 0)).save(folder / f"{number}.png")
    small = (*SMALL, "--backbones", "resnet8", "--steps", "1", "--data", str(tmp_path))
    found = figures(capsys, "throughput", *small)
    for method in FRAMEWORKS:
        assert found[f"resnet8_{method}_images_per_s"] > 0
        assert 0 <= found[f"resnet8_{method}_wait_share"] < 1
        assert found[f"resnet8_{method}_peak_gib"] > 0


@pytest.mark.parametrize("backbone", ["vit_small", "swin_tiny", "resnet50"])  # of the GPU check
def test_sit_trains_with_each_backbone_of_the_throughput(backbone: str) -> None:
    assert isinstance(framework_of("sit", backbone, 224), FRAMEWORKS["sit"])


@pytest.mark.slow
def test_scale_lets_processes_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "scale", *SMALL, "--parts", "processes", "--processes", "1", "2")
    assert found["processes_step_2_over_1"] > 0
    assert found["processes_input_2_over_1"] > 0


# ---- start ---------------------------------------------------------------------------------------


def quick(lines: str, end: str) -> start.Start:
    return start.Start([sys.executable, "-S", "-c", lines], end)


def test_a_start_ends_with_its_line_and_not_with_the_process(tmp_path: Path) -> None:
    endless = "import time; print('step 1/8', flush=True); time.sleep(1000)"
    clock, cpu = start.time_start(quick(endless, "step 1/"), 1, tmp_path)
    assert 0 < cpu < 100
    assert 0 < clock < 500


def test_a_start_without_a_step_says_what_was_printed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"made no step.*\n.*no such data"):
        start.time_start(quick("print('no such data')", "step 1/"), 1, tmp_path)


def test_start_leaves_out_what_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start.importlib.util, "find_spec", lambda name: None)
    timed = []

    def at_once(side: start.Start, threads: int, folder: Path) -> tuple[float, float]:
        timed.append(side)
        assert len(list((folder / "images").glob("*/*/*.jpg"))) == 8 + 16
        return 3.0, 2.0

    monkeypatch.setattr(start, "time_start", at_once)
    with mock.patch.object(sys, "argv", ["benchmarks", "--rounds", "2", "start", "--images", "8"]):
        assert program.main() == 0
    out = capsys.readouterr().out
    assert "lightly is not installed: left out" in out
    assert "stable_pretraining is not installed: left out" in out
    found = json.loads(out.splitlines()[-1])
    assert found["ours_start_s"] == 3.0
    assert found["ours_start_cpu_s"] == 2.0
    assert "start_lightly_over_ours" not in found
    assert len(timed) == 2 * 3  # a bare import and ours, in two rounds and one that does not count


@pytest.mark.slow
def test_our_start_comes_to_its_first_step() -> None:
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1", "start", "--images", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ours_start_cpu_s"] > 0


# ---- peers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jpegs", ["0", "6"])
def test_peers_measures_ours_alone_where_lightly_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jpegs: str
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 0, 0)).save(tmp_path / f"{number}.jpg")
    argv = ("--steps", "1", "--jpegs", jpegs, "--data", str(tmp_path))
    with mock.patch.object(sys, "argv", ["benchmarks", "--rounds", "1", "peers", *SMALL, *argv]):
        assert program.main() == 0
    out = capsys.readouterr().out
    assert "lightly is not installed" in out
    found = json.loads(out.splitlines()[-1])
    assert found["images_per_s"] > 0
    assert found["data_images_per_s"] > 0
    assert "lightly_step_speedup" not in found


@pytest.mark.slow
def test_peers_compares_steps_and_data_with_lightly(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightly")
    found = figures(capsys, "peers", *SMALL, "--steps", "1", "--jpegs", "8")
    for part in ("step", "data", "end_to_end"):
        assert found[f"lightly_{part}_speedup"] > 0


# ---- gpu_check.sh --------------------------------------------------------------------------------


def test_the_gpu_check_ends_with_its_time_and_names_what_it_left_out(tmp_path: Path) -> None:
    places = {"PYTHON": sys.executable, "SHARED_DATA": str(tmp_path), "BUDGET": "0"}
    command = ["bash", "tools/gpu_check.sh"]
    env = os.environ | places
    # a check that does not look at its time would run for minutes
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # not all was checked
    left = done.stdout.count("LEFT OUT: no time")
    assert left == done.stdout.count("\n## ") >= 8
    assert "throughput" in done.stdout
