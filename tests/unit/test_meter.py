"""What a run says of itself: means over steps, and the best so far."""

import json
from pathlib import Path

import torch

from engine.meter import Meter
from engine.plan import Plan
from engine.state import TrainState
from utils.logger import Metrics
from utils.schedules import LearningRate, Progress

PLAN = Plan(2, 4, 8, 1, 0.0, (LearningRate("constant", 0.5, 0.0, 0.0, 0, 8, 4),))


def outputs(loss: float) -> dict[str, torch.Tensor]:
    return {
        "loss": torch.tensor(loss),
        "embedding": torch.nn.functional.normalize(torch.randn(64, 8), dim=1),
    }


def test_means_are_written_every_so_many_steps_and_at_the_end(tmp_path: Path) -> None:
    meter = Meter(Metrics(tmp_path, tensorboard=False), every=3)
    meter.start(8)
    for step in range(8):
        meter.log(Progress(step, 4, 8), outputs(float(step)), PLAN)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(3, 1.0), (6, 4.0), (8, 6.5)]
    assert all(line["lr"] == 0.5 and line["images_per_second"] > 0 for line in lines)
    assert lines[-1]["epoch"] == 2.0
    assert 0.8 < lines[0]["embedding_std"] < 1.1
    assert 7 < lines[0]["embedding_rank"] <= 8


def test_best_is_kept_and_no_evaluation_is_no_line(tmp_path: Path) -> None:
    meter = Meter(Metrics(tmp_path, tensorboard=False), every=1)
    module = torch.nn.Linear(1, 1)
    state = TrainState(module, torch.optim.SGD(module.parameters(), 0.1), module)
    for epoch, value in ((1, 10.0), (2, 30.0), (3, 20.0)):
        meter.record(Progress(4 * epoch, 4, 12), {"top1": value}, state)
    meter.record(Progress(12, 4, 12), {}, state)
    assert state.best == {"top1": 30.0}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
