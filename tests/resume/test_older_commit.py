"""A run of an older commit goes on under today's code: its config, checkpoint and listing cache."""

import json
import shutil
from pathlib import Path

import pytest
import runs
from torch import nn

import main_pretrain
from models.parts import backbones
from utils.logger import close_logger

OLDER = Path(__file__).parent / "older"


def small_resnet(*_: object) -> nn.Module:
    """Build the narrow ResNet that the older run was made with: its files are small."""
    from timm.models.resnet import BasicBlock, ResNet

    net = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, channels=(4, 4, 8, 8))
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> Path:
    """Start today's program in the folder that the older run left."""
    folder = tmp_path / "output" / "synco" / "old"
    folder.mkdir(parents=True)
    for name in ("ckpt_00000006.pt", "ckpt_00000006.json", "config.yaml", "metrics.jsonl"):
        shutil.copy(OLDER / name, folder)
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(OLDER / "images.index", cache / "6d664b4312b38dcdef80875f8f4e8903.index")
    data = runs.image_folder(tmp_path / "data")
    monkeypatch.setattr(backbones, "_resnet", small_resnet)
    arguments = ["--cfg", str(OLDER / "config.yaml"), "--output", str(tmp_path / "output")]
    arguments += ["--data-path", str(data), *flags, "--opts", "DATA.INDEX_CACHE", str(cache)]
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", *arguments])
    try:
        assert main_pretrain.main() == 0
    finally:
        close_logger()
    return folder


def losses(path: Path) -> dict[int, float]:
    lines = map(json.loads, path.read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_of_an_older_commit_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = go_on(tmp_path, monkeypatch)
    assert runs.resumed_at((folder / "log.txt").read_text()) == 6
    assert runs.status(folder)["state"] == "done"
    then, now = losses(OLDER / "metrics.jsonl"), losses(folder / "metrics.jsonl")
    assert list(now) == list(then) == list(range(1, 13))
    # Another torch or processor rounds otherwise; another view, rate or queue moves the loss by more.
    assert now == pytest.approx(then, rel=1e-3)
