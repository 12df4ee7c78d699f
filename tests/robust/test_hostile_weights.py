"""Files of weights that once hung every reader or took gigabytes."""

import ctypes
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from utils.checkpoints.foreign import read_torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds in which an honest child is long done, on a loaded machine


# ---- safetensors -----------------------------------------------------------------------------------


def test_safetensors_are_read_as_the_library_writes_them(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 2),
        "b": torch.tensor(4),
        "c": torch.ones(5, dtype=torch.bfloat16),
        "e": torch.empty(0),
        "f": torch.tensor([True, False]),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read = read_torch(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(bytes((tmp_path / "a.safetensors").stat().st_size))
    assert read.keys() == state.keys()  # and the file may change later
    for key, tensor in state.items():
        assert torch.equal(read[key], tensor)
        assert read[key].dtype == tensor.dtype


def safetensors_file(entries: dict[str, Any], data: bytes) -> bytes:
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(shape: Sequence[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


SAFETENSORS = {
    "negative offset": safetensors_file({"a": entry([2], -8, 0)}, bytes(8)),
    "past the end": safetensors_file({"a": entry([4], 0, 16)}, bytes(8)),
    "negative shape": safetensors_file({"a": entry([-1], 0, 8)}, bytes(8)),
    "shape without values": safetensors_file({"a": entry([2**40], 0, 8)}, bytes(8)),
    "bytes of nobody": safetensors_file({"a": entry([1], 0, 4)}, bytes(8)),
    "1000 over the same bytes": safetensors_file(
        {str(i): entry([2**20], 0, 2**22) for i in range(1000)}, bytes(2**22)
    ),
    "header of 2^62 bytes": (2**62).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_whose_sizes_are_untrue_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(SAFETENSORS[name])
    with pytest.raises(ValueError, match=r"^\S*a\.safetensors "):
        read_torch(path)


def bytes_touched(path: Path) -> int:
    """Return how many bytes of memory the reading of a file touches first: it counts what is copied."""
    ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages: a fault is one page
    read_torch(path)  # warms up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    read_torch(path)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_safetensors_are_read_in_proportion_to_their_size(tmp_path: Path) -> None:
    """Ours once copied the rest of the file for each tensor: 60 of 16 MiB touch 480 MiB, not 32."""
    path = tmp_path / "a.safetensors"
    save_file({str(i): torch.zeros(2**16) for i in range(64)}, path)
    code = "import sys, pathlib, test_hostile_weights as t; print(t.bytes_touched(pathlib.Path(sys.argv[1])))"
    # With a fixed threshold each large allocation is mapped afresh, so that each copied page is a fault.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    touched = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        timeout=LIMIT,
        capture_output=True,
        check=True,
    )
    size = path.stat().st_size
    assert size / 2 < int(touched.stdout) < 5 * size  # at least each tensor; at most some copies of all
