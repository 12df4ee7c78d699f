"""Parts of a run that need no training: modes around an evaluation, status.json, flags and guards."""

import errno
import json
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from torch import nn

from engine import guards
from engine.guards import FiniteGuard, NonFiniteError, StopFlag
from engine.run import Run, start_run
from engine.state import TrainState
from models import framework_options
from models.classifier import freeze
from utils import cli
from utils.checkpoints import file as checkpoint
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import close_logger

CPU = torch.device("cpu")
NAN = torch.tensor(float("nan"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(declare(framework_options()).defaults(), tmp_path / "run", CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 2])
def test_bf16_on_a_cpu_refuses_the_maps_that_its_gradients_are_wrong_for(
    precision: str, width: int, tmp_path: Path
) -> None:
    """Where the run goes on, the gradients are those of fp32; oneDNN's for the refused map are not."""
    cfg = declare(framework_options()).defaults()
    cfg.TRAIN.PRECISION = precision
    run = Run(cfg, tmp_path / "run", CPU)
    network = run.prepare(nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1)))
    images = torch.randn(8, 16, width, width)
    with run.autocast():
        if precision == "bf16" and width == 1:
            with pytest.raises(ValueError, match=r"--precision fp32"):
                network(images)
            with torch.no_grad():
                assert network(images).shape == (8, 32, 1, 1)  # an evaluation has no gradients
            return
        network(images).float().sum().backward()
    expected = torch.nn.functional.unfold(images, 3, padding=1, stride=2).sum((0, 2)).view(16, 3, 3)
    torch.testing.assert_close(
        network[0].weight.grad, expected.expand(32, 16, 3, 3), rtol=0.02, atol=0.05
    )


def test_an_evaluation_leaves_every_part_in_its_mode(run: Run) -> None:
    """The batch norms of a frozen backbone whose drop path is active are not in its mode."""
    backbone = freeze(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()), active_drop_path=True
    )
    before = [part.training for part in backbone.modules()]
    assert len(set(before)) == 2
    with run.evaluating(backbone):
        assert not any(part.training for part in backbone.modules())
        assert not torch.is_grad_enabled()
    assert [part.training for part in backbone.modules()] == before
    assert torch.is_grad_enabled()


def test_the_status_of_a_complete_run_survives_another_start(run: Run) -> None:
    run.open_folder()
    assert runs.status(run.folder)["state"] == "starting"
    run.finish("preempted", 7)
    run.close()
    run.open_folder()
    # or a script would requeue a start that fails
    assert runs.status(run.folder)["state"] == "starting"
    run.finish("done", 9)
    run.close()
    run.open_folder()
    status = runs.status(run.folder)
    assert (status["state"], status["step"], status["reason"]) == ("done", 9, "")
    assert status["pid"] == os.getpid()
    assert status["host"]
    assert datetime.fromisoformat(status["time"]).tzinfo
    (run.folder / "status.json").write_text("torn")
    run.close()
    run.open_folder()
    assert runs.status(run.folder)["state"] == "starting"


@pytest.mark.parametrize("error", [ValueError("no such data"), RuntimeError("a bug")])
def test_a_start_that_fails_says_why_in_status_and_log(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "at_failure", [])
    monkeypatch.setattr("engine.run.at_failure", cli.at_failure)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the test's own stay
    flags = {"OUTPUT": str(tmp_path), "DEVICE": "cpu", "NAME": "n", "TAG": "t"}
    cfg = load_config(declare(framework_options()), flags=flags)

    def main() -> int:
        start_run(cfg)
        raise error

    with pytest.raises((SystemExit, RuntimeError)):
        cli.run_main(main)
    close_logger()
    folder = tmp_path / "n" / "t"
    status = runs.status(folder)
    assert status["state"] == "failed"
    assert str(error) in status["reason"]
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert "ERROR" in last
    assert str(error) in last


def test_a_run_that_trained_keeps_its_own_reason(run: Run) -> None:
    run.open_folder()
    run.finish("done", 9)
    run.start_failed("later")
    assert runs.status(run.folder)["state"] == "done"


def test_a_reason_in_the_status_holds_no_control_characters(run: Run) -> None:
    run.open_folder()
    run.finish("failed", 3, "ValueError: a\x1b[2J\n/x\udcff.png")
    status = json.loads((run.folder / "status.json").read_text())
    assert status["state"] == "failed"
    assert status["reason"] == r"ValueError: a\x1b[2J\n/x\udcff.png"


def test_a_stop_that_could_not_be_saved_is_not_called_saved(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.open_folder()
    with caplog.at_level(logging.WARNING, logger="synco"):
        run.preempted(7, "SIGTERM")
    assert "NOT saved" in caplog.text
    assert "NOT saved" in runs.status(run.folder)["reason"]
    with pytest.raises(OSError, match="last checkpoint was not saved"):
        run.done(SimpleNamespace(step=7))


def test_a_run_in_a_thread_installs_no_handlers() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: StopFlag().__enter__().received).result() is None
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_flag_takes_one_signal_and_its_echo_and_gives_the_handlers_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopFlag() as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        assert stop.received == "SIGUSR1"
        monkeypatch.setattr(guards, "_ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt, match="second SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_guard_allows_a_scaler_its_overflows_but_not_for_ever() -> None:
    with pytest.raises(NonFiniteError, match="step 3"):
        FiniteGuard().check(NAN, 3, [])
    guard = FiniteGuard(scaler=True)
    for step in range(20):
        guard.check(NAN, step, [])
    guard.check(torch.tensor(1.0), 20, [])  # a finite one starts the count anew
    for step in range(20):
        guard.check(NAN, step, [])
    with pytest.raises(NonFiniteError, match=r"step 40: .* 21th step in a row"):
        guard.check(NAN, 40, [])


def test_a_signal_before_the_first_step_is_a_preemption_and_after_the_last_one_none(
    run: Run,
) -> None:
    run.open_folder()
    for state in ("preempted", "done"):
        with pytest.raises(SystemExit) as stop:
            run.stop_before_training(signal.SIGTERM, None)
        assert stop.value.code == 75
        assert runs.status(run.folder)["state"] == state
        run.finish("done", 9)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_a_warning(
    code: int, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("utils.checkpoints.locks.fcntl.lockf", refuse)
    run.open_folder()
    assert caplog.text.count("has no locks") == 1
    run._check_lock()
    run.close()


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_lock_that_vanished_is_noticed_before_anything_is_written(
    how: str, run: Run, tmp_path: Path
) -> None:
    run.open_folder()
    run._check_lock()
    lock = run.folder / ".lock"
    if how == "moved":
        run.folder.rename(tmp_path / "elsewhere")
    else:
        lock.unlink()
    if how == "replaced":
        lock.touch()
    before = sorted(tmp_path.rglob("*"))
    module = nn.Linear(2, 2)
    state = TrainState(module, torch.optim.SGD(module.parameters(), 0.1), module, step=3)
    with pytest.raises(ValueError, match="is not the one that this run locked"):
        run.checkpoint(state, SimpleNamespace(global_batch=4, steps_per_epoch=1))
    run.finish("failed", 3, "its lock vanished")
    assert sorted(tmp_path.rglob("*")) == before
    run.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.EDEADLK])
def test_a_lock_that_fails_otherwise_is_an_error_in_its_own_words(
    code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("utils.checkpoints.locks.fcntl.lockf", refuse)
    with pytest.raises(ValueError, match=os.strerror(code)):
        run.open_folder()


def test_a_lock_that_cannot_be_looked_at_once_is_no_reason_to_stop(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.open_folder()

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr("engine.run.os.stat", stale)
        run._check_lock()
    assert "cannot be looked at" in caplog.text
    run.close()


def trained(run: Run, step: int, weight: float) -> TrainState:
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, weight)
    return TrainState(module, torch.optim.SGD(module.parameters(), 0.1), module, step=step)


PLAN = SimpleNamespace(
    global_batch=4,
    steps_per_epoch=1,
    progress=lambda step: SimpleNamespace(step=step, epoch_position=1.0, epoch=1),
)


def test_an_evaluation_is_not_noted_where_the_lock_vanished(run: Run) -> None:
    run.open_folder()
    state = trained(run, 3, 1.0)
    run.checkpoint(state, PLAN)
    record = run.folder / "ckpt_00000003.json"
    before = record.read_bytes()
    (run.folder / ".lock").unlink()
    with pytest.raises(ValueError, match="is not the one that this run locked"):
        run.checkpoints.evaluated(state, PLAN, {"knn5_top1": 50.0})
    assert record.read_bytes() == before
    run.close()


@pytest.mark.parametrize("ours", [True, False])
def test_the_evaluation_of_a_file_from_elsewhere_is_noted_in_no_record_of_the_folder(
    ours: bool, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "engine.checkpointing.load_own", lambda path, *_: (checkpoint.load(path), [])
    )
    run.open_folder()
    run.checkpoint(trained(run, 3, 1.0), PLAN)
    mine = run.folder / "ckpt_00000003.pt"
    path = mine if ours else checkpoint.save(tmp_path / "else", 3, checkpoint.load(mine), meta={})
    again = Run(run.cfg.clone(), run.folder, CPU)
    again.cfg.RESUME = "" if ours else str(path)
    state = trained(again, 0, 0.0)
    assert again.resume(state, PLAN)
    before = mine.with_suffix(".json").read_bytes()
    again.checkpoints.evaluated(state, PLAN, {"knn5_top1": 50.0})
    assert (mine.with_suffix(".json").read_bytes() != before) == ours
    run.close()


def test_the_status_follows_the_steps_but_not_each(run: Run) -> None:
    run.open_folder()
    for step in (1, 2):
        run.begin_step(step, 0)
    assert runs.status(run.folder)["step"] == 1  # the second came too soon
    run._next_status = 0.0
    run.begin_step(3, 0)
    assert runs.status(run.folder)["step"] == 3
    (run.folder / ".lock").unlink()  # the folder may be another run's now
    run._next_status = 0.0
    run.begin_step(4, 0)
    assert runs.status(run.folder)["step"] == 3
    run.close()


def test_a_status_that_cannot_be_written_stops_no_training(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    run.open_folder()
    monkeypatch.setattr("engine.run.write_text", full)
    run.begin_step(1, 0)
    run.close()
