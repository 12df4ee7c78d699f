"""Learning rates and momenta against formulas written out here: pure functions of the step."""

import math
from itertools import pairwise
from typing import Any

import pytest

from engine.plan import Plan, make_plan
from models import framework_options
from utils.config.load import load_config
from utils.config.schema import KEYS, declare
from utils.schedules import SCHEDULES, LearningRate, Progress, cosine, momentum_at

SCHEMA = declare(framework_options())


def rate(
    name: str = "cosine", *, steps: int = 10, epochs: int = 10, **options: Any
) -> LearningRate:
    fixed = {"base": 1.0, "warmup_start": 0.0, "minimum": 0.0, "warmup_steps": 0}
    return LearningRate(
        name, **{**fixed, **options}, total_steps=steps * epochs, steps_per_epoch=steps
    )


def plan_of(
    *opts: str, global_batch: int = 512, epochs: int = 10, base_rates: tuple[float, ...] = (1e-3,)
) -> Plan:
    cfg = load_config(SCHEMA, opts=opts)
    return make_plan(
        cfg.OPTIM,
        cfg.SCHEDULE,
        epochs=epochs,
        steps_per_epoch=10,
        global_batch=global_batch,
        base_rates=base_rates,
    )


def test_moco_holds_a_cosine_for_an_epoch() -> None:
    moco = rate(base=0.03, steps=7, epochs=200, per_epoch=True)
    for epoch in (0, 1, 57, 100, 199):
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        assert [moco.at(epoch * 7 + i) for i in range(7)] == pytest.approx(
            [expected] * 7, rel=1e-12
        )


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 1), (119, 1), (120, 0.1), (159, 0.1), (160, 0.01), (199, 0.01)]
)
@pytest.mark.parametrize("per_epoch", [True, False])
def test_milestones_drop_the_rate_at_the_first_step_of_an_epoch(
    epoch: int, factor: float, per_epoch: bool
) -> None:
    moco = rate("milestones", base=0.03, epochs=200, milestones=(120, 160), per_epoch=per_epoch)
    for step in (epoch * 10, epoch * 10 + 9):
        assert moco.at(step) == pytest.approx(0.03 * factor, rel=1e-12)


def test_step_decays_every_so_many_epochs() -> None:
    decay = rate("step", epochs=100, decay_epochs=30, gamma=0.5)
    assert [decay.at(s) for s in (0, 299, 300, 599, 600, 999)] == [1, 1, 0.5, 0.5, 0.25, 0.125]


def test_linear_falls_to_a_hundredth() -> None:
    linear = rate("linear", warmup_steps=20)
    assert linear.at(20) == 1.0
    assert linear.at(60) == pytest.approx(1 - 0.99 * 0.5)
    assert linear.at(100) == pytest.approx(0.01)


def test_constant_is_constant_after_the_warm_up() -> None:
    constant = rate("constant", warmup_steps=2)
    assert [constant.at(s) for s in range(5)] == [0.0, 0.5, 1.0, 1.0, 1.0]


def moby(step: int, base: float = 1e-3) -> float:
    """Spec A4: 5 of 300 epochs of warm-up, counted inside the cosine's horizon."""
    warm, low, end = 50, 5e-7, 3000
    if step < warm:
        return low + step * (base - low) / warm
    return 5e-6 + 0.5 * (base - 5e-6) * (1 + math.cos(math.pi * step / end))


def test_moby_warms_up_inside_the_horizon_and_drops_a_little_at_its_end() -> None:
    exact = rate(base=1e-3, warmup_start=5e-7, minimum=5e-6, warmup_steps=50, epochs=300)
    assert [exact.at(s) for s in range(3001)] == pytest.approx(
        [moby(s) for s in range(3001)], rel=1e-12
    )
    assert exact.at(0) == 5e-7
    assert exact.at(49) < exact.at(50) < 1e-3
    assert exact.at(3000) == pytest.approx(5e-6)


def test_lag_repeats_the_first_rate_and_is_one_step_late() -> None:
    exact = rate(base=1e-3, warmup_start=5e-7, minimum=5e-6, warmup_steps=50, epochs=300)
    late = exact._replace(lag=True)
    assert [late.at(s) for s in range(3000)] == [exact.at(max(s - 1, 0)) for s in range(3000)]
    held = exact._replace(lag=True, per_epoch=True)
    assert [held.at(s) for s in (0, 9, 10, 19, 20)] == [exact.at(0)] * 4 + [exact.at(10)]


def test_shifted_starts_the_cosine_after_the_warm_up() -> None:
    shifted = rate(warmup_steps=40, shifted=True, minimum=0.1)
    for step in (40, 55, 70, 100):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 40) / 60))
        assert shifted.at(step) == pytest.approx(expected, rel=1e-12)
    assert shifted.at(0) == 0.0  # MoCo v3's first step has a rate of 0
    assert shifted.at(20) == pytest.approx(0.5)
    assert shifted.at(40) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup_steps", [0, 1, 30, 99])
@pytest.mark.parametrize("flags", [{}, {"shifted": True}, {"per_epoch": True}, {"lag": True}])
def test_every_rate_is_between_its_ends(
    name: str, warmup_steps: int, flags: dict[str, bool]
) -> None:
    any_rate = rate(name, warmup_steps=warmup_steps, milestones=(3, 6), **flags)
    values = [any_rate.at(s) for s in range(100)]
    assert all(0 <= value <= 1 for value in values)
    tail = values[warmup_steps + 10 :]
    assert all(a >= b for a, b in pairwise(tail))
    assert values == [any_rate.at(s) for s in reversed(range(100))][::-1]  # no memory


def test_an_unknown_schedule_is_refused_before_training_though_there_is_a_warm_up() -> None:
    cfg = load_config(SCHEMA, opts=["SCHEDULE.WARMUP_EPOCHS", "2"]).clone()
    cfg.defrost()
    cfg.SCHEDULE.NAME = "cosin"
    with pytest.raises(ValueError, match=r"SCHEDULE\.NAME: 'cosin'.*cosine"):
        make_plan(
            cfg.OPTIM, cfg.SCHEDULE, epochs=5, steps_per_epoch=3, global_batch=8, base_rates=[1.0]
        )


def test_the_configuration_and_the_code_know_the_same_schedules() -> None:
    for section in ("", "LINEAR.", "FINETUNE."):
        assert KEYS[f"{section}SCHEDULE.NAME"].choices == SCHEDULES


# ---- the plan ------------------------------------------------------------------------------------


def test_rates_scale_with_the_global_batch_only_if_asked() -> None:
    opts = ["OPTIM.WARMUP_LR", "5e-7", "OPTIM.MIN_LR", "5e-6", "SCHEDULE.WARMUP_EPOCHS", "2"]
    (plain,) = plan_of(*opts, global_batch=2048).rates
    (scaled,) = plan_of(*opts, "OPTIM.LR_BATCH", "512", global_batch=2048).rates
    assert (plain.base, plain.warmup_start, plain.minimum) == (1e-3, 5e-7, 5e-6)
    assert (scaled.base, scaled.warmup_start, scaled.minimum) == pytest.approx((4e-3, 2e-6, 2e-5))
    assert scaled.warmup_steps == 20


def test_a_grid_of_rates_gives_one_schedule_each() -> None:
    plan = plan_of(base_rates=(1.0, 3.0))
    assert [one.base for one in plan.rates] == [1.0, 3.0]
    assert plan.total_steps == 100
    assert plan.progress(25) == Progress(25, 10, 100)


@pytest.mark.parametrize(("epochs", "warmup"), [(5, 5), (5, 6), (1, 1)])
def test_a_warm_up_that_leaves_nothing_is_shortened_and_said(
    epochs: int, warmup: int, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of("SCHEDULE.WARMUP_EPOCHS", str(warmup), epochs=epochs)
    assert plan.rates[0].warmup_steps == epochs  # a tenth of the run of ten steps an epoch
    assert f"WARMUP_EPOCHS: {warmup} leaves nothing of {epochs} epochs" in caplog.text


def test_a_warm_up_that_leaves_nothing_of_whole_epochs_is_left_out() -> None:
    options = ("SCHEDULE.PER_EPOCH", "true", "SCHEDULE.WARMUP_EPOCHS", "5")
    plan = plan_of(*options, epochs=1)  # one epoch has one rate: that of its first step
    assert [plan.rates[0].at(step) for step in (0, 9)] == [1e-3, 1e-3]


def test_a_warm_up_that_leaves_something_stays(caplog: pytest.LogCaptureFixture) -> None:
    assert plan_of("SCHEDULE.WARMUP_EPOCHS", "4", epochs=5).rates[0].warmup_steps == 40
    assert not caplog.text


@pytest.mark.parametrize(
    ("key", "value", "context"),
    [
        ("SCHEDULE.NAME", "linear", []),
        ("SCHEDULE.WARMUP_EPOCHS", "3", []),
        ("SCHEDULE.PER_EPOCH", "true", []),
        ("SCHEDULE.SHIFTED", "true", ["SCHEDULE.WARMUP_EPOCHS", "3"]),
        ("SCHEDULE.LAG", "true", []),
        ("SCHEDULE.MILESTONES", "[2]", ["SCHEDULE.NAME", "milestones"]),
        ("SCHEDULE.GAMMA", "0.5", ["SCHEDULE.NAME", "step", "SCHEDULE.DECAY_EPOCHS", "2"]),
        ("SCHEDULE.DECAY_EPOCHS", "3", ["SCHEDULE.NAME", "step", "SCHEDULE.DECAY_EPOCHS", "2"]),
        ("OPTIM.WARMUP_LR", "1e-4", ["SCHEDULE.WARMUP_EPOCHS", "3"]),
        ("OPTIM.MIN_LR", "1e-4", []),
        ("OPTIM.LR_BATCH", "256", []),
    ],
)
def test_every_schedule_key_changes_some_rate(key: str, value: str, context: list[str]) -> None:
    before, after = plan_of(*context), plan_of(*context, key, value)
    assert [before.rates[0].at(s) for s in range(100)] != [after.rates[0].at(s) for s in range(100)]


def test_clipping_reaches_the_plan() -> None:
    assert plan_of("OPTIM.CLIP_GRAD", "5").clip_grad == 5.0


# ---- progress and momentum -----------------------------------------------------------------------


def test_progress_says_where_a_run_stands() -> None:
    progress = Progress(25, 10, 100)
    assert (progress.epoch, progress.epoch_position, progress.fraction) == (2, 2.5, 0.25)
    assert progress.next == Progress(26, 10, 100)
    assert Progress(29, 10, 100).next.epoch == 3
    assert Progress(0, 10, 100).fraction == 0.0
    assert Progress(99, 10, 100).next.fraction == 1.0


def test_the_momentum_rises_to_one_along_a_cosine() -> None:
    for k in (0, 1, 500, 999, 1000):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * k / 1000) + 1) / 2  # BYOL, section 3.3
        assert momentum_at(k / 1000, 0.996, "cosine") == pytest.approx(expected, rel=1e-14)
    assert momentum_at(0.0, 0.99, "cosine") == 0.99
    assert momentum_at(1.0, 0.99, "cosine") == 1.0
    assert momentum_at(0.7, 0.99, "constant") == 0.99
    assert cosine(0.5, 2.0, 4.0) == pytest.approx(3.0)


def test_an_unknown_momentum_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="MOMENTUM_SCHEDULE: 'linear'"):
        momentum_at(0.5, 0.99, "linear")


def test_poly_multiplies_its_warm_up() -> None:
    """Segmentation's published rate: base 6e-5, 160,000 iterations, warm-up of 1500 from 1e-6 times the rate."""
    poly = LearningRate("poly", 6e-5, 6e-11, 0.0, 1500, 160_000, 1)
    expected = {0: 6e-11, 750: 2.98594e-5, 1500: 5.94375e-5, 80_000: 3e-5, 159_999: 3.75e-10}
    assert {step: poly.at(step) for step in expected} == pytest.approx(expected, rel=1e-5)
    assert poly.at(1499) == pytest.approx(poly.at(1500), rel=1e-3)  # no jump at its end


def test_poly_has_a_power_and_a_least_rate() -> None:
    poly = LearningRate("poly", 0.01, 0.0, 1e-4, 0, 40_000, 1, power=0.9)
    expected = {0: 0.01, 20_000: 0.0099 * 0.5**0.9 + 1e-4, 40_000: 1e-4}
    assert {step: poly.at(step) for step in expected} == pytest.approx(expected, rel=1e-12)


def test_a_poly_rate_of_zero_stays_zero() -> None:
    assert LearningRate("poly", 0.0, 0.0, 0.0, 10, 100, 1).at(3) == 0.0
