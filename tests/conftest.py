"""Shared fixtures: determinism, the optional data packs, small helpers."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config: pytest.Config) -> None:
    """Keep two cores responsive, for networks too small for more threads, and the home folder clean."""
    torch.set_num_threads(1)
    folder = tempfile.TemporaryDirectory(prefix="synco-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of the real image packs, or skip where it is absent."""
    folder = Path(os.environ.get("SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real image packs: {folder} is absent (set SHARED_DATA to their folder)")
    return folder
