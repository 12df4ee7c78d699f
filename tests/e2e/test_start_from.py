"""Pretraining starts from the weights of a file, in both networks, and only where nothing is resumed."""

from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from torch import nn

from models import assemble_framework, framework_options
from models.parts.backbones import build_backbone
from models.weights import export
from models.weights.pretraining_state import framework_state
from models.weights.start import start_from
from utils.checkpoints import file as checkpoint
from utils.config.load import load_config
from utils.config.schema import declare


def start(output: Path, *flags: str, code: int = 0, **keys: object) -> forked.Job:
    # at a rate of 0 the weights of the file are still there after the run
    argv = runs.arguments("moco_v2", output, "t", *flags, OPTIM__BASE_LR=0.0, **keys)
    (job,) = forked.start("main_pretrain", argv, output / "log")
    assert job.wait() == code, job.text()
    return job


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    path = tmp_path / "weights.pth"
    torch.save(build_backbone("resnet8").state_dict(), path)
    return path


@pytest.mark.parametrize("groups", [1, 8])
def test_both_networks_start_from_the_file_and_a_resumed_run_does_not(
    tmp_path: Path, weights: Path, groups: int
) -> None:
    keys = {"MODEL__MOCO_V2__BN_GROUPS": groups}
    start(tmp_path, "--pretrained", str(weights), **keys)
    newest = max((tmp_path / "moco_v2" / "t").glob("ckpt_*.pt"))
    state = checkpoint.load(newest)["framework"]
    wanted = torch.load(weights, weights_only=True)
    for network in ("online", "target"):
        for name, tensor in wanted.items():
            if name.endswith(("weight", "bias")):
                assert torch.equal(state[f"{network}.backbone.{name}"], tensor), name
    weights.unlink()
    assert "resumed" in start(tmp_path, "--pretrained", str(weights), **keys).text()


def test_a_resume_with_another_file_is_refused_by_name(tmp_path: Path, weights: Path) -> None:
    start(tmp_path, "--pretrained", str(weights))
    moved = weights.rename(tmp_path / "moved.pth")
    assert "resumed" in start(tmp_path, "--pretrained", str(moved)).text()
    assert "resumed" in start(tmp_path).text()
    text = start(tmp_path, "--pretrained", str(moved), "--which", "target", code=2).text()
    assert "--which target" in text
    other = tmp_path / "other.pth"
    torch.save(build_backbone("resnet8").state_dict(), other)
    text = start(tmp_path, "--pretrained", str(other), code=2).text()
    for word in ("weights.pth", "other.pth", "--tag"):
        assert word in text


def test_a_run_from_random_weights_does_not_go_on_with_a_file(
    tmp_path: Path, weights: Path
) -> None:
    start(tmp_path)
    text = start(tmp_path, "--pretrained", str(weights), code=2).text()
    assert "began with random weights, not with weights.pth" in text


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(build_backbone("resnet18").state_dict(), other)
    text = start(tmp_path, "--pretrained", str(other), code=2).text()
    assert "other.pth" in text


# ---- heads and queue, without a run --------------------------------------------------------------

CFG = load_config(declare(framework_options()), (), ["MODEL.NAME", "moco_v2"])


def moco(seed: int, queue: int = 64, out_dim: int = 16) -> Any:
    torch.manual_seed(seed)
    options = {"queue_size": queue, "out_dim": out_dim}
    method = assemble_framework("moco_v2", options, {"name": "resnet8"}, img_size=16)
    with torch.no_grad():  # two networks that differ, as after some steps
        for tensor in method.target.parameters():
            tensor.add_(0.01)
    return method


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    method = moco(1)
    method.queue.position = 32
    state = method.state_dict()
    path = tmp_path / "ours.pt"
    torch.save({"framework": state}, path)
    return path, state


def said(caplog: pytest.LogCaptureFixture, method: nn.Module, path: Path, which: str = "") -> str:
    caplog.clear()
    with caplog.at_level("INFO", "synco"):
        start_from(method, CFG, path, which)
    return caplog.text


def test_a_whole_state_comes_along(
    ours: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    path, state = ours
    method = moco(2)
    text = said(caplog, method, path)
    for key, tensor in method.state_dict().items():
        if not key.endswith("_extra_state"):
            assert torch.equal(tensor, state[key]), key
    # rows are written in steps of this run's batch, so they begin at the first
    assert method.queue.position == 0
    assert "took online" in text
    assert "also took online.projector, queue" in text


@pytest.mark.parametrize("which", ["online", "target"])
def test_both_networks_and_heads_come_from_the_one_that_is_asked_for(
    ours: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture, which: str
) -> None:
    path, state = ours
    method = moco(2)
    assert f"both networks start from its {which} network" in said(caplog, method, path, which)
    for side in (method.online, method.target):
        for key, tensor in side.state_dict().items():
            assert torch.equal(tensor, state[f"{which}.{key}"]), key


def test_heads_that_do_not_fit_start_at_random(
    ours: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    path, state = ours
    method = moco(2, out_dim=8)
    before = {key: tensor.clone() for key, tensor in method.state_dict().items()}
    text = said(caplog, method, path)
    assert "start at random: online.projector" in text
    for key, tensor in method.state_dict().items():
        wanted = state[key] if ".backbone." in key else before[key]
        assert torch.equal(tensor, wanted), key


def test_a_queue_of_another_length_starts_at_random(
    ours: tuple[Path, dict[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    path, state = ours
    method = moco(2, queue=32)
    assert "queue starts at random" in said(caplog, method, path)
    key = "online.projector.0.weight"
    assert torch.equal(method.state_dict()[key], state[key])


def test_heads_that_are_not_finite_are_refused(
    ours: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, state = ours
    state["online.projector.0.weight"][0] = float("nan")
    torch.save({"framework": state}, path)
    with pytest.raises(ValueError, match="not finite"):
        start_from(moco(2), CFG, path)


def test_an_imported_whole_state_comes_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `convert.py import --full` writes it, from a file in MoCo's names."""
    names = {"online.backbone.": "encoder_q.", "target.backbone.": "encoder_k."}
    names |= {"online.projector.": "encoder_q.fc.", "target.projector.": "encoder_k.fc."}
    state = moco(1).state_dict()
    theirs = {"queue": state["queue.keys"].T, "queue_ptr": torch.tensor([0])}
    for key, tensor in state.items():
        for ours, published in names.items():
            if key.startswith(ours):
                theirs["module." + published + key.removeprefix(ours)] = tensor
    theirs = {f"module.{key.removeprefix('module.')}": tensor for key, tensor in theirs.items()}
    method = moco(2)
    path = tmp_path / "imported.pt"
    torch.save({"framework": framework_state(theirs, method.state_dict())}, path)
    assert "also took" in said(caplog, method, path)
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("layout", ["timm", "wrapped", "moco", "detectron2", "hf", "dino"])
def test_each_layout_that_a_probe_reads_starts_both_networks(tmp_path: Path, layout: str) -> None:
    torch.manual_seed(5)
    backbone = build_backbone("resnet8")
    state = backbone.state_dict()
    student = build_backbone("resnet8").state_dict()
    files: dict[str, dict[str, Any]] = {
        "timm": state,
        "wrapped": {"model": {f"module._orig_mod.{key}": t for key, t in state.items()}},
        "moco": {"state_dict": export.to_moco(state, {})},
        "detectron2": {
            "model": {k: torch.tensor(v) for k, v in export.to_detectron2(state).items()}
        },
        "hf": export.to_huggingface(backbone, 32)[0],
        "dino": {
            "student": {f"module.backbone.{key}": t for key, t in student.items()},
            "teacher": {f"backbone.{key}": t for key, t in state.items()},
        },
    }
    path = tmp_path / "file.pth"
    torch.save(files[layout], path)
    method = moco(2)
    start_from(method, CFG, path)
    for side in (method.online, method.target):
        for key, tensor in side.backbone.state_dict().items():
            assert torch.equal(tensor, state[key]), key
    if layout == "dino":
        start_from(method, CFG, path, "student")
        assert torch.equal(method.target.backbone.conv1.weight, student["conv1.weight"])
