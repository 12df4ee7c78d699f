"""Pretraining starts from the weights of a file, in both networks, and only where nothing is resumed."""

from pathlib import Path

import forked
import pytest
import runs
import torch

from models.parts.backbones import build_backbone
from utils.checkpoints import file as checkpoint


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


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(build_backbone("resnet18").state_dict(), other)
    text = start(tmp_path, "--pretrained", str(other), code=2).text()
    assert "other.pth" in text
