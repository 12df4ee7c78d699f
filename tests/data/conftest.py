"""Images and folders for the data tests."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from photos import draw_photo
from PIL import Image


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """Give uint8 (6,96,128,3) photo-like images."""
    return np.stack([draw_photo(96, 128, seed) for seed in range(6)])


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Give a folder of 12 train JPEGs in 3 classes and 5 val JPEGs in 2 of them, all of different sizes."""
    for number in range(17):
        split, name = ("train", f"c{number % 3}") if number < 12 else ("val", f"c{number % 2}")
        path = tmp_path / split / name / f"image {number:02d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_photo(40 + number, 60 - number, number)).save(path, quality=95)
    return tmp_path


@pytest.fixture(scope="session")
def real_photos(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Give 64 ImageNet JPEGs, or skip."""
    folder = unpacked(shared_data, tmp_path_factory, "imagenet-sample-64.tar")
    return sorted(folder.rglob("*.JPEG"))


def unpacked(shared_data: Path, factory: pytest.TempPathFactory, name: str) -> Path:
    """Unpack an archive of the shared packs into a temporary folder, or skip."""
    pack = shared_data / name
    if not pack.is_file():
        pytest.skip(f"{pack.name} is not in SHARED_DATA")
    folder = factory.mktemp("pack")
    with tarfile.open(pack) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="session")
def imagenette(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder imagenette224 with train/, val/ and splits/, or skip."""
    return unpacked(shared_data, tmp_path_factory, "imagenette224-subset.tar") / "imagenette224"


@pytest.fixture(scope="session")
def pets(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder that holds oxford-iiit-pet/ with 48 images, or skip."""
    return unpacked(shared_data, tmp_path_factory, "oxford-pets-mini.tar")
