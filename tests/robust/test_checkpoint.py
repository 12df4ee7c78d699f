"""A checkpoint is found again as saved, or refused; a kill at any instant leaves the old or the new one."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

from utils.checkpoints import file
from utils.checkpoints.file import CheckpointError, load, newest_valid, save
from utils.checkpoints.folder import best, prune, sweep

META = {"config_digest": "abc", "metrics": {"loss": 0.5}}


def make_state(step: int, width: int = 8) -> dict:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(width, width, generator=generator)
    return {
        "framework": OrderedDict(weight=weight, count=torch.tensor(step)),
        "step": step,
        "config": "A: 1\n",
    }


def same(left: dict, right: dict) -> bool:
    return left["step"] == right["step"] and all(
        torch.equal(left["framework"][key], right["framework"][key]) for key in right["framework"]
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a forked child and return its wait status; the child dies by SIGALRM if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_what_is_found_is_what_was_saved(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    for step in (5, 12):
        path = save(tmp_path, step, make_state(step), meta=META)
    found = newest_valid(tmp_path)
    assert found is not None
    assert (found.path, found.step, found.meta) == (path, 12, META)
    assert same(load(found.path), make_state(12))
    assert names(tmp_path) == [f"ckpt_000000{s}.{e}" for s in ("05", "12") for e in ("json", "pt")]


def test_the_file_is_an_ordinary_torch_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state(1), meta={})
    assert same(torch.load(path, weights_only=True), make_state(1))
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["step"] == 1
    assert record["bytes"] == path.stat().st_size


def test_state_of_module_and_optimizer_survives(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    path = save(
        tmp_path, 1, {"model": module.state_dict(), "optimizer": optimizer.state_dict()}, meta={}
    )
    loaded = load(path)
    assert loaded["model"]._metadata == module.state_dict()._metadata
    module.load_state_dict(loaded["model"], strict=True)
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"row": torch.randn(1000, 1000)[0]}, meta={})
    assert path.stat().st_size < 20_000


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, make_state(1), meta={})
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


def test_unfinished_metrics_in_meta_stay_valid_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_state(1), meta={"loss": float("nan")})
    assert (
        json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)["loss"]
        == "nan"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensors_are_refused_by_name(tmp_path: Path, value: float) -> None:
    state = make_state(1)
    state["optimizer"] = {"state": {0: [torch.ones(3), torch.tensor([1.0, value])]}}
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.0\[1\].* 1 of 2 values"):
        save(tmp_path, 1, state, meta={})
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", [Path("x"), slice(1), object(), torch.nn.Identity()])
def test_types_that_would_not_load_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^a\.b: .*weights_only"):
        save(tmp_path, 1, {"a": {"b": value}}, meta={})


def test_meta_cannot_fake_a_record(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="sha256"):
        save(tmp_path, 1, make_state(1), meta={"sha256": "0"})


def test_meta_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="JSON values"):
        save(tmp_path, 1, make_state(1), meta={"x": object()})
    assert names(tmp_path) == []


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """Return the newer of two committed checkpoints, steps 1 and 2."""
    save(tmp_path, 1, make_state(1), meta=META)
    return save(tmp_path, 2, make_state(2), meta=META)


def assert_falls_back(newest: Path) -> None:
    found = newest_valid(newest.parent)
    assert found is not None
    assert found.step == 1
    assert found.meta == META
    assert same(load(found.path), make_state(1))


def test_flipped_bits_are_never_silent(pair: Path) -> None:
    rng = random.Random(0)
    for victim in (pair, pair.with_suffix(".json")):
        whole = victim.read_bytes()
        for _ in range(300):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            victim.write_bytes(data)
            found = newest_valid(pair.parent)
            assert found is not None
            # only a flip that changes nothing that is read, such as a space of the JSON
            if found.step == 2:
                assert victim.suffix == ".json"
                assert found.meta == META
                assert same(load(found.path), make_state(2))
            else:
                with pytest.raises(CheckpointError):
                    load(pair)
        victim.write_bytes(whole)


def test_truncations_fall_back(pair: Path) -> None:
    rng = random.Random(1)
    for victim in (pair, pair.with_suffix(".json")):
        whole = victim.read_bytes()
        for size in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(40))]:
            victim.write_bytes(whole[:size])
            assert_falls_back(pair)
            with pytest.raises(CheckpointError):
                load(pair)
        victim.write_bytes(whole)


def zero_page(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def swap_json(path: Path) -> None:
    other = path.with_name("ckpt_00000001.json").read_bytes()
    path.with_suffix(".json").write_bytes(other)


def swap_both(path: Path) -> None:
    for suffix in (".pt", ".json"):
        shutil.copy(path.with_name("ckpt_00000001" + suffix), path.with_suffix(suffix))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (zero_page, "does not have the sha256"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "bytes"),
        (folder_in_place, "is a folder"),
        (lambda path: path.unlink(), "is missing although"),
        (swap_json, "named after step 2"),
        (swap_both, "named after step 2"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "not a record"),
        (lambda path: path.with_suffix(".json").write_text("[" * 100_000), "not a record"),
        (lambda path: path.with_suffix(".json").write_text('{"step": 2}'), "not a record"),
        (lambda path: folder_in_place(path.with_suffix(".json")), "Is a directory"),
    ],
)
def test_each_rejected_checkpoint_is_logged_with_its_reason(
    pair: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object], reason: str
) -> None:
    damage(pair)
    with caplog.at_level(logging.WARNING, logger="synco"):
        assert_falls_back(pair)
    assert any(reason in message and "ckpt_00000002" in message for message in caplog.messages)


def test_missing_json_means_it_never_happened(pair: Path) -> None:
    pair.with_suffix(".json").unlink()
    assert_falls_back(pair)


def test_first_save_killed_before_its_commit_restarts_fresh(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, make_state(1), meta={}).with_suffix(".json").unlink()
    with caplog.at_level(logging.WARNING, logger="synco"):
        assert newest_valid(tmp_path) is None
    assert "never finished" in caplog.text


def test_none_valid_stops_with_every_reason(pair: Path) -> None:
    zero_page(pair)
    pair.with_name("ckpt_00000001.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"(?s)2 checkpoint.*00000002.*sha256.*00000001.*bytes.*step 0"
    ):
        newest_valid(pair.parent)


def test_sweep_removes_only_unfinished_files(pair: Path) -> None:
    for name in ("ckpt_00000003.pt.tmp", "ckpt_00000003.json.tmp", "other.tmp"):
        pair.with_name(name).touch()
    sweep(pair.parent)
    assert "other.tmp" in names(pair.parent)
    assert len(names(pair.parent)) == 5


def test_load_tells_missing_from_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "a.pt")
    save(tmp_path, 3, make_state(3), meta={})
    with pytest.raises(CheckpointError, match=r"is a folder.*ckpt_00000003\.pt"):
        load(tmp_path)


def test_load_refuses_what_is_no_torch_file(tmp_path: Path) -> None:
    for name, content in (
        ("empty.pt", b""),
        ("page.pt", b"<html>not found</html>"),
        ("zip.pt", b"PK\3\4rest"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=r"empty|not a torch file|truncated"):
            load(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        load(tmp_path / "other.pt")
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        load(tmp_path / "tensor.pt")


class Payload:
    """Create a file when unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("zipped", [True, False])
def test_files_that_need_unpickling_are_refused_with_a_remedy(tmp_path: Path, zipped: bool) -> None:
    mark, path = tmp_path / "executed", tmp_path / "evil.pt"
    torch.save({"x": Payload(str(mark))}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mkdir.*execute code.*save its tensors"):
        load(path)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match=r"TorchScript|unpickling"):
        load(tmp_path / "script.pt")


def test_published_files_without_json_are_checked_by_their_checksums(tmp_path: Path) -> None:
    path = tmp_path / "published.pth"
    torch.save({"state_dict": {"weight": torch.randn(64, 64)}}, path)
    (tmp_path / "published.json").write_text('{"lr": 1}')  # a neighbour that vouches for nothing
    whole, rng = path.read_bytes(), random.Random(2)
    weight = load(path)["state_dict"]["weight"]
    silent = 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            silent += not torch.equal(load(path)["state_dict"]["weight"], weight)
        except (CheckpointError, KeyError):
            pass
    assert silent == 0


def test_files_before_torch_1_6_load(tmp_path: Path) -> None:
    torch.save(make_state(1), tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    assert same(load(tmp_path / "old.pth.tar"), make_state(1))


def steps_left(folder: Path) -> list[int]:
    assert {p.stem for p in folder.glob("*.pt")} == {p.stem for p in folder.glob("*.json")}
    return sorted(int(path.stem[5:]) for path in folder.glob("*.json"))


def filled(folder: Path, count: int) -> None:
    for step in range(1, count + 1):
        save(folder, step, make_state(step), meta={})


def test_prune_keeps_last_every_and_protected(tmp_path: Path) -> None:
    filled(tmp_path, 9)
    prune(tmp_path, keep_last=2, keep_every=3, protect=[tmp_path / "ckpt_00000004.pt"])
    assert steps_left(tmp_path) == [3, 4, 6, 8, 9]


@pytest.mark.parametrize("keep_last", [-1, 0, 1, 2])
def test_prune_never_goes_below_two(tmp_path: Path, keep_last: int) -> None:
    filled(tmp_path, 4)
    prune(tmp_path, keep_last=keep_last)
    assert steps_left(tmp_path) == [3, 4]


def test_prune_counts_only_what_verifies(tmp_path: Path) -> None:
    filled(tmp_path, 5)
    for step in (3, 5):
        zero_page(tmp_path / f"ckpt_0000000{step}.pt")
    prune(tmp_path, keep_last=2)
    assert steps_left(tmp_path) == [2, 4, 5]


def test_prune_clears_what_a_killed_prune_left(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    (tmp_path / "ckpt_00000001.json").unlink()
    prune(tmp_path, keep_last=2)
    assert steps_left(tmp_path) == [3, 4]


def test_prune_survives_a_failed_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    filled(tmp_path, 4)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "denied", str(path))

    monkeypatch.setattr(os, "remove", refuse)
    with caplog.at_level(logging.WARNING, logger="synco"):
        prune(tmp_path, keep_last=2)
    assert "cannot remove" in caplog.text
    assert steps_left(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("room", [0, 100, 5_000, 100_000])
def test_full_disk_raises_oserror_and_leaves_the_old(pair: Path, room: int, step: int) -> None:
    before = {path.name: path.read_bytes() for path in pair.parent.iterdir()}

    def attempt() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        try:
            save(pair.parent, step, make_state(9, width=256), meta={})
        except OSError:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            save(pair.parent, 4, make_state(4), meta={})  # room again: the process goes on
            os._exit(42)

    assert os.waitstatus_to_exitcode(in_child(attempt)) == 42
    after = {path.name: path.read_bytes() for path in pair.parent.iterdir()}
    assert {name: after.pop(name) for name in before} == before
    assert sorted(after) == ["ckpt_00000004.json", "ckpt_00000004.pt"]


def test_full_disk_at_the_json_leaves_no_half(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, replace = names(pair.parent), os.replace

    def refuse_json(source: Path, target: Path) -> None:
        if Path(target).suffix == ".json":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_json)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space"):
            save(pair.parent, step, make_state(9), meta={})
        assert names(pair.parent) == before
        found = newest_valid(pair.parent)
        assert found is not None
        assert same(load(found.path), make_state(2))


def test_an_oserror_that_torch_wraps_comes_out_as_oserror(tmp_path: Path) -> None:
    def wrapping_save(state: object, file: BinaryIO) -> None:
        try:
            file.write(bytes(1 << 20))
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error

    def attempt() -> None:
        torch.save = wrapping_save
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            save(tmp_path, 1, make_state(1), meta={})
        except OSError as error:
            os._exit(42 if error.errno == errno.EFBIG else 43)

    assert os.waitstatus_to_exitcode(in_child(attempt)) == 42
    assert names(tmp_path) == []


def kill_at(call: int, before: bool) -> None:
    """Make the process SIGKILL itself before or after its `call`-th fsync, rename or removal."""
    count = 0

    def counted(real: Callable[..., None]) -> Callable[..., None]:
        def wrapper(*args: object) -> None:
            nonlocal count
            count += 1
            if before and count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapper

    for name in ("fsync", "replace", "remove"):
        setattr(os, name, counted(getattr(os, name)))


def crash_everywhere(folder: Path, action: Callable[[], None], check: Callable[[], None]) -> int:
    """Kill `action` at each point, from the same start, `check` what it left, return the number of points."""
    start = folder.with_name("start")
    shutil.copytree(folder, start)
    for point in range(2 * 100):

        def run(point: int = point) -> None:
            kill_at(point // 2 + 1, before=point % 2 == 0)
            action()

        status = in_child(run)
        check()
        shutil.rmtree(folder)
        if status == 0:  # beyond the last call
            shutil.rmtree(start)
            return point
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        shutil.copytree(start, folder)
    raise AssertionError("the action never ends")


def state_found(folder: Path) -> dict | None:
    found = newest_valid(folder)
    return load(found.path) if found else None


def test_kill_at_any_instant_of_a_new_save(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    save(folder, 1, make_state(1), meta={})
    seen = set()

    def check() -> None:
        state = state_found(folder)
        assert state is not None
        assert same(state, make_state(state["step"]))
        seen.add(state["step"])

    points = crash_everywhere(
        folder, lambda: save(folder, 2, make_state(2), meta={}) and None, check
    )
    assert points >= 8
    assert seen == {1, 2}


def test_kill_at_any_instant_of_the_first_save(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    seen = set()

    def check() -> None:
        state = state_found(folder)
        assert state is None or same(state, make_state(1))
        seen.add(state is None)

    crash_everywhere(folder, lambda: save(folder, 1, make_state(1), meta={}) and None, check)
    assert seen == {True, False}


def test_kill_at_any_instant_of_saving_a_step_again(tmp_path: Path) -> None:
    """The only checkpoint is replaced: at no instant is it gone."""
    folder = tmp_path / "run"
    save(folder, 1, make_state(1), meta={"try": 1})
    seen = set()

    def check() -> None:
        state = state_found(folder)
        assert state is not None
        old, new = same(state, make_state(1)), same(state, {**make_state(7), "step": 1})
        assert old != new
        seen.add(new)

    again = {**make_state(7), "step": 1}
    crash_everywhere(folder, lambda: save(folder, 1, again, meta={"try": 2}) and None, check)
    assert seen == {True, False}


def test_kill_at_any_instant_of_prune(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    filled(folder, 5)

    def check() -> None:
        state = state_found(folder)
        assert state is not None
        assert same(state, make_state(5))
        assert {p.stem for p in folder.glob("*.json")} <= {p.stem for p in folder.glob("*.pt")}
        sweep(folder)
        prune(folder, keep_last=2)
        assert steps_left(folder) == [4, 5]

    assert crash_everywhere(folder, lambda: prune(folder, keep_last=2), check) >= 6


@pytest.mark.parametrize(
    "edit",
    [
        b'"step": 1e999',
        b'"step": 1e3',
        b'"step": "7"',
        b'"step": -1',
        b'"step": true',
        b'"step": 99999999999999999999999',
        b'"step": NaN',
    ],
)
def test_a_record_with_an_odd_step_is_no_record(edit: bytes, tmp_path: Path) -> None:
    for step in (6, 7):
        save(tmp_path, step, {"w": torch.ones(2)}, meta={})
    record = tmp_path / "ckpt_00000007.json"
    record.write_bytes(record.read_bytes().replace(b'"step": 7', edit))
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 6


@pytest.mark.parametrize(
    "replaces", [7, "x", [1], {}, {"bytes": "7", "sha256": ""}, {"bytes": 1, "sha256": 7}]
)
def test_a_sealed_record_that_replaces_something_odd_is_passed_over(
    replaces: Any, tmp_path: Path
) -> None:
    for step in (6, 7):
        save(tmp_path, step, {"w": torch.ones(2)}, meta={})
    path = tmp_path / "ckpt_00000007.json"
    record = {**json.loads(path.read_text()), "replaces": replaces}
    record.pop("seal")
    path.write_text(json.dumps({**record, "seal": file._seal(record)}))
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == (7 if replaces == {} else 6)


def test_a_record_of_megabytes_is_no_record(tmp_path: Path) -> None:
    for step in (6, 7):
        save(tmp_path, step, {"w": torch.ones(2)}, meta={"note": "x" * (step // 7 << 21)})
    found = newest_valid(tmp_path)
    assert found is not None
    assert found.step == 6


def test_only_numbers_of_a_record_are_an_evaluation(tmp_path: Path) -> None:
    odd = {"a": 10**400, "b": True, "c": "x", "d": None, "e": [1.0]}
    save(tmp_path, 1, {"w": torch.ones(2)}, meta={"evaluated": {**odd, "n": float("nan"), "ok": 2}})
    save(tmp_path, 2, {"w": torch.ones(2)}, meta={"evaluated": [1]})
    values = file.evaluation_of(file.read_record(tmp_path / "ckpt_00000001.pt"))
    assert values.pop("n") != 0.0  # not a number, as it was
    assert values == {"ok": 2.0}
    assert file.evaluation_of(file.read_record(tmp_path / "ckpt_00000002.pt")) == {}
    assert best(tmp_path, "a") is None
    assert best(tmp_path, "n") is None
    assert best(tmp_path, "ok") == tmp_path / "ckpt_00000001.pt"
