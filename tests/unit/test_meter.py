"""What a run says of itself: means over steps, and the best so far."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.meter import Meter
from engine.plan import Plan
from engine.state import TrainState
from utils import heartbeat
from utils import progress as pace
from utils.logger import Metrics
from utils.schedules import LearningRate, Progress

PLAN = Plan(2, 4, 8, 1, 0.0, (LearningRate("constant", 0.5, 0.0, 0.0, 0, 8, 4),))


def outputs(loss: float) -> dict[str, torch.Tensor]:
    return {
        "loss": torch.tensor(loss),
        "embedding": torch.nn.functional.normalize(torch.randn(64, 8), dim=1),
    }


def test_means_are_written_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    meter = Meter(Metrics(tmp_path, sinks=()), every=3)
    meter.start(PLAN)
    for step in range(8):
        meter.log(Progress(step, 4, 8), outputs(float(step)), PLAN)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 1.0), (6, 4.0), (8, 6.5)]
    assert all(line["lr"] == 0.5 and line["images_per_second"] > 0 for line in lines)
    assert lines[-1]["epoch"] == 2.0
    assert 0.8 < lines[0]["embedding_std"] < 1.1
    assert 7 < lines[0]["embedding_rank"] <= 8


def test_best_is_kept_and_no_evaluation_is_no_line(tmp_path: Path) -> None:
    meter = Meter(Metrics(tmp_path, sinks=()), every=1)
    module = torch.nn.Linear(1, 1)
    state = TrainState(module, torch.optim.SGD(module.parameters(), 0.1), module)
    for epoch, value in ((1, 10.0), (2, 30.0), (3, 20.0)):
        meter.record(Progress(4 * epoch, 4, 12), {"top1": value}, state)
    meter.record(Progress(12, 4, 12), {}, state)
    assert state.best == {"top1": 30.0}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_time_left_forgets_the_first_steps_and_counts_evaluations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: clock[0])
    timed = pace.Pace()
    for number, _ in enumerate(timed.around(slow(8, clock))):
        clock[0] += 100.0 if number < 3 else 3.0  # the first ones compile
        timed.end_step()
        clock[0] += 8.0 if number == 3 else 0.0  # an evaluation
    assert timed.seconds_per_step() == pytest.approx(4.0)
    assert timed.seconds_left(10) == pytest.approx(10 * (4.0 + 8.0 / 8))
    assert timed.seconds_left(0) == 0.0
    assert timed.window() == pytest.approx((4.0, 0.25))


def slow(count: int, clock: list[float]) -> Iterator[int]:
    for number in range(count):
        clock[0] += 1.0  # a second of each step is waiting for data
        yield number


def test_a_log_line_is_in_the_order_of_a_reader_and_fits_120_columns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = Plan(300, 5004, 4096, 1, 0.0, (LearningRate("constant", 1 / 3, 0, 0, 0, 8, 4),))
    meter = Meter(Metrics(None), every=1)
    meter.start(plan)
    with caplog.at_level(logging.INFO, logger="synco"):
        meter.log(Progress(1_000_000, 5004, plan.total_steps), outputs(1 / 3), plan)
    (line,) = caplog.messages
    assert len(line) <= 111  # and 9 of the time of day
    order = ["epoch 200/300", "step 1000001/1501200", "loss 0.3333", "img/s", "data", "ETA"]
    places = [line.index(part) for part in order]
    assert places == sorted(places)


def test_the_progress_line_of_a_run_that_settles_shows_the_speed_of_its_log_line() -> None:
    meter = Meter(Metrics(None), every=1)
    meter.start(PLAN)
    meter.log(Progress(2, 4, 8), outputs(2.0), PLAN)
    heartbeat.beat("step 3")
    line = meter._describe(120)
    assert "img/s" in line
    assert "nan" not in line


def test_the_status_of_a_run_that_settles_is_known_but_for_the_time_left() -> None:
    meter = Meter(Metrics(None), every=1)
    assert meter.status() == {}
    meter.start(PLAN)
    meter.log(Progress(2, 4, 8), outputs(2.0), PLAN)
    status = meter.status()
    assert (status["total"], status["epoch"], status["epochs"]) == (8, 0.75, 2)
    assert status["eta"] is None
    assert status["loss"] == 2.0


def test_the_log_line_calls_the_accuracy_of_the_contrastive_task_by_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meter = Meter(Metrics(tmp_path, sinks=()), every=1)
    plan = PLAN
    with caplog.at_level(logging.INFO, logger="synco"):
        meter.log(plan.progress(0), {"loss": torch.ones(()), "acc1": torch.tensor(12.5)}, plan)
    assert "contrastive acc1 12.5" in caplog.text
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["acc1"] == 12.5


def test_a_metric_of_the_newest_steps_alone_is_shown_as_it_is_also_after_a_resume(
    tmp_path: Path,
) -> None:
    """Synthetic negatives join in the middle of a window; a checkpoint between changes nothing."""
    steps = [{"loss": 1.0}, {"loss": 2.0, "share": 0.5}, {"loss": 6.0, "share": 0.25}]
    lines = []
    for resumed in (False, True):
        folder = tmp_path / str(resumed)
        meter = Meter(Metrics(folder, sinks=()), every=3)
        for number, values in enumerate(steps):
            if resumed and number == 2:
                state = meter.state_dict()
                meter = Meter(Metrics(folder, sinks=()), every=3)
                meter.load_state_dict(state)
            out = {name: torch.tensor(value) for name, value in values.items()}
            meter.log(Progress(number, 4, 8), out, PLAN)
        line = json.loads((folder / "metrics.jsonl").read_text())
        lines.append((line["loss"], line["share"]))
    assert lines == [(3.0, 0.25)] * 2
