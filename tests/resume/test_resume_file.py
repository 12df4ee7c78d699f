"""``--resume FILE``: going back to an older checkpoint loses nothing and does not rewind at every restart."""

import json
from pathlib import Path

import pytest
import runs

import main_pretrain
from utils.checkpoints import file as checkpoint
from utils.logger import close_logger


def train(monkeypatch: pytest.MonkeyPatch, output: Path, *flags: str, **keys: object) -> Path:
    arguments = runs.arguments("moco_v2", output, "t", *flags, TRAIN__EPOCHS=1, **keys)
    monkeypatch.setattr("sys.argv", ["main_pretrain.py", *arguments])
    try:
        assert main_pretrain.main() == 0
    finally:
        close_logger()
    return output / "moco_v2" / "t"


def steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("ckpt_")) for path in folder.glob("ckpt_*.json"))


def test_an_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(monkeypatch, tmp_path, CHECKPOINT__KEEP_LAST=9)
    assert steps(folder) == [3, 6, 9, 11]
    whole = checkpoint.load(folder / "ckpt_00000011.pt")["framework"]
    older = str(folder / "ckpt_00000003.pt")

    train(monkeypatch, tmp_path, "--resume", older, CHECKPOINT__KEEP_LAST=9)
    assert steps(folder / "set_aside") == [6, 9, 11]  # nothing is deleted, nor taken for newer
    assert steps(folder) == [3, 6, 9, 11]
    again = checkpoint.load(folder / "ckpt_00000011.pt")["framework"]
    assert all((whole[name] == again[name]).all() for name in whole)
    lines = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == sorted(set(lines))

    written = (folder / "ckpt_00000011.pt").stat().st_mtime_ns
    # as a requeued job would
    train(monkeypatch, tmp_path, "--resume", older, CHECKPOINT__KEEP_LAST=9)
    assert (folder / "ckpt_00000011.pt").stat().st_mtime_ns == written


def test_a_good_copy_is_the_remedy_for_a_damaged_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(monkeypatch, tmp_path)
    copy = tmp_path / "copy.pt"
    copy.write_bytes((folder / "ckpt_00000009.pt").read_bytes())
    for path in folder.glob("ckpt_*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(checkpoint.CheckpointError, match="none valid"):
        train(monkeypatch, tmp_path)
    train(monkeypatch, tmp_path, "--resume", str(copy))
    assert checkpoint.newest_valid(folder).step == 11


def test_a_refused_resume_leaves_the_configuration_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(monkeypatch, tmp_path)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"OPTIM\.BASE_LR"):
        train(monkeypatch, tmp_path, OPTIM__BASE_LR=0.5)
    assert (folder / "config.yaml").read_text() == before
