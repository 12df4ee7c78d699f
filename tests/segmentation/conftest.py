"""Self-made data sets, and the real pack unpacked once."""

import tarfile
from pathlib import Path

import pytest
import scenes


@pytest.fixture(scope="session")
def pairs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.folder_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def pack(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the pack of label maps, or skip where it is absent."""
    file = shared_data / "segmentation-mini.tar"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    folder = tmp_path_factory.mktemp("pack")
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    return folder / "segmentation_mini"
