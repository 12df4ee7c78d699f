"""Self-made data sets, and the real packs unpacked once."""

import tarfile
from pathlib import Path

import pytest
import shapes


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def voc_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="session")
def packs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the COCO and VOC packs into one folder, or skip where they are absent."""
    folder = tmp_path_factory.mktemp("packs")
    for name in ("coco-mini.tar", "bccd-voc.tar"):
        if not (shared_data / name).is_file():
            pytest.skip(f"{shared_data / name} is absent")
        with tarfile.open(shared_data / name) as archive:
            archive.extractall(folder, filter="data")
    return folder
