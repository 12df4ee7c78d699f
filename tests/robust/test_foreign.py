"""Files of others are data: their tensors come out, and nothing that they name is imported or called."""

import argparse
import builtins
import collections
import contextlib
import functools
import importlib
import io
import operator
import os
import pickle
import random
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from yacs.config import CfgNode

from tools import convert
from utils.checkpoints.file import CheckpointError, load
from utils.checkpoints.foreign import read_pickle, read_torch
from utils.checkpoints.pickles import StandIn
from utils.checkpoints.rebuild import ForeignFileError

# ---- what honest files hold ----------------------------------------------------------------------


def published() -> dict[str, Any]:
    """Return what published codes save: tensors beside a yacs node, numpy scalars, a Namespace."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.step()
    return {
        "model": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "config": CfgNode({"MODEL": {"NAME": "moby"}, "TRAIN": {"EPOCHS": 300}}),
        "args": argparse.Namespace(lr=0.1, out=Path("a")),
        "max_accuracy": np.float64(72.5),
        "array": np.arange(6.0).reshape(2, 3).T,
        "half": torch.arange(5, dtype=torch.bfloat16),
        "view": torch.arange(12.0).reshape(3, 4)[:, 1:3],
        "parameter": nn.Parameter(torch.ones(2)),
    }


FORMATS: dict[str, dict[str, Any]] = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "before torch 1.6": {"_use_new_zipfile_serialization": False},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_files_that_pickle_a_configuration_give_their_tensors(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = published()
    torch.save(saved, tmp_path / "a.pth", **FORMATS[form])
    read = read_torch(tmp_path / "a.pth")
    for key, tensor in saved["model"].items():
        assert torch.equal(read["model"][key], tensor)
        assert read["model"][key].dtype == tensor.dtype
    for key in ("half", "view", "parameter"):
        assert torch.equal(read[key], saved[key])
    assert np.array_equal(read["array"], saved["array"])
    assert read["max_accuracy"] == 72.5
    assert torch.equal(
        read["optimizer"]["state"][0]["exp_avg"], saved["optimizer"]["state"][0]["exp_avg"]
    )
    config = read["config"]
    assert isinstance(config, StandIn)
    assert config.entries["TRAIN"].entries == {"EPOCHS": 300}
    assert "left out as data only: argparse.Namespace" in caplog.text


@pytest.mark.parametrize("read", [read_torch, load])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_whole_pickled_module_is_named_with_the_remedy(
    form: str, read: Callable[[Path], object], tmp_path: Path
) -> None:
    """What `torch.save(model)` writes is refused in the words of its user, not of this reader."""
    file = tmp_path / "a.pth"
    torch.save(nn.Sequential(nn.Linear(2, 3)), file, **FORMATS[form])
    with pytest.raises(CheckpointError) as caught:
        read(file)
    said = str(caught.value)
    assert said.startswith(f"{file} holds a whole pickled module (torch.nn.modules.container.Seq")
    assert "torch.save(model.state_dict(), FILE)" in said
    assert "StandIn" not in said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (argparse.Namespace(lr=0.1), "a pickled argparse.Namespace, not a dictionary of tensors"),
        ([torch.ones(2)], "a list, not a dictionary of tensors"),
        (torch.ones(2), "a Tensor, not a dictionary of tensors"),
    ],
)
def test_what_is_no_dictionary_is_named(value: object, said: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"a.pth holds {said}$"):
        read_torch(tmp_path / "a.pth")


@pytest.mark.parametrize("foreign", [False, True], ids=["weights alone", "with a configuration"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_every_kind_of_value_comes_out_as_it_was_saved(
    form: str, foreign: bool, tmp_path: Path
) -> None:
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8]
    kinds += [torch.bool, torch.complex64, torch.uint16, torch.uint64]
    tensors = {str(kind): torch.ones(3, 2).to(kind) for kind in kinds}
    base = torch.arange(12.0)
    tensors |= {"base": base, "part": base[2:5], "t": base.view(3, 4).t(), "0": torch.tensor(3)}
    tensors |= {"none": torch.empty(0, 3), "parameter": nn.Parameter(torch.ones(2))}
    values = {
        "counter": collections.Counter([1, 1, 30]),
        "default": collections.defaultdict(dict, {3: {"x": 1}}),
        "ordered": collections.OrderedDict(a=1),
        "sets": [{1, "a"}, frozenset([2]), {1.5}],
        "bytes": [b"\x00\xff", bytearray(b"12"), b""],
        "torch": [torch.Size([1, 2]), torch.float16],
        "numbers": [2**70, -5, 1.5, 1 + 2j, None, True, (1, (2, 3)), ()],
        "classes": {index: str(index) for index in range(21_841)},  # as many as ImageNet-21k
        "keys": {1: 1, (0, "a"): 2, None: 3, 2**40: 4, 1.5: 5},
    }
    saved = {**tensors, **values} | ({"config": CfgNode({"A": 1})} if foreign else {})
    torch.save(saved, tmp_path / "a.pth", **FORMATS[form])
    read = read_torch(tmp_path / "a.pth")
    assert list(read) == list(saved)
    for key, tensor in tensors.items():
        assert torch.equal(read[key], tensor)
        assert read[key].dtype == tensor.dtype
        assert read[key].stride() == tensor.stride()
    assert read["part"].untyped_storage().data_ptr() == read["base"].untyped_storage().data_ptr()
    assert {key: read[key] for key in values} == values
    assert [type(item) for item in read["sets"] + read["bytes"]] == [
        type(item)
        for item in values["sets"] + values["bytes"]  # type: ignore[operator]
    ]
    read["base"][0] = 7.0  # it may be written


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_read_as_they_were_written(protocol: int, tmp_path: Path) -> None:
    """The ground truth of the revisited Oxford and Paris sets is such a file."""
    query = {"bbx": np.array([136.5, 34.1]), "easy": np.array([3, 5]), "hard": [], "ok": {1, 2}}
    truth = {
        "gnd": [query, query],
        "imlist": ["a", "b"],
        "qimlist": ["q"],
        "n": np.int64(3),
        7: (1.5, None, True),
    }
    (tmp_path / "gnd.pkl").write_bytes(pickle.dumps(truth, protocol=protocol))
    read = read_pickle(tmp_path / "gnd.pkl")
    assert read.keys() == truth.keys()
    assert np.array_equal(read["gnd"][0]["bbx"], query["bbx"])
    assert read["gnd"][0]["easy"].dtype == np.int64
    assert read["gnd"][0] is read["gnd"][1]
    assert (read["gnd"][0]["ok"], read["gnd"][0]["hard"], read["n"], read[7]) == (
        {1, 2},
        [],
        3,
        (1.5, None, True),
    )


def test_plain_pickles_may_hold_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"config": CfgNode({"A": 1})}))
    with pytest.raises(
        ForeignFileError, match=r"a\.pkl asks for yacs\.config\.CfgNode; only plain data"
    ):
        read_pickle(tmp_path / "a.pkl")


# ---- what hostile files try ----------------------------------------------------------------------


class Calls:
    """Pickles as a call of ``function(*arguments)``, then whatever reduce allows besides."""

    def __init__(self, function: Callable[..., Any], *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(canary: Path) -> dict[str, Any]:
    """Return twelve objects of which each would create the file ``canary`` if the pickle were run."""
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    script = canary.with_suffix(".py")
    script.write_text(code)
    return {
        "os.system": Calls(os.system, touch),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "subprocess": Calls(subprocess.call, ["touch", str(canary)]),
        "open": Calls(open, str(canary), "w"),
        "getattr chain": Calls(getattr, Calls(importlib.import_module, "os"), "system"),
        "operator": Calls(operator.methodcaller("touch"), canary),
        "partial": Calls(functools.partial(os.system, touch)),
        "runpy": Calls(runpy.run_path, str(script)),
        "nested reduce": Calls(list, [Calls(map, os.system, [touch])]),
        "pickle in pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, touch))),
        "yacs runs py files": Calls(CfgNode._load_cfg_py_source, str(script)),
    }


def raw_programs(canary: Path) -> dict[str, bytes]:
    """Return pickle programs that no pickler writes."""
    call = b"cposix\nsystem\n(Vtouch " + str(canary).encode() + b"\ntR"
    return {
        "state for a class": b"cutils.inert\nStandIn\n}(V__init__\ncposix\nsystem\nub.",
        "state for a dictionary": b"}}(V__class__\ncbuiltins\nobject\nub.",
        "slots of a function": b"ctorch._utils\n_rebuild_tensor_v2\n(N}V__defaults__\n(I1\ntstb.",
        "discarded call": call + b"0}.",
        "call as a key": b"}" + call + b"Ns.",
        "instance": b"(Vtouch " + str(canary).encode() + b"\niposix\nsystem\n.",
        "extension registry": b"\x82\x01.",
        "persistent id": b"Pstorage\n.",
        "dotted name": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93)R.",
        "mark out of place": b"(2(e.",
    }


LOADERS: dict[str, Callable[[Path], Any]] = {
    "read_torch": read_torch,
    "convert": convert._read,
    "read_pickle": read_pickle,
}


def write(form: str, content: Any, path: Path) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_hostile_objects_are_never_executed(form: str, loader: str, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    payloads = hostile(canary)
    assert len(payloads) == 12
    for name, payload in payloads.items():
        content = (
            payload if form == "pickle" else {"model": {"w": torch.ones(2)}, "config": payload}
        )
        write(form, content, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"^\S*x\.pth ") as refused:
            LOADERS[loader](tmp_path / "x.pth")
        assert "\n" not in str(refused.value), name
        assert not canary.exists(), name


def test_the_hostile_objects_would_work_if_run(tmp_path: Path) -> None:
    """Else the test above proves nothing: most of them do create the file when unpickled in earnest."""
    worked = []
    for name, payload in hostile(tmp_path / "executed").items():
        data = pickle.dumps(payload)
        with contextlib.suppress(Exception):
            pickle.loads(data)
        if (tmp_path / "executed").exists():
            worked.append(name)
            (tmp_path / "executed").unlink()
    assert len(worked) >= 9


@pytest.mark.parametrize("loader", LOADERS)
def test_raw_programs_are_never_executed_and_change_nothing(loader: str, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    before = (torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(StandIn)), set(dir(builtins)))
    for name, program in raw_programs(canary).items():
        (tmp_path / "x.pkl").write_bytes(program)
        with pytest.raises(CheckpointError, match=r"^\S*x\.pkl "):
            LOADERS[loader](tmp_path / "x.pkl")
        assert not canary.exists(), name
    assert (
        torch._utils._rebuild_tensor_v2.__defaults__,
        dict(vars(StandIn)),
        set(dir(builtins)),
    ) == before


def test_reading_imports_nothing_that_the_file_names(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    program = b"}V" + b"config\n" + b"cevil_module\nConfig\n)Rs."
    (tmp_path / "x.pkl").write_bytes(program)
    sys.path.insert(0, str(tmp_path))
    try:
        read = read_torch(tmp_path / "x.pkl")
    finally:
        sys.path.remove(str(tmp_path))
    assert str(read["config"]) == "evil_module.Config"
    assert "evil_module" not in sys.modules


# ---- what huge declared sizes try ----------------------------------------------------------------


def rebuilt(shape: tuple, stride: tuple, count: int = 4, offset: int = 0) -> bytes:
    """Return a torch file whose only tensor has this shape over four stored float32 values."""
    config = io.BytesIO()  # a pickled configuration makes the file go our way
    torch.save({"w": torch.zeros(4), "config": CfgNode({})}, config)
    source = zipfile.ZipFile(config)
    out = io.BytesIO()

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return (
                ("storage", torch.FloatStorage, "0", "cpu", count)
                if isinstance(value, Storage)
                else None
            )

    program = io.BytesIO()
    tensor = Calls(
        torch._utils._rebuild_tensor_v2,
        Storage(),
        offset,
        shape,
        stride,
        False,
        collections.OrderedDict(),
    )
    Pickler(program, protocol=2).dump({"config": CfgNode({}), "w": tensor})
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in source.namelist():
            archive.writestr(
                name, program.getvalue() if name.endswith("data.pkl") else source.read(name)
            )
    return out.getvalue()


def test_the_crafted_file_reads_when_its_sizes_are_true(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(rebuilt((2, 2), (2, 1)))
    assert torch.equal(read_torch(tmp_path / "a.pth")["w"], torch.zeros(2, 2))


@pytest.mark.parametrize(
    "data",
    [
        rebuilt((2**40,), (0,)),
        rebuilt((2**20, 2**20), (0, 0)),
        rebuilt((4,), (1,), offset=3),
        rebuilt((2,), (-1,)),
        rebuilt((2**63,), (1,)),
        rebuilt((4,), (1,), count=2**40),
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x8d" + (2**40).to_bytes(8, "little") + b"x.",
        b"\x8b" + (2**31 - 1).to_bytes(4, "little") + b"\x01.",
        b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
        b"(" * 100_000 + b"t" * 100_000 + b".",
        pickle.dumps(Calls(bytes, 2**40)),
        pickle.dumps(Calls(np.zeros, 2**40)),
        b"I" + b"9" * 100_000 + b"\n.",
    ],
    ids=[
        *("wide", "square", "offset", "negative", "overflow", "storage", "bytes8", "text8", "long", "key"),
        *("deep", "bytes()", "zeros()", "digits"),
    ],
)  # fmt: skip
def test_huge_declared_sizes_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"^\S*a\.pth "):
        read_torch(tmp_path / "a.pth")


def test_tensors_larger_than_their_values_are_refused_in_ordinary_files_too(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(2**30)}, tmp_path / "a.pth")
    with pytest.raises(
        ForeignFileError, match=r"a\.pth holds a tensor of shape \(1073741824,\) without"
    ):
        read_torch(tmp_path / "a.pth")


def test_compressed_archives_are_refused_before_they_unpack(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as source:
        with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
            for name in source.namelist():
                archive.writestr(name, source.read(name))
    with pytest.raises(ForeignFileError, match=r"b\.pth unpacks to more bytes than it has"):
        read_torch(tmp_path / "b.pth")


# ---- what chance does ----------------------------------------------------------------------------


def damaged(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 4])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "safetensors"])
def test_damaged_files_raise_only_our_error(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    if form == "safetensors":
        save_file({"w": torch.arange(3.0), "n": torch.tensor(2)}, path)
    else:
        content = {"w": np.arange(3.0), "c": CfgNode({"A": [1]}), "t": (1, "x")}
        write(form, content if form == "pickle" else {**content, "x": torch.arange(3.0)}, path)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(400):
        path.write_bytes(damaged(whole, draw))
        with contextlib.suppress(CheckpointError):
            read_torch(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a folder; name a checkpoint file in it"),
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("weights"), "is no file of weights, or damaged"),
        (lambda path: path.write_bytes(pickle.dumps([1])), "holds a list, not a dictionary"),
    ],
    ids=["folder", "missing", "empty", "text", "list"],
)
def test_what_is_no_file_of_weights_is_called_what_it_is(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        read_torch(tmp_path / "a.pth")
