"""Files of weights that once hung every reader or took gigabytes."""

import ctypes
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from safetensors.torch import save_file

from utils.checkpoints import file as checkpoint
from utils.checkpoints.file import CheckpointError
from utils.checkpoints.foreign import read_pickle, read_torch

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds in which an honest child is long done, on a loaded machine


# ---- safetensors ---------------------------------------------------------------------------------


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
    # With a fixed threshold each large allocation is mapped afresh, so that each copied page is a
    # fault.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        map(str, (ROOT, ROOT / "tests", Path(__file__).parent))
    )
    touched = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=environment,
        timeout=LIMIT,
        capture_output=True,
        check=True,
    )
    size = path.stat().st_size
    # at least each tensor; at most some copies of all
    assert size / 2 < int(touched.stdout) < 5 * size


# ---- pickles: small files that have no end, or that unfold ---------------------------------------


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b"\x8b" + struct.pack("<i", len(data)) + data


# (1,), then forty times the pair of itself with itself: 2^40 leaves in 80 bytes
ENDLESS = b"K\x01\x85" + b"2\x86" * 40
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
HOOKS = b"\x89ccollections\nOrderedDict\n)RtR"
STAND_IN = b"cargparse\nNamespace\n)\x81"
COLLIDING = [(2**61 - 1) * i for i in range(1, 60_001)]  # all of the hash 0


def nested_lists() -> bytes:
    """Return a list of 2^40 leaves: each list holds the one before twice."""
    program = b"]"
    for index in range(40):
        program += b"q" + bytes([index]) + b"]h" + bytes([index]) + b"ah" + bytes([index]) + b"a"
    return program


VALUES = {  # the value of one key of the dictionary
    "a storage's kind": REBUILD + b"(" + text("storage") + ENDLESS + text("0") + text("cpu") + b"K\x04tQ"
    b"K\x00K\x04\x85K\x01\x85" + HOOKS,
    "a storage's mark": b"(" + ENDLESS + b"K\x01" + text("0") + text("cpu") + b"K\x04tQ",
    "a storage's key": REBUILD + b"(" + text("storage") + b"ctorch\nFloatStorage\n" + ENDLESS + text("cpu")
    + b"K\x04tQK\x00K\x04\x85K\x01\x85" + HOOKS,
    "a shape": REBUILD + STORAGE + b"K\x00" + ENDLESS + b"K\x01\x85" + HOOKS,
    "a stride": REBUILD + STORAGE + b"K\x00K\x04\x85" + ENDLESS + HOOKS,
    "an offset": REBUILD + STORAGE + ENDLESS + b"K\x04\x85K\x01\x85" + HOOKS,
    "a size": b"ctorch\nSize\n" + ENDLESS + b"R",
    "a dtype": b"cnumpy\ndtype\n(" + ENDLESS + b"\x89\x88tR",
    "an order of bytes": b"cnumpy\ndtype\n(U\x02f8\x89\x88tR(K\x03" + ENDLESS + b"tb",
    "an array's state": b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01" + ENDLESS * 4 + b"tb",
    "a device": b"ctorch\ndevice\n(" + ENDLESS + b"tR",
    "a complex number": b"cbuiltins\ncomplex\n" + ENDLESS + b"\x85R",
    "an encoding": b"c_codecs\nencode\n" + text("a") + ENDLESS + b"\x86R",
    "a key": b"}" + ENDLESS + b"K\x01s",
    "keys": b"}(" + ENDLESS + b"K\x01u",
    "a key of a dict": b"(" + ENDLESS + b"K\x01d",
    "a key of an OrderedDict": b"ccollections\nOrderedDict\n(]" + ENDLESS + b"K\x01\x86atR",
    "a key of a Counter": b"ccollections\nCounter\n(]" + ENDLESS + b"K\x01\x86atR",
    "a key of a stand-in": STAND_IN + ENDLESS + b"K\x01s",
    "an item of a set": b"\x8f(" + ENDLESS + b"\x90",
    "an item of a frozenset": b"(" + ENDLESS + b"\x91",
    "a set()": b"c__builtin__\nset\n(]" + ENDLESS + b"atR",
    "a call of a tuple": ENDLESS + b")R",
    "a call of a tuple without arguments": ENDLESS + b"K\x01R",
    "an object of a tuple": ENDLESS + b")\x81",
    "an object of a tuple with words": ENDLESS + b")}\x92",
    "an instance of a tuple": b"(" + ENDLESS + b"o",
    "a state for a tuple": ENDLESS + b"}b",
    "an attribute's name": STAND_IN + b"N}" + ENDLESS + b"K\x01s\x86b",
    "an item for a tuple": ENDLESS + b"K\x01a",
    "a walk over lists": nested_lists(),
    "a walk over tuples": ENDLESS,
    "a list inside itself": b"]2a",
    "bytearray(3e9)": b"c__builtin__\nbytearray\n" + number(3_000_000_000) + b"\x85R",
    "bytes(3e9)": b"c__builtin__\nbytes\n" + number(3_000_000_000) + b"\x85R",
    "torch.Tensor(3e9)": b"ctorch\nTensor\n" + number(3_000_000_000) + b"\x85R",
    "UntypedStorage(3e9)": b"ctorch.storage\nUntypedStorage\n" + number(3_000_000_000) + b"\x85R",
    "a quantised tensor": b"ctorch._utils\n_rebuild_qtensor\n)R",
    "a memo of 2^31": b"]r\xff\xff\xff\x7f",
    "copies of one text": b"(" + text("x" * 100_000) + b"q\x01"
    + b"c_codecs\nencode\nq\x02h\x01\x85R" + b"h\x02h\x01\x85R" * 60_000 + b"l",
    "1e6 dimensions": REBUILD + STORAGE + b"K\x00(" + number(2**47) + b"2" * 999_999 + b"t(K\x01"
    + b"2" * 999_999 + b"t" + HOOKS,
    "numbers of a megabyte": b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(" + number(1 << 8_000_000)
    + b"2" * 30 + b"tcnumpy\ndtype\n(U\x02f8tR\x89U\x00tb",
    "colliding keys": b"}(" + b"".join(number(key) + b"K\x01" for key in COLLIDING) + b"u",
    "keys without text": b"}(" + b"".join(number(key) + b"N" for key in range(30_001)) + b"u",
    "tuples as keys": b"}(" + b"".join(number(key) + b"\x85N" for key in range(3_001)) + b"u",
    "a set of colliding keys": b"\x8f(" + b"".join(map(number, COLLIDING)) + b"\x90",
    "three million sets": b"(" + b"\x8f" * 3_000_000 + b"l",
    "100,000 classes": b"(" + b"".join(b"ca\nB%d\n" % i for i in range(100_000)) + b"l",
}  # fmt: skip


def zip_file(
    path: Path, program: bytes, compression: int = zipfile.ZIP_STORED, values: int = 16
) -> None:
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/version", "3\n")
        with archive.open("a/data/0", "w", force_zip64=True) as entry:
            for start in range(0, values, 1 << 24):
                entry.write(bytes(min(1 << 24, values - start)))


def hostile_files(folder: Path) -> list[Path]:
    """Write the files: each value in a zip file that torch's loader takes, and in one that it refuses."""
    for index, (name, value) in enumerate(VALUES.items()):
        for kind, before in (("plain", b""), ("foreign", text("f") + STAND_IN)):
            program = b"\x80\x02}(" + before + text("w") + value + b"u."
            zip_file(folder / f"{index:02} {kind} {name}.pth".replace("/", "-"), program)
    start = b"".join(
        pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    )
    keys = start + b"\x80\x02}.\x80\x02]" + ENDLESS + b"a." + bytes(64)
    (folder / "legacy keys.pth").write_bytes(keys)
    storage = STORAGE.replace(b"K\x04", number(2**32))
    sizes = (
        start + b"\x80\x02}" + text("w") + REBUILD + storage + b"K\x00K\x04\x85K\x01\x85" + HOOKS
    )
    (folder / "legacy sizes.pth").write_bytes(sizes + b"s." + pickle.dumps(["0"], 2) + bytes(64))
    huge = number(2**29)
    tensor = REBUILD + STORAGE.replace(b"K\x04", huge) + b"K\x00" + huge + b"\x85K\x01\x85" + HOOKS
    program = b"\x80\x02}" + text("w") + tensor + b"s."
    zip_file(folder / "deflated.pth", program, zipfile.ZIP_DEFLATED, 1 << 31)
    os.mkfifo(folder / "pipe.pth")
    (folder / "device.pth").symlink_to("/dev/zero")
    return sorted(folder.glob("*.pth"))


READERS: dict[str, Callable[[Path], Any]] = {
    "read_torch": read_torch,
    "read_pickle": read_pickle,
    "--resume, --replay, compare_checkpoints": checkpoint.load,
}


def read_all(reader: str, files: list[Path], results: Path) -> None:
    """Write after each file what became of it, so that the last line names the one that ended all."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
    with results.open("w") as out:
        for file in files:
            print(f"{file.name}: ", end="", file=out, flush=True)
            try:
                READERS[reader](file)
                said = "read"
            except CheckpointError as error:
                told = (
                    str(file) in str(error)
                    and "\n" not in str(error)
                    and "MemoryError" not in str(error)
                )
                said = "refused" if told else f"other words: {error}"[:300]
            print(said, file=out, flush=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return hostile_files(tmp_path_factory.mktemp("hostile"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("reader", READERS)
def test_small_files_neither_hang_nor_take_memory(
    reader: str, files: list[Path], tmp_path: Path
) -> None:
    results = tmp_path / "results"
    process = forked.context().Process(target=read_all, args=(reader, files, results))
    process.start()
    process.join(10 * LIMIT)
    hung = process.is_alive()
    process.kill()
    process.join()
    lines = results.read_text().splitlines()
    assert not hung, f"no end: {lines[-1]}"
    assert process.exitcode == 0, lines[-1]
    assert len(lines) == len(files) > 90
    # nothing is built: an order that is none, a number of a memo, a call that is only remembered
    harmless = ["an order of bytes", "a memo"] + ["torch.Tensor"] * (reader == "read_torch")
    others = [line for line in lines if not any(name in line for name in harmless)]
    assert [line for line in others if not line.endswith(": refused")] == []
    assert all(line.endswith((": refused", ": read")) for line in lines)
