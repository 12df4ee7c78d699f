"""A run that was killed and started again ends bit-identical to one that never was."""

import shutil
import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from figures import figure

from models import FRAMEWORKS
from utils.checkpoints import file as checkpoint


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give one output root; runs differ by tag."""
    return tmp_path_factory.mktemp("output")


@cache
def whole_run(method: str, output: Path, world: int = 1, **keys: Any) -> Path:
    """Run to the end without a fault and return the folder."""
    tag = f"whole{len(list(output.glob('*/whole*')))}"
    argv = runs.arguments(method, output, tag, world=world, **keys)
    assert forked.run("main_pretrain", argv, output / f"{method}.log", ranks=world) == [0] * world
    folder = output / method / tag
    assert runs.status(folder)["state"] == "done"
    return folder


def uninterrupted(method: str, output: Path, world: int = 1, **keys: Any) -> str:
    """Return the digest of all state of a run without a fault."""
    return runs.digest(whole_run(method, output, world, **keys))


def finish(argv: list[str], folder: Path, log: Path, world: int = 1) -> int:
    """Start the same command again, to the end; return the step from which it went on."""
    jobs = forked.start("main_pretrain", argv, log, ranks=world)
    assert [job.wait() for job in jobs] == [0] * world, jobs[0].text()
    assert runs.outcome(folder) == ("done", runs.final_state(folder)["step"], "")
    return runs.resumed_at(jobs[0].text())


@pytest.mark.parametrize("method", FRAMEWORKS)
def test_killed_at_random_and_resumed(method: str, output: Path) -> None:
    whole = uninterrupted(method, output)
    argv = runs.arguments(method, output, "killed")
    folder, resumed = output / method / "killed", []
    for step, delay in runs.random_kills(method, 2):
        (job,) = forked.start(
            "main_pretrain",
            argv,
            output / "log",
            prepare=partial(runs.kill_at, step=step, delay=delay),
        )
        assert job.wait() in (-signal.SIGKILL, 0)
        resumed.append(runs.resumed_at(job.text()))
    resumed.append(finish(argv, folder, output / "log"))
    assert resumed[0] == 0
    assert all(0 < step <= runs.STEPS for step in resumed[1:])
    assert runs.digest(folder) == whole


@pytest.mark.parametrize("method", ["moby", "moco_v2"])
def test_local_views_are_drawn_again_after_a_kill(method: str, output: Path) -> None:
    keys = {"NAME": f"local_{method}", "AUG__LOCAL_CROPS__NUMBER": 2, "AUG__LOCAL_CROPS__SIZE": 6}
    run = partial(runs.arguments, method, output, **keys)
    for tag, fault in (("whole", None), ("killed", partial(runs.kill_at, step=5))):
        (job,) = forked.start("main_pretrain", run(tag), output / "log", prepare=fault)
        assert job.wait() == (-signal.SIGKILL if fault else 0), job.text()
    folder = output / f"local_{method}"
    assert finish(run("killed"), folder / "killed", output / "log") == 3
    assert runs.digest(folder / "killed") == runs.digest(folder / "whole")


@pytest.mark.parametrize("killed", [(0, 1), (0,), (1,)], ids=["both", "rank0", "rank1"])
def test_two_ranks_killed_and_resumed(killed: tuple[int, ...], output: Path) -> None:
    """Two epochs with an evaluation each, whose results are state too; batch norm is local to the ranks."""
    keys = {"TRAIN__EPOCHS": 2, "KNN__EVERY_EPOCHS": 1, "KNN__K": (5,), "LINEAR__BATCH_SIZE": 512}
    keys |= {"MODEL__MOCO_V2__BATCH_NORM": "local"}
    whole = uninterrupted("moco_v2", output, world=2, **keys)
    tag = "killed" + "".join(map(str, killed))
    argv = runs.arguments("moco_v2", output, tag, world=2, **keys)
    fault = partial(runs.kill_at, step=runs.STEPS + 5, ranks=killed)
    jobs = forked.start("main_pretrain", argv, output / "log", ranks=2, prepare=fault)
    for rank, job in enumerate(jobs):
        code = job.wait()
        assert code == (-signal.SIGKILL if rank in killed else 5)
        if rank not in killed:
            assert "error" in job.text()
            assert "lost the other processes" in job.text()
            assert "Traceback" not in job.text()
    assert finish(argv, output / "moco_v2" / tag, output / "log", world=2) == 15
    assert runs.digest(output / "moco_v2" / tag) == whole


@pytest.mark.parametrize("world", [3, 4])
def test_more_ranks_killed_and_resumed(world: int, output: Path) -> None:
    """A sum of three gradients depends on its order, which must not depend on where the run began."""
    tag, everyone = f"of{world}", tuple(range(world))
    keys = {"MODEL__MOBY__QUEUE_SIZE": 4 * (128 // world * world)}  # whole batches
    whole = uninterrupted("moby", output, world=world, **keys)
    argv = runs.arguments("moby", output, tag, world=world, **keys)
    fault = partial(runs.kill_at, step=7, ranks=everyone)
    codes = forked.run("main_pretrain", argv, output / "log", ranks=world, prepare=fault)
    assert codes == [-signal.SIGKILL] * world
    assert finish(argv, output / "moby" / tag, output / "log", world=world) == 6
    assert runs.digest(output / "moby" / tag) == whole


def test_world_size_and_accumulation_may_change_on_resume(output: Path) -> None:
    """The global batch stays: the same images, another split. Not bit-identical, but the run goes on."""
    argv = runs.arguments("synco", output, "elastic", world=2)
    fault = partial(runs.kill_at, step=7)
    forked.run("main_pretrain", argv, output / "log", ranks=2, prepare=fault)
    argv = runs.arguments(
        "synco", output, "elastic", TRAIN__BATCH_SIZE=32, TRAIN__ACCUMULATION_STEPS=4
    )
    assert finish(argv, output / "synco" / "elastic", output / "log") == 6


# ---- workers -------------------------------------------------------------------------------------


def test_workers_change_nothing_even_across_a_kill(output: Path, tmp_path: Path) -> None:
    data = str(runs.image_folder(tmp_path / "images"))
    keys = {"DATA__DATASET": "imagefolder", "DATA__PATH": data, "AUG__RECIPE": "moco_v2"}
    keys |= {"TRAIN__BATCH_SIZE": 8, "TRAIN__EPOCHS": 2}  # 6 steps an epoch
    whole = uninterrupted("byol", output, DATA__NUM_WORKERS=0, **keys)
    assert uninterrupted("byol", output, DATA__NUM_WORKERS=2, **keys) == whole
    argv = runs.arguments("byol", output, "workers", DATA__NUM_WORKERS=2, **keys)
    fault = partial(runs.kill_at, step=8, delay=0.01)
    forked.run("main_pretrain", argv, output / "log", prepare=fault)
    argv = runs.arguments("byol", output, "workers", DATA__NUM_WORKERS=1, **keys)
    assert finish(argv, output / "byol" / "workers", output / "log") >= 6
    assert runs.digest(output / "byol" / "workers") == whole


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(
    number: signal.Signals, output: Path
) -> None:
    argv, folder = runs.arguments("moby", output, number.name), output / "moby" / number.name
    fault = partial(runs.signal_at, step=4, number=number, times=2)  # the second at once: an echo
    (job,) = forked.start("main_pretrain", argv, output / "log", prepare=fault)
    assert job.wait() == 75, job.text()
    assert runs.status(folder)["state"] == "preempted"
    assert runs.status(folder)["step"] == 5
    assert number.name in runs.status(folder)["reason"]
    assert "start the same command again" in job.text()
    assert finish(argv, folder, output / "log") == 5
    assert runs.digest(folder) == uninterrupted("moby", output)


@pytest.mark.parametrize("where", ["save", "evaluation", "update"])
def test_a_signal_in_the_middle_of_something_waits_for_its_end(where: str, output: Path) -> None:
    keys = {"KNN__EVERY_EPOCHS": 1, "KNN__K": (5,), "LINEAR__BATCH_SIZE": 512}
    argv = runs.arguments("byol", output, where, **keys)
    fault = partial(runs.signal_during, where=where)
    assert forked.run("main_pretrain", argv, output / "log", prepare=fault) == [75]
    expected = {"save": 3, "evaluation": runs.STEPS, "update": 1}[where]
    assert finish(argv, output / "byol" / where, output / "log") == expected
    assert runs.digest(output / "byol" / where) == uninterrupted("byol", output, **keys)


@pytest.mark.parametrize("rank", [0, 1])
def test_both_ranks_stop_at_the_step_of_the_one_that_was_asked(rank: int, output: Path) -> None:
    argv, folder = (
        runs.arguments("moby", output, f"one{rank}", world=2),
        output / "moby" / f"one{rank}",
    )
    fault = partial(runs.signal_at, step=4, number=signal.SIGTERM, ranks=(rank,))
    jobs = forked.start("main_pretrain", argv, output / "log", ranks=2, prepare=fault)
    assert [job.wait() for job in jobs] == [75, 75]
    assert all("asked to stop" in job.text() and "at step 5: saved" in job.text() for job in jobs)
    assert runs.status(folder)["step"] == runs.steps_saved(folder)[-1] == 5
    assert finish(argv, folder, output / "log", world=2) == 5
    assert runs.digest(folder) == uninterrupted("moby", output, world=2)


def test_a_second_signal_stops_at_once(output: Path) -> None:
    argv, folder = runs.arguments("moby", output, "twice"), output / "moby" / "twice"
    fault = partial(runs.signal_at, step=4, number=signal.SIGTERM, times=2, pause=0.2, echo=0.1)
    (job,) = forked.start("main_pretrain", argv, output / "log", prepare=fault)
    assert job.wait() == 130
    assert "error: second SIGTERM: stopping at once" in job.text()
    assert "Traceback" not in job.text()
    assert runs.status(folder)["state"] == "failed"
    assert runs.steps_saved(folder) == [3]  # nothing was saved on the way out
    assert finish(argv, folder, output / "log") == 3
    assert runs.digest(folder) == uninterrupted("moby", output)


# ---- the control: what a checkpoint must hold ----------------------------------------------------


def drop_nothing(state: dict[str, Any]) -> None:
    """Leave the checkpoint as it is."""


def drop_position(state: dict[str, Any]) -> None:
    state["framework"]["queue1._extra_state"] = torch.tensor(0)


def drop_keys(state: dict[str, Any]) -> None:
    keys = state["framework"]["queue2.keys"]
    state["framework"]["queue2.keys"] = torch.nn.functional.normalize(
        torch.randn(keys.shape), dim=1
    )


def drop_target(state: dict[str, Any]) -> None:
    weights = state["framework"]
    for name in [name for name in weights if name.startswith("target.")]:
        weights[name] = weights[name.replace("target.", "online.", 1)]


def drop_statistics(state: dict[str, Any]) -> None:
    for name, value in state["framework"].items():
        if "running_mean" in name:
            value.zero_()


def drop_optimizer(state: dict[str, Any]) -> None:
    for moments in state["optimizer"]["state"].values():
        moments["momentum_buffer"].zero_()


def drop_step(state: dict[str, Any]) -> None:
    state["step"] -= 1


def drop_second_moments(state: dict[str, Any]) -> None:
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg_sq"].zero_()


def drop_first_moments(state: dict[str, Any]) -> None:
    for moments in state["optimizer"]["state"].values():
        moments["exp_avg"].zero_()


def drop_optimizer_steps(state: dict[str, Any]) -> None:
    for moments in state["optimizer"]["state"].values():
        moments["step"].zero_()


def drop_scaler(state: dict[str, Any]) -> None:
    state["scaler"] = {}


def drop_weights(state: dict[str, Any]) -> None:
    state["framework"]["online.backbone.conv1.weight"].mul_(1.001)


# the runs whose checkpoints are spoilt: a queue and SGD; AdamW; a gradient scaler; no queue
SETTINGS: dict[str, dict[str, Any]] = {
    "synco_v2": {},
    "moby": {"OPTIM__NAME": "adamw", "OPTIM__BASE_LR": 1e-3},
    "moco_v2": {"TRAIN__PRECISION": "fp16"},
    "byol": {},
}
ADAM = [drop_first_moments, drop_second_moments, drop_optimizer_steps]
MUTANTS: dict[str, list[Any]] = {
    "synco_v2": [
        *(
            drop_nothing,
            drop_position,
            drop_keys,
            drop_target,
            drop_statistics,
            drop_optimizer,
            drop_step,
        ),
    ],
    "moby": [
        drop_nothing,
        drop_position,
        drop_keys,
        drop_target,
        drop_statistics,
        *ADAM,
        drop_step,
    ],
    "moco_v2": [drop_nothing, drop_scaler, drop_target, drop_weights],
    "byol": [drop_nothing, drop_target, drop_statistics, drop_optimizer, drop_weights, drop_step],
}
CASES = [
    pytest.param(method, drop, marks=[] if method == "synco_v2" else [pytest.mark.slow])
    for method, drops in MUTANTS.items()
    for drop in drops
]


@cache
def halfway(method: str, output: Path) -> Path:
    """Return the folder of a run that was killed after its checkpoint of step 6."""
    argv = runs.arguments(method, output, "halfway", **SETTINGS[method])
    fault = partial(runs.kill_at, step=7)
    assert forked.run("main_pretrain", argv, output / "log", prepare=fault) == [-signal.SIGKILL]
    return output / method / "halfway"


@pytest.mark.parametrize(("method", "drop"), CASES)
def test_the_comparison_notices_each_item_that_is_lost(
    method: str, drop: Any, output: Path
) -> None:
    tag = drop.__name__
    folder = output / method / tag
    found = checkpoint.newest_valid(halfway(method, output))
    assert found is not None
    assert found.step == 6
    state = checkpoint.load(found.path)
    drop(state)
    checkpoint.save(folder, state["step"], state, meta={})
    argv = runs.arguments(method, output, tag, **SETTINGS[method])
    assert finish(argv, folder, output / "log") == state["step"]
    same = runs.digest(folder) == uninterrupted(method, output, **SETTINGS[method])
    if drop is not drop_nothing and not same:
        figure(f"{method}: noticed the loss of", tag.removeprefix("drop_").replace("_", " "))
    assert same == (drop is drop_nothing)
    shutil.rmtree(folder)


def test_the_best_values_so_far_survive(output: Path) -> None:
    found = checkpoint.newest_valid(halfway("synco_v2", output))
    assert found is not None
    state = {**checkpoint.load(found.path), "best": {"knn5_top1": 101.0}}
    folder = output / "synco_v2" / "best"
    checkpoint.save(folder, state["step"], state, meta={})
    finish(runs.arguments("synco_v2", output, "best"), folder, output / "log")
    assert runs.final_state(folder)["best"] == {"knn5_top1": 101.0}


# ---- the probe -----------------------------------------------------------------------------------


def probe_arguments(output: Path, tag: str) -> list[str]:
    keys: dict[str, Any] = {
        "LINEAR__EPOCHS": 2,
        "LINEAR__BATCH_SIZE": 256,
        "LINEAR__LRS": [1.0, 10.0],
    }
    keys |= {"KNN__K": [5], "CHECKPOINT__EVERY_STEPS": 2}
    weights = whole_run("byol", output) / f"ckpt_{runs.STEPS:08d}.pt"
    return runs.arguments("byol", output, tag, "--pretrained", str(weights), **keys)


def test_a_probe_killed_and_resumed(output: Path) -> None:
    name = f"linear/ckpt_{runs.STEPS:08d}"
    whole, killed = (output / "byol" / tag / name for tag in ("probe", "probe-killed"))
    assert forked.run("main_linear", probe_arguments(output, "probe"), output / "log") == [0]
    argv = probe_arguments(output, "probe-killed")
    fault = partial(runs.kill_at, step=7)
    assert forked.run("main_linear", argv, output / "log", prepare=fault) == [-signal.SIGKILL]
    (job,) = forked.start("main_linear", argv, output / "log")
    assert job.wait() == 0
    assert runs.resumed_at(job.text()) == 6
    assert runs.digest(killed) == runs.digest(whole)
    assert (killed / "result.json").read_text() == (whole / "result.json").read_text()
    assert "top1" in runs.final_state(whole)["best"]


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_an_optimiser_of_timm_killed_and_resumed(name: str, output: Path) -> None:
    keys = {"OPTIM__NAME": f"timm/{name}", "OPTIM__BASE_LR": 1e-3, "OPTIM__EXCLUDE_1D": True}
    keys |= {"OPTIM__WEIGHT_DECAY": 0.1, "OPTIM__WEIGHT_DECAY_END": 0.2}
    whole = uninterrupted("moby", output, **keys)
    argv = runs.arguments("moby", output, name, **keys)
    fault = partial(runs.kill_at, step=7)
    assert forked.run("main_pretrain", argv, output / "log", prepare=fault) == [-signal.SIGKILL]
    assert finish(argv, output / "moby" / name, output / "log") == 6
    assert runs.digest(output / "moby" / name) == whole
