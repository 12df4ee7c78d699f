"""`tools/embed.py`: the features of a folder in a file that six lines read."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.worker import BadImagesError
from models.parts.backbones import build_backbone
from tests.unit.test_retrieval import two_networks
from tools import embed
from utils.checkpoints import file as checkpoint

CONFIG = """
NAME: tiny
MODEL: {NAME: moco_v2, BACKBONE: {NAME: resnet8, STEM: cifar_stride2}}
DATA: {IMG_SIZE: 16, NUM_WORKERS: 0, DATASET: digits}
LINEAR: {BATCH_SIZE: 4}
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of a run with weights, and eleven photos without classes beside it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    two_networks(folder)
    checkpoint.save(folder, 3, torch.load(folder / "student.pth"), meta={})
    photos = tmp_path / "photos" / "of two days"
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(11):
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(photos / f"{number:02d}, é.png")
    return folder


def embedded(monkeypatch: pytest.MonkeyPatch, *words: object, to: str = "f.npz") -> Path:
    flags = ["--data-path", "photos", "--output", to, "--device", "cpu", *map(str, words)]
    monkeypatch.setattr(sys, "argv", ["embed.py", *flags])
    assert embed.main() == 0
    return Path(to)


def by_hand(weights: Path, names: list[str]) -> np.ndarray:
    """Return what the network makes of images that need no resizing."""
    backbone = build_backbone("resnet8", stem="cifar_stride2").eval()
    backbone.load_state_dict(torch.load(weights))
    images = np.stack([np.asarray(Image.open(name)) for name in names]) / 255.0
    images = (images - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    with torch.no_grad():
        return backbone(torch.tensor(images).float().permute(0, 3, 1, 2)).numpy()


def test_six_lines_read_what_the_network_says(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded(monkeypatch, "--pretrained", run)
    data = np.load("f.npz")
    names, features = data["names"], data["features"]
    assert [Path(name).name for name in names] == [f"{i:02d}, é.png" for i in range(11)]
    assert all(Path(name).is_file() for name in names)
    assert features.dtype == np.float32
    expected = by_hand(run / "student.pth", list(names))
    assert np.abs(features - expected).max() < 1e-5 * np.abs(expected).max()
    assert "labels" not in data
    assert sorted(path.name for path in Path().iterdir()) == ["f.npz", "photos", "run"]


def test_csv_holds_the_same_numbers_and_workers_change_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = embedded(monkeypatch, "--pretrained", run, "--workers", 2, to="new/f.csv")
    assert capsys.readouterr().out.startswith("new/f.csv: 11 images x 128 features, ckpt_00000003")
    with file.open(newline="") as lines:
        head, *rows = list(csv.reader(lines))
    assert head == ["name", *(f"f{i}" for i in range(128))]
    data = np.load(embedded(monkeypatch, "--pretrained", run))
    assert [row[0] for row in rows] == data["names"].tolist()
    assert np.array_equal(np.array([row[1:] for row in rows], dtype=np.float32), data["features"])


def test_classes_are_kept_and_which_network_is_asked_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("photos/of two days").rename("days")
    Path("photos/train/cat").mkdir(parents=True)
    Path("days").rename("photos/train/dog")
    Path("photos/train/dog/03, é.png").rename("photos/train/cat/x.png")
    weights, words = run / "dino.pth", ["--dataset", "imagefolder", "--which"]
    data = np.load(embedded(monkeypatch, "--pretrained", weights, *words, "student"))
    assert data["classes"].tolist() == ["cat", "dog"]
    assert data["labels"].tolist() == [0] + [1] * 10
    expected = by_hand(run / "student.pth", data["names"].tolist())
    assert np.allclose(data["features"], expected, rtol=1e-4, atol=1e-5)
    embedded(monkeypatch, "--pretrained", weights, *words, "teacher", to="f.csv")
    rows = [line.split(",") for line in Path("f.csv").read_text().splitlines()[1:]]
    assert [row[-129] for row in rows] == ["cat"] + ["dog"] * 10
    assert abs(float(rows[0][-1]) - expected[0][-1]) > 1e-3


def test_a_bundled_set_needs_no_path(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--pretrained", str(run), "--output", "f.npz", "--split", "val", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["embed.py", *flags])
    assert embed.main() == 0
    data = np.load("f.npz")
    assert data["features"].shape == (359, 128)
    assert set(data["labels"].tolist()) == set(range(10))


def test_weights_of_elsewhere_name_their_network(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (run / "student.pth").rename("student.pth")
    with pytest.raises(ValueError, match=r"--pretrained: name .* --backbone NAME"):
        embedded(monkeypatch, "--pretrained", weights)
    words = ["--backbone", "resnet8", "--opts", "MODEL.BACKBONE.STEM=cifar_stride2"]
    words += ["--img-size", "16", "--workers", "0"]
    data = np.load(embedded(monkeypatch, "--pretrained", weights, *words))
    assert np.allclose(data["features"], by_hand(weights, data["names"].tolist()), atol=1e-5)


def test_what_cannot_be_read_leaves_the_old_file_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = embedded(monkeypatch, "--pretrained", run).read_bytes()
    Path("photos/of two days/04, é.png").write_bytes(b"no image")
    message = r"cannot read photos/of two days/04, é\.png: .* --skip-unreadable leaves"
    with pytest.raises(BadImagesError, match=message):
        embedded(monkeypatch, "--pretrained", run)
    assert Path("f.npz").read_bytes() == before
    assert not Path("f.npz.tmp").exists()
    data = np.load(embedded(monkeypatch, "--pretrained", run, "--skip-unreadable"))
    assert len(data["features"]) == len(data["names"]) == 10
    assert not any("04, " in name for name in data["names"])
    expected = by_hand(run / "student.pth", data["names"].tolist())
    assert np.allclose(data["features"], expected, rtol=1e-4, atol=1e-5)


def test_weights_that_diverged_are_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "compute_features", diverged(embed.compute_features))
    for to in ("f.npz", "f.csv"):
        with pytest.raises(ValueError, match="NaN or infinity"):
            embedded(monkeypatch, "--pretrained", run, to=to)
        assert not Path(to).exists()


def diverged(compute: object) -> object:
    def features(*args: object) -> object:
        found = compute(*args)
        found.rows[3, 4] = torch.nan
        return found

    return features


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "f.txt"], "argument --output: f.txt must end in .npz or .csv"),
        ([], "the following arguments are required: --output"),
        (["--output", "f.npz", "--epochs", "3"], "unknown argument '--epochs'"),
    ],
)
def test_bad_words_are_answered_in_one_line(words: list[str], message: str) -> None:
    command = [sys.executable, str(ROOT / "tools/embed.py"), "--pretrained", "x", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"error: {message}"
