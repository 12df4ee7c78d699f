"""Collapse is seen and named; what only looks like it at the start is not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from figures import figure
from torch import Tensor, nn

from data.augment.recipes import build_recipe
from data.loader import GlobalLoader
from data.sources import open_split
from engine import loop as engine
from engine.collapse import EARLY, HEALTHY, CollapseMonitor, _Watched
from engine.guards import FiniteGuard
from engine.meter import Meter
from engine.optim import build_optimizer, parameter_groups
from engine.plan import make_plan
from engine.state import TrainState
from models import build_framework, framework_options
from models.parts.losses import cosine_regression, unit
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import Metrics

POINT = "collapsing to a point"


def looked_at(*embeddings: Tensor) -> CollapseMonitor:
    monitor = CollapseMonitor()
    for embedding in embeddings:
        monitor.note(embedding)
        monitor.look()
    return monitor


def spread(amount: float, rows: int = 64, dim: int = 16, rank: int = 16) -> Tensor:
    """Draw embeddings around one direction, the further the larger ``amount``, in ``rank`` directions."""
    basis = torch.linalg.qr(torch.randn(dim, dim)).Q[:, :rank]
    return basis[:, 0] + amount * torch.randn(rows, rank) @ basis.T


@pytest.mark.parametrize(
    ("amounts", "verdict"),
    [
        ([10.0] * 4, HEALTHY),
        ([0.05, 0.04, 0.03, 0.02], POINT),
        ([0.01] * 5, POINT),
        ([0.01, 0.02, 0.03, 0.05, 0.07], EARLY),  # untrained, and it learns
        ([0.05, 0.04, 0.03, 10.0, 0.05, 0.04, 0.03], EARLY),  # never four in a row
        ([0.05, 0.04, 0.03, 0.02, 10.0], HEALTHY),  # it has recovered
    ],
)
def test_verdicts(amounts: list[float], verdict: str) -> None:
    assert looked_at(*map(spread, amounts)).verdict() == verdict


def test_few_directions_are_a_collapse_too() -> None:
    embeddings = spread(10.0, rows=256, dim=128, rank=3)
    assert looked_at(*[embeddings] * 3).verdict() == EARLY
    monitor = looked_at(*[embeddings] * 4)
    assert monitor.verdict() == "dimensional collapse: rank 3.0 of 128"


def test_the_rank_is_that_of_rows_of_several_steps() -> None:
    monitor = CollapseMonitor()
    for _ in range(40):
        monitor.note(torch.randn(8, 32))
    seen = monitor.look()
    assert seen["embedding_rank"] > 28  # eight rows have rank eight
    assert 0.8 < seen["embedding_std"] < 1.1
    for _ in range(400):
        monitor.note(torch.randn(8, 32))
    assert sum(map(len, monitor._rows)) <= 1024
    monitor.note(torch.randn(8, 1 << 16))  # a huge one does not take minutes
    assert len(monitor._rows) == 1


# spread at every tenth step of runs on digits (batch 128, resnet8, D 32), as they were measured
MEASURED = {
    "sit": "0.476 0.380 0.339 0.322 0.311 0.319 0.323 0.345 0.377 0.404 0.412 0.440 0.472 0.528",
    "moco_v2": "0.668 0.604 0.534 0.491 0.462 0.439 0.430 0.434 0.427 0.438 0.439 0.460 0.461",
    "no predictor": "0.509 0.431 0.376 0.334 0.309 0.287 0.268 0.258 0.248",
    "no stop-gradient": "0.24 0.12 0.08 0.07 0.06",
}


@pytest.mark.parametrize("name", MEASURED)
def test_measured_courses(name: str) -> None:
    watched = _Watched(0.3)
    alarms = []
    for value in map(float, MEASURED[name].split()):
        watched.see(value)
        alarms.append(watched.alarming)
    assert any(alarms) == name.startswith("no ")


# ---- small runs ----------------------------------------------------------------------------------


def course(method: str, broken: str, seed: int, steps: int, every: int, batch: int) -> list[str]:
    """Train on digits, broken or not, and return what the log said of the embeddings."""
    keys = runs.small_keys(method)
    keys |= {"MODEL.NAME": method, "SEED": seed, "DATA.DATASET": "digits", "DATA.IMG_SIZE": 8}
    keys |= {"MODEL.BACKBONE.NAME": "resnet8", "OPTIM.BASE_LR": 0.05}
    keys |= {"MODEL.BACKBONE.STEM": "cifar_stride2"} if method == "sit" or every < 10 else {}
    cfg = load_config(declare(framework_options()), flags=keys)
    torch.manual_seed(seed)
    framework = build_framework(cfg)
    if "predictor" in broken:
        framework.predictor = nn.Identity()
    loader = GlobalLoader(
        open_split(cfg.DATA, "train"),
        build_recipe("digits", 8, None),
        global_batch=batch,
        seed=seed,
        device=torch.device("cpu"),
    )
    plan = make_plan(
        cfg.OPTIM,
        cfg.SCHEDULE,
        epochs=200,
        steps_per_epoch=loader.steps_per_epoch,
        global_batch=batch,
        base_rates=[0.05],
    )
    optimizer = build_optimizer(cfg.OPTIM, parameter_groups(framework, cfg.OPTIM))
    state = TrainState(framework, optimizer, framework)
    meter, verdicts = Meter(Metrics(None), every), []

    def step(batch: Any, progress: Any) -> dict[str, Tensor]:
        if "stop-gradient" not in broken:
            return framework(batch.views, progress)
        outputs = [framework.online(view) for view in batch.views]  # both sides learn
        first, second = (framework.predictor(output) for output in outputs)
        loss = cosine_regression(first, unit(outputs[1])) + cosine_regression(
            second, unit(outputs[0])
        )
        return {"loss": loss, "embedding": unit(outputs[0]).detach()}

    for index, batches in loader.from_step(0, steps):
        out = engine.train_step(state, plan, FiniteGuard(), step, batches, seed)
        meter.log(plan.progress(index), out, plan)
        if state.step % every == 0:
            verdicts.append(meter._verdict)
    return verdicts


def test_without_stop_gradient_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="synco"):
        assert POINT in course("byol", "stop-gradient", 0, steps=32, every=4, batch=32)
    assert (
        caplog.text.count("the embeddings are collapsing to a point, and it does not get better")
        == 1
    )
    assert "  embeddings collapsing to a point  " in caplog.text
    caplog.clear()
    assert set(course("byol", "", 0, steps=16, every=4, batch=32)) == {HEALTHY}
    assert "collaps" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("broken", "steps"), [("predictor", 320), ("stop-gradient", 100)])
def test_broken_variants_are_named(broken: str, steps: int, seed: int) -> None:
    """A predictor that is missing lets BYOL fade over some two hundred steps."""
    verdicts = course("byol", broken, seed, steps, every=10, batch=64)
    assert POINT in verdicts
    figure(f"no {broken}: alarm at step", 10 * (verdicts.index(POINT) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["moco_v2", "synco", "byol", "moby", "synco_v2", "sit"])
def test_healthy_runs_raise_no_alarm(method: str, seed: int) -> None:
    verdicts = course(method, "", seed, steps=100, every=10, batch=64)
    false = sum(verdict not in (HEALTHY, EARLY) for verdict in verdicts)
    assert not false
    figure(f"false alarms of {method}", false)


def test_views_that_are_all_the_same_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from data.augment.preview import warn_of_identical_views

    view = torch.randn(4, 3, 8, 8)
    with caplog.at_level(logging.WARNING, logger="synco"):
        warn_of_identical_views([view, torch.cat([view[:3], view[:1]])])
        assert not caplog.text
        warn_of_identical_views([view])
        assert not caplog.text
        warn_of_identical_views([view, view.clone()])
    assert "the two views of an image are identical" in caplog.text


def test_one_embedding_has_no_spread_and_is_no_collapse() -> None:
    monitor = CollapseMonitor()
    for _ in range(10):
        monitor.note(torch.ones(1, 16))
        assert monitor.look() == {}
    assert monitor.verdict() == HEALTHY
