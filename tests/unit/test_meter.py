"""What a run says of itself: means over steps, the best so far, and when it collapses."""

import json
import logging
from pathlib import Path

import pytest
import torch

from utils.logger import Metrics
from utils.meter import Meter
from utils.plan import Plan
from utils.schedules import LearningRate, Progress

PLAN = Plan(2, 4, 8, 1, 0.0, (LearningRate("constant", 0.5, 0.0, 0.0, 0, 8, 4),))


def outputs(loss: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(loss), "embedding": torch.nn.functional.normalize(torch.randn(64, 8), dim=1)}


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


def test_best_is_kept_and_no_evaluation_is_no_line(tmp_path: Path) -> None:
    meter = Meter(Metrics(tmp_path, tensorboard=False), every=1)
    best: dict[str, float] = {}
    for epoch, value in ((1, 10.0), (2, 30.0), (3, 20.0)):
        meter.record(Progress(4 * epoch, 4, 12), {"top1": value}, best)
    meter.record(Progress(12, 4, 12), {}, best)
    assert best == {"top1": 30.0}
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("spreads", "alarm"),
    [
        ([0.25, 0.15, 0.08, 0.05], True),  # collapsing
        ([0.02, 0.02, 0.02, 0.02], True),  # collapsed
        ([0.26, 0.24, 0.27, 0.32, 0.37], False),  # an untrained network that learns
        ([0.9, 0.8, 0.7, 0.6], False),
        ([0.25, 0.2, 0.4, 0.25, 0.2], False),  # never three in a row
    ],
)
def test_collapse_alarm(spreads: list[float], alarm: bool, caplog: pytest.LogCaptureFixture) -> None:
    meter = Meter(Metrics(None), every=1)
    with caplog.at_level(logging.WARNING, logger="synco"):
        for spread in spreads:
            meter._watch_collapse(spread)
    assert ("collapsing" in caplog.text) == alarm
