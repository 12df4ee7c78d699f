"""Pickles that repeat one call: what a call copies is paid from a budget in proportion to the file."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from utils.checkpoints.foreign import read_torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds; the reader answers within one, but the machine may be loaded
_MEMORY = 6 << 30

VALUES = b"(" + b"N" * 100_000 + b"tr\x01\0\0\0" + b"0"  # a tuple of 100,000, kept under 1
KEYWORDS = b"}(" + b"".join(b"\x8c\x06%06dN" % i for i in range(50_000)) + b"ur\x01\0\0\0" + b"0"
NAME = b"cother\nConfig\nr\x02\0\0\0" + b"0"  # a class, kept under 2
EMPTY = b"(" + b")" * 100_000 + b"tr\x01\0\0\0" + b"0"  # a tuple of 100,000 empty ones
ORDERED = b"ccollections\nOrderedDict\nr\x02\0\0\0" + b"0"  # a name that is called
PROGRAMS = {  # 20,000 objects, each of them made from all of the above
    "arguments": b"\x80\x02" + VALUES + NAME + b"](" + b"h\x02h\x01R" * 20_000 + b"e0}.",
    "new objects": b"\x80\x02" + VALUES + NAME + b"](" + b"h\x02h\x01\x81" * 20_000 + b"e0}.",
    "empty arguments": b"\x80\x02" + EMPTY + ORDERED + b"](" + b"h\x02h\x01R" * 20_000 + b"e0}.",
    "keywords": b"\x80\x04" + KEYWORDS + NAME + b"](" + b"h\x02)h\x01\x92" * 200_000 + b"e0}.",
}


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_call_that_is_repeated_does_not_multiply_its_arguments(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(PROGRAMS[name])
    code = (
        "import resource, sys, pathlib\n"
        "from utils.checkpoints.foreign import read_torch\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = most()\n"
        "try:\n    read_torch(pathlib.Path(sys.argv[1])); print('read')\n"
        "except ValueError as error:\n    print('refused', error)\n"
        "print((most() - before) // 1024)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.pth")],
        env=environment,
        timeout=LIMIT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit_memory,
    )
    said, megabytes = done.stdout.splitlines()
    assert int(megabytes) < 300, said
    if name != "keywords":  # those are shared, not copied
        assert "a.pth would grow to many times its size" in said


def test_complex_numbers_are_read(tmp_path: Path) -> None:
    torch.save({"c": 1 + 2j}, tmp_path / "a.pth")
    assert read_torch(tmp_path / "a.pth") == {"c": 1 + 2j}
