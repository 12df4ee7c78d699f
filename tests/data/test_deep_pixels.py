"""Every way to an image refuses pixels of more than 8 bits, by name: none gives white or black."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.recipes import build_recipe
from data.device_decode import FileReader
from data.sources import build_source
from data.sources.base import Source, subset
from data.worker import Fetcher
from detection.sources.annotations import DetectionData
from segmentation.datasets import SegmentationData
from segmentation.sources.labels import plain_table
from tools import pack, propagate

REFUSED = r"16-bit image \(mode I;16\) is not supported; convert to 8 bit"


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """Write one image of 12 bits in 16, the only one of a folder of classes."""
    file = tmp_path / "train" / "class" / "deep.png"
    file.parent.mkdir(parents=True)
    ramp = np.tile(np.linspace(0, 4095, 64), (64, 1)).astype(np.uint16)
    Image.fromarray(ramp).save(file)
    return file


def from_folder(deep: Path) -> object:
    return build_source("imagefolder", str(deep.parents[2]), "train").load(0)


def from_subset(deep: Path) -> object:
    return subset(build_source("imagefolder", str(deep.parents[2]), "train"), [0]).load(0)


def from_zip(deep: Path) -> object:
    with zipfile.ZipFile(deep.parents[2] / "train.zip", "w") as archive:
        archive.write(deep, "class/deep.png")
    (deep.parents[2] / "train_map.txt").write_text("class/deep.png\t0")
    return build_source("zip", str(deep.parents[2]), "train").load(0)


def from_device_reader(deep: Path) -> object:
    source = build_source("imagefolder", str(deep.parents[2]), "train")
    return FileReader(Fetcher(source, build_recipe("eval", 32), seed=0)).read(0)


def of_detection(deep: Path) -> object:
    return DetectionData((deep,), (1,), (), ("thing",), (1,)).load(0)


def of_segmentation(deep: Path) -> object:
    table = plain_table(2)
    data = SegmentationData((deep,), (deep,), ["a", "b"], (table,), np.zeros(1, dtype=np.int64))
    return data.sample(0)


def of_a_video(deep: Path) -> object:
    return propagate.read_frame(deep, (32, 32))


WAYS = (
    from_folder,
    from_subset,
    from_zip,
    from_device_reader,
    of_detection,
    of_segmentation,
    of_a_video,
)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_refuses(deep: Path, way: Callable[[Path], object]) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        way(deep)


@pytest.mark.parametrize("flags", [[], ["--raw"], ["--short-side", "32"]])
def test_packing_refuses_by_name(
    deep: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    root = deep.parents[2]
    argv = ["--data-path", str(root), "--output", str(root / "train.pack"), "--workers", "0"]
    assert pack.main([*argv, *flags]) == 2
    error = capsys.readouterr().err
    assert f"cannot read {deep}: ValueError: 16-bit image (mode I;16) is not supported" in error
    assert not (root / "train.pack").exists()


def test_a_pack_of_an_older_version_is_refused_when_read(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs keep the bytes of their files, and once took these."""
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    monkeypatch.setattr(Source, "decode", lambda self, data: white)
    root = deep.parents[2]
    argv = ["--data-path", str(root), "--output", str(root / "train.pack"), "--workers", "0"]
    assert pack.main(argv) == 0
    monkeypatch.undo()
    with pytest.raises(ValueError, match=REFUSED):
        build_source("packed", str(root), "train").load(0)
