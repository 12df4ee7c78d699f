"""Each published flag does what it says, from the command line to the weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from torch import Tensor


class Runner:
    """Runs ``main_pretrain`` on 32 images: 2 epochs of 4 steps, a global batch of 8."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = runs.image_folder(root / "images", train=32, val=8, size=20)

    def run(
        self,
        tag: str,
        *flags: str,
        world: int = 1,
        batch_size: int = 8,
        main: str = "main_pretrain",
        prepare: Callable[[int], None] | None = None,
        **more: Any,
    ) -> str:
        """Run to a good end and return what it said."""
        keys: dict[str, Any] = {
            "DATA__DATASET": "imagefolder",
            "AUG__RECIPE": "byol",
            "KNN__K": [5],
        }
        keys |= {"OPTIM__NAME": "adamw", "OPTIM__BASE_LR": 1e-3, "MODEL__MOBY__QUEUE_SIZE": 64}
        keys |= {
            "LINEAR__EPOCHS": 1,
            "LINEAR__BATCH_SIZE": 8,
            "LINEAR__LRS": [0.1, 1.0],
            "TRAIN__EPOCHS": 2,
        }
        keys |= {"TRAIN__BATCH_SIZE": batch_size, "DATA__IMG_SIZE": 16}
        flags = ("--data-path", str(self.data), *flags)
        argv = runs.arguments("moby", self.root, tag, *flags, **{**keys, **more})
        jobs = forked.start(main, argv, self.root / "log", ranks=world, prepare=prepare)
        assert [job.wait() for job in jobs] == [0] * world, jobs[0].text()
        return jobs[0].text()

    def folder(self, tag: str) -> Path:
        return self.root / "moby" / tag

    def weights(self, tag: str) -> dict[str, Tensor]:
        return runs.final_state(self.folder(tag))["framework"]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    made = Runner(tmp_path_factory.mktemp("flags"))
    made.run("plain")
    return made


def test_a_finished_run_is_found_complete(runner: Runner) -> None:
    before = runs.digest(runner.folder("plain"))
    assert "at step 8" in runner.run("plain")
    assert runs.digest(runner.folder("plain")) == before


@pytest.mark.parametrize("world", [1, 2])
def test_eval_measures_and_leaves_the_run_alone(runner: Runner, world: int) -> None:
    before = (runs.digest(runner.folder("plain")), runs.status(runner.folder("plain"))["state"])
    text = runner.run("plain", "--eval", world=world, batch_size=8 // world)
    assert re.search(r"knn5_top1 \d+\.\d\d", text)
    assert (
        runs.digest(runner.folder("plain")),
        runs.status(runner.folder("plain"))["state"],
    ) == before


def refuse_training_mode(rank: int) -> None:
    """Fail where batch norms would wait for the other ranks, which measure at a pace of their own."""
    from evaluation import accuracy as evaluate

    measure = evaluate.measure_throughput

    def refuse(backbone: torch.nn.Module, _: Any) -> None:
        assert not backbone.training

    def wrapper(run: Any, backbone: torch.nn.Module, *args: Any) -> float:
        backbone.register_forward_pre_hook(refuse)
        return measure(run, backbone, *args, seconds=0.2)

    evaluate.measure_throughput = wrapper


@pytest.mark.parametrize("world", [1, 2])
def test_throughput(runner: Runner, world: int) -> None:
    text = runner.run(
        "plain", "--throughput", world=world, batch_size=8 // world, prepare=refuse_training_mode
    )
    assert re.search(rf"throughput: \d+\.\d images/s at batch size {8 // world}, 16 px", text)
    assert runs.status(runner.folder("plain"))["state"] == "done"


def test_accumulation_steps(runner: Runner) -> None:
    text = runner.run("accumulated", "--accumulation-steps", "2", batch_size=4)
    assert (
        "2 epochs x 4 steps = 8 steps, global batch 8 = 1 process(es) x 2 micro-batch(es) x 4"
        in text
    )
    plain, accumulated = runner.weights("plain"), runner.weights("accumulated")
    assert plain["queue1._extra_state"] == accumulated["queue1._extra_state"]


@pytest.mark.parametrize("world", [1, 2])
def test_use_checkpoint_changes_no_weight(runner: Runner, world: int) -> None:
    keys = {"MODEL__BACKBONE__NAME": "deit_tiny", "MODEL__BACKBONE__PATCH_SIZE": 8}
    keys |= {"MODEL__BACKBONE__DROP_PATH": 0.2, "TRAIN__EPOCHS": 1}
    for tag, flags in ((f"plain{world}", []), (f"checkpointed{world}", ["--use-checkpoint"])):
        runner.run(tag, *flags, world=world, batch_size=8 // world, **keys)
    plain, found = runner.weights(f"plain{world}"), runner.weights(f"checkpointed{world}")
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("level", "precision"), [("O0", "fp32"), ("O1", "bf16"), ("O2", "bf16")])
def test_amp_opt_level(runner: Runner, level: str, precision: str) -> None:
    assert f"parameters, {precision}" in runner.run(f"amp{level}", "--amp-opt-level", level)
    assert len(runs.steps_saved(runner.folder(f"amp{level}"))) == 2


def test_resume_from_a_named_checkpoint(runner: Runner) -> None:
    named = sorted(runner.folder("plain").glob("ckpt_*.pt"))[0]
    text = runner.run("branch", "--resume", str(named))
    assert runs.resumed_at(text) == int(named.stem[5:])
    assert runs.digest(runner.folder("branch")) == runs.digest(runner.folder("plain"))


def test_a_probe_of_random_weights_beside_the_trained_ones(runner: Runner) -> None:
    text = runner.run("plain", "--random-baseline", main="main_linear")
    assert re.search(r"^\S+ random +\d", text, re.MULTILINE)
    assert re.search(r"^\S+ ckpt_00000008 +\d", text, re.MULTILINE)
    assert "throughput" in runner.run("plain", "--throughput", main="main_linear")
    assert "best_top1" in runner.run("plain", "--eval", main="main_linear")
