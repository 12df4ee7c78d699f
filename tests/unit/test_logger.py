"""Logs go where they belong, metrics stay valid JSON, and no full disk stops a training."""

import io
import json
import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from utils.logger import (
    Metrics,
    close_logger,
    finite_json,
    setup_logger,
)
from utils.progress import ProgressLine


class Terminal(io.StringIO):
    """Pretend to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def handlers_removed() -> Iterator[None]:
    yield
    close_logger()
    logging.getLogger("synco").setLevel(logging.NOTSET)


@contextmanager
def full_disk() -> Iterator[None]:
    """Let files of this process, pytest's output among them, grow no further than 200 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def read_lines(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    for line in found:
        assert datetime.fromisoformat(line.pop("time")).tzinfo  # each line says when
    return found


def test_main_rank_logs_info_to_terminal_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = setup_logger(tmp_path / "run", is_main=True)
    logger.info("hello %d", 1)
    logger.debug("too much")
    assert logger.name == "synco"
    assert capsys.readouterr().err.endswith(" hello 1\n")
    assert (tmp_path / "run" / "log.txt").read_text().endswith("INFO hello 1\n")


def test_other_ranks_only_warn_and_write_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = setup_logger(tmp_path, is_main=False)
    logger.info("hello")
    logger.warning("careful")
    error = capsys.readouterr().err
    assert error.endswith("[rank 0] WARNING careful\n")
    assert "hello" not in error
    assert list(tmp_path.iterdir()) == []


def test_repeated_setup_does_not_duplicate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = logging.NullHandler()
    logging.getLogger("synco").addHandler(foreign)
    for _ in range(3):
        logger = setup_logger(tmp_path, is_main=True)
    logger.info("once")
    assert foreign in logger.handlers
    logger.removeHandler(foreign)
    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "log.txt").read_text().count("once") == 1


def test_log_file_is_continued_on_resume(tmp_path: Path) -> None:
    for word in ("first", "second"):
        setup_logger(tmp_path, is_main=True).info(word)
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "first",
        "second",
    ]


@pytest.mark.parametrize(("variable", "colored"), [("OTHER", True), ("NO_COLOR", False)])
def test_colours_need_a_terminal_and_no_objection(
    monkeypatch: pytest.MonkeyPatch, variable: str, colored: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logger(None, is_main=True).warning("red or not")
    assert ("\x1b[33m" in terminal.getvalue()) == colored


def test_no_escapes_in_files_and_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logger(tmp_path, is_main=True).warning("plain")
    assert "\x1b" not in capsys.readouterr().err + (tmp_path / "log.txt").read_text()


def test_full_disk_at_the_log_warns_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = setup_logger(tmp_path, is_main=True)
    with full_disk():
        for i in range(20):
            logger.info("a line of some length, number %d", i)
    error = capsys.readouterr().err
    assert error.count("training goes on") == 1
    assert "Traceback" not in error
    assert "number 19" in error


def test_log_folder_that_cannot_be_made_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    setup_logger(tmp_path / "file" / "run", is_main=True).info("still here")
    assert "cannot write" in (error := capsys.readouterr().err)
    assert "still here" in error


def test_metrics_are_one_json_object_a_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run", sinks=())
    metrics.write(1, {"loss": torch.tensor(0.5), "lr": 1e-3, "note": "warm"})
    metrics.write(2, {"loss": float("nan"), "norm": float("inf")})
    assert read_lines(tmp_path / "run") == [
        {"step": 1, "loss": 0.5, "lr": 1e-3, "note": "warm"},
        {"step": 2, "loss": "nan", "norm": "inf"},
    ]
    metrics.close()


def test_metrics_without_folder_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    metrics = Metrics(None)
    metrics.truncate_after(0)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_resumed_metrics_hold_each_step_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, sinks=())
    for step in range(1, 6):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # torn by a kill
    metrics = Metrics(tmp_path, sinks=())
    metrics.truncate_after(3)
    for step in (4, 5):
        metrics.write(step, {"loss": 10.0 * step})
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
    ]
    metrics.truncate_after(4)  # also while the file is open
    metrics.write(5, {"loss": 5.0})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3, 4, 5]
    metrics.close()


def test_torn_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    metrics = Metrics(tmp_path, sinks=())
    metrics.write(2, {})
    metrics.close()
    assert (
        (tmp_path / "metrics.jsonl").read_text().splitlines()[-1].startswith('{"step": 2, "time"')
    )


def test_full_disk_at_the_metrics_warns_once_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, sinks=())
    with caplog.at_level(logging.WARNING, logger="synco"), full_disk():
        for step in range(1, 30):
            metrics.write(step, {"loss": 0.123456789})
    assert len(caplog.messages) == 1
    assert "metrics.jsonl" in caplog.text
    metrics.write(30, {"loss": 1.0})
    metrics.truncate_after(30)
    steps = [line["step"] for line in read_lines(tmp_path)]
    assert steps == [*range(1, len(steps)), 30]
    metrics.close()


def test_tensorboard_holds_numbers_and_purges_on_resume(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path)
    for step in (1, 2, 3):
        metrics.write(step, {"loss": float(step), "note": "text"})
    metrics.close()
    # event files are ordered by the second in their names, as those of a resumed run are
    time.sleep(1.1)
    metrics = Metrics(tmp_path)
    metrics.truncate_after(1)
    metrics.write(2, {"loss": 20.0})
    metrics.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 20.0)]


def test_tensorboard_has_groups_pictures_and_text(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = Metrics(tmp_path)
    metrics.write(1, {"loss": 1.0, "acc1": 2.0, "embedding_std": 1.0, "lr": 0.1, "knn20_top1": 5.0})
    metrics.write(1, {"images_per_second": 3.0, "held_out_acc1": 4.0, "held_out_loss": 4.0})
    Image.new("RGB", (4, 2), "red").save(tmp_path / "reconstruction_0000003.png")
    metrics.picture(tmp_path / "reconstruction_0000003.png", 3)
    metrics.text("config", "SEED: 0\n", 0)
    metrics.embedding(torch.eye(3, 5), [4, 5, 6], 7)
    metrics.close()
    probe = Metrics(tmp_path / "linear", task="linear")
    probe.write(1, {"loss": 1.0, "top1": 2.0, "lr0.3/top1": 2.0, "lr": 0.3})
    probe.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == [
        "health/embedding_std",
        "held_out/contrastive_acc1",
        "held_out/loss",
        "knn/k20_top1",
        "optim/lr",
        "speed/images_per_second",
        "train/contrastive_acc1",
        "train/loss",
    ]
    picture = events.Images("pictures/reconstruction")[0]
    assert (picture.width, picture.height, picture.step) == (4, 2, 3)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"    SEED: 0\n"
    assert all("contrastive" not in line for line in (tmp_path / "metrics.jsonl").open())
    (table,) = tmp_path.glob("00007/knn/metadata.tsv")
    assert table.read_text().split() == ["4", "5", "6"]
    events = accumulator.EventAccumulator(str(tmp_path / "linear"))
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    assert tags == ["linear/loss", "linear/lr", "linear/top1", "linear/top1/lr0.3"]


def test_missing_tensorboard_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    metrics = Metrics(tmp_path)
    with caplog.at_level(logging.WARNING, logger="synco"):
        for step in (1, 2):
            metrics.write(step, {"loss": 1.0})
    assert len(caplog.messages) == 1
    assert len(read_lines(tmp_path)) == 2
    metrics.close()


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("module 'distutils' has no attribute 'version'"),
        TypeError("Descriptors cannot be created directly."),
        RuntimeError("anything"),
    ],
)
@pytest.mark.parametrize("where", ["__init__", "add_scalar", "close"])
def test_a_tensorboard_that_fails_in_any_way_is_one_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    where: str,
) -> None:
    class Board:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            self.fail("__init__")

        def add_scalar(self, *_: object) -> None:
            self.fail("add_scalar")

        def close(self) -> None:
            self.fail("close")

        def fail(self, here: str) -> None:
            if here == where:
                raise error

    module = SimpleNamespace(SummaryWriter=Board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    metrics = Metrics(tmp_path)
    with caplog.at_level(logging.WARNING, logger="synco"):
        for step in (1, 2):
            metrics.write(step, {"loss": 1.0})
        metrics.close()
    assert len(caplog.messages) == 1
    assert str(error) in caplog.text
    assert len(read_lines(tmp_path)) == 2


def test_a_fault_of_ours_in_the_metrics_is_no_warning(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Metrics(tmp_path, sinks=()).write(1, {"loss": object()})  # type: ignore[dict-item]


def test_finite_json_reaches_every_depth() -> None:
    value = {"a": [1.0, float("inf"), {"b": (float("nan"), None, True)}]}
    assert finite_json(value) == {"a": [1.0, "inf", {"b": ["nan", None, True]}]}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("bad\udcff.png", r"bad\udcff.png"),
        (
            "a\n2026-01-01 00:00:00,000 INFO checkpoint /forged",
            r"a\n2026-01-01 00:00:00,000 INFO checkpoint",
        ),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
    ],
    ids=["not UTF-8", "newline", "escape"],  # an id with a lone surrogate ends the parallel runner
)
def test_a_name_is_one_visible_line_on_terminal_and_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shown: str,
) -> None:
    # pytest's own handler keeps the raw name, which its parallel runner cannot send
    monkeypatch.setattr(logging.getLogger("synco"), "propagate", False)
    logger = setup_logger(tmp_path, is_main=True)
    logger.warning("unreadable image replaced: %s", name)
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text(encoding="utf-8")):
        assert f"unreadable image replaced: {shown}" in text
        assert text.count("\n") == 1
        assert "cannot write" not in text
        assert "\x1b" not in text


def test_a_traceback_keeps_its_lines_but_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("synco"), "propagate", False)  # as above
    try:
        raise ValueError("\x1b[2J\udcff")
    except ValueError:
        setup_logger(tmp_path, is_main=True).exception("lost")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].endswith("ERROR lost")
    assert lines[1].startswith("Traceback")
    assert lines[-1] == r"ValueError: \x1b[2J\udcff"


def test_a_closed_standard_error_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)  # as with 2>&-
    setup_logger(tmp_path, is_main=True).info("still here")
    line = ProgressLine(lambda columns: "x")
    line.start()
    line.close()
    assert "still here" in (tmp_path / "log.txt").read_text()
