"""Features on the disk are used when they are those of the weights and images, and only then."""

import errno
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from torch import Tensor

import evaluation.feature_cache
import main_linear
from data.sources.base import ArraySource
from evaluation.feature_cache import cached_features
from evaluation.features import Features, SharedFeatures
from models import framework_options
from utils.config.load import load_config
from utils.config.schema import declare

LABELS = torch.arange(10) % 3
KEY = {
    "weights": "a" * 64,
    "data": "10:b",
    "view": "eval at 8",
    "precision": "fp32",
    "backbone": {"stem": "x"},
}


def computed(rows: Tensor | None = None, indices: Tensor | None = None) -> SharedFeatures:
    rows = torch.arange(40.0).view(10, 4) if rows is None else rows
    indices = torch.arange(len(rows)) if indices is None else indices
    return SharedFeatures(
        rows, LABELS[indices], indices, torch.device("cpu"), torch.arange(len(rows))
    )


def load(
    folder: Path, key: dict[str, Any] = KEY, split: str = "train", **more: Any
) -> tuple[Features, int]:
    """Return the features and how often they were computed."""
    calls = []

    def compute() -> SharedFeatures:
        calls.append(1)
        return computed()

    found = cached_features(folder, split, key, LABELS, torch.device("cpu"), compute, **more)
    return found, len(calls)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name != "features.lock")


def test_features_are_computed_once(tmp_path: Path) -> None:
    (first, times), (second, again) = load(tmp_path), load(tmp_path)
    assert (times, again) == (1, 0)
    for features in (first, second):
        assert torch.equal(features.whole()[0], computed().rows)
        assert torch.equal(features.labels, LABELS)
    assert [path.suffix for path in files(tmp_path)] == [".json", ".npy"]


@pytest.mark.parametrize("name", KEY)
def test_other_weights_images_or_options_are_other_features(tmp_path: Path, name: str) -> None:
    load(tmp_path)
    assert load(tmp_path, {**KEY, name: "other"})[1] == 1
    assert load(tmp_path)[1] == 0
    assert load(tmp_path, split="val")[1] == 1


def spoil_byte(data: Path, record: Path) -> None:
    content = bytearray(data.read_bytes())
    content[-3] ^= 1
    data.write_bytes(content)


def spoil_key(data: Path, record: Path) -> None:
    record.write_text(json.dumps({**json.loads(record.read_text()), "key": {}}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_byte, "damaged"),
        (lambda data, record: data.write_bytes(data.read_bytes()[:-4]), "damaged"),
        (lambda data, record: data.unlink(), "cannot be read"),
        (lambda data, record: record.write_text("{"), "cannot be read"),
        (lambda data, record: record.write_text("[]"), "cannot be read"),
        (lambda data, record: record.unlink(), "none yet"),  # killed before the commit
        (spoil_key, "something else"),
    ],
)
def test_what_does_not_verify_is_computed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, reason: str
) -> None:
    load(tmp_path)
    record, data = files(tmp_path)
    spoil(data, record)
    with caplog.at_level(logging.INFO, logger="synco"):
        features, times = load(tmp_path)
    assert times == 1
    assert reason in caplog.text
    assert torch.equal(features.whole()[0], computed().rows)
    assert load(tmp_path)[1] == 0


def test_images_without_features_stay_out(tmp_path: Path) -> None:
    indices = torch.tensor([0, 1, 2, 4, 5, 7, 8, 9])
    rows = torch.randn(8, 4)
    for compute in (lambda: computed(rows, indices), None):  # the second time from the file
        features = cached_features(tmp_path, "train", KEY, LABELS, torch.device("cpu"), compute)
        assert features.indices.tolist() == indices.tolist()
        assert torch.equal(features.labels, LABELS[indices])
        few = features.select(torch.tensor([3, 4, 9]))
        assert few.indices.tolist() == [4, 9]
        assert torch.equal(few.whole()[0], rows[[3, 7]])


def test_an_evaluation_reads_but_writes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "none"
    assert load(folder, write=False)[1] == 1
    assert not folder.exists()
    load(folder)
    assert load(folder, write=False)[1] == 0


def test_a_failed_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation.feature_cache, "_fill", full)
    with pytest.raises(OSError, match="No space"):
        load(tmp_path)
    assert files(tmp_path) == []


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        cached_features(
            tmp_path,
            "train",
            KEY,
            LABELS,
            torch.device("cpu"),
            lambda: computed(torch.full((10, 4), torch.nan)),
        )
    assert files(tmp_path) == []


def hold(folder: Path, ready: Any, enough: Any) -> None:
    with evaluation.feature_cache._alone(folder):
        ready.set()
        enough.wait(60)


def test_a_second_run_waits_for_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation.feature_cache, "_POLL", 0.05)
    ready, enough = forked.context().Event(), forked.context().Event()
    other = forked.context().Process(target=hold, args=(tmp_path, ready, enough))
    other.start()
    assert ready.wait(60)
    said = evaluation.feature_cache.logger.info

    def say(*args: Any) -> None:
        said(*args)
        if "waiting" in args[0]:
            enough.set()

    monkeypatch.setattr(evaluation.feature_cache.logger, "info", say)
    with caplog.at_level(logging.INFO, logger="synco"):
        load(tmp_path)
    other.join(60)
    assert caplog.text.count("waiting") == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_waits_for_nobody(
    code: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("utils.checkpoints.locks.fcntl.lockf", refuse)
    load(tmp_path)
    assert caplog.text.count("has no locks") == 1
    assert "another run" not in caplog.text


def read_after_a_cut(folder: str) -> list[str]:
    features, _ = load(Path(folder))
    (file,) = Path(folder).glob("*.npy")
    said = [str(len(features.whole()[0]))]
    os.truncate(file, 0)
    part = features.select(torch.arange(5))
    for read in (
        features.whole,
        part.whole,
        lambda: features.at(torch.tensor([9])),
        features.blocks,
    ):
        with pytest.raises(ValueError, match=r"was cut while it was in use, .*: start again"):
            read()
        said.append("refused")
    return said


def test_features_that_are_cut_while_in_use_end_no_process(tmp_path: Path) -> None:
    load(tmp_path)
    with forked.pool(1) as pool:
        assert pool.run(read_after_a_cut, str(tmp_path)) == [["10", *["refused"] * 4]]
    assert load(tmp_path)[1] == 1  # computed anew


@pytest.mark.parametrize("sizes", [(), ("AUG.VIEW_SIZE=48",)])
def test_features_of_a_swin_of_several_sizes_are_not_those_of_timms(
    sizes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = ["DATA.IMG_SIZE=56", "MODEL.BACKBONE.NAME=swin_tiny", *sizes]
    cfg = load_config(declare(framework_options()), [], [*opts, "LINEAR.CACHED_FEATURES=True"])
    keys: list[dict[str, object]] = []
    monkeypatch.setattr(
        main_linear, "cached_features", lambda place, split, key, *_, **__: keys.append(key)
    )
    run = SimpleNamespace(folder=tmp_path, training=False, precision="fp32", device=None)
    source = ArraySource("x", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1), ["a"])
    backbone, _ = main_linear.pretrained_backbone(cfg, None)
    main_linear.split_features(cfg, run, backbone, source, "val", weights="w", folder="f")  # type: ignore[arg-type]
    assert ("windows" in keys[0]) == bool(sizes)
