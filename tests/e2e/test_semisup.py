"""main_semisup.py as it is run: on a pretraining run's weights, killed, frozen, with labels held out."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch
from torch import Tensor

FINETUNE = ("--weights", "finetune", "--lr-backbone", "0.05", "--lr-classifier", "0.5")
_numbers = itertools.count()


class Runner:
    """Runs ``main_semisup`` on a fifth of the digits: 2 epochs of 5 steps, on the weights of one epoch."""

    def __init__(self, root: Path) -> None:
        self.root = root
        argv = runs.arguments("moco_v2", root, "run", NAME="digits")
        assert forked.run("main_pretrain", argv, root / "pretrain") == [0]

    def start(
        self,
        *flags: str,
        world: int = 1,
        tag: str = "run",
        prepare: Callable[[int], None] | None = None,
        **keys: Any,
    ) -> list[forked.Job]:
        settings: dict[str, Any] = {
            "NAME": "digits",
            "FINETUNE__EPOCHS": 2,
            "FINETUNE__TRAIN_PERCENT": 20,
        }
        settings |= {"FINETUNE__BATCH_SIZE": 64 // world, **keys}
        argv = runs.arguments("moco_v2", self.root, tag, *flags, **settings)
        return forked.start(
            "main_semisup", argv, self.root / f"log{next(_numbers)}", ranks=world, prepare=prepare
        )

    def run(self, *flags: str, world: int = 1, code: int = 0, **more: Any) -> str:
        jobs = self.start(*flags, world=world, **more)
        assert [job.wait() for job in jobs] == [code] * world, jobs[0].text()
        return jobs[0].text()

    def folder(self, name: str) -> Path:
        return self.root / "digits" / "run" / "semisup" / name

    def folders(self) -> set[Path]:
        return set((self.root / "digits" / "run" / "semisup").glob("*"))

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder(name) / "result.json").read_text())

    def pretrained(self) -> dict[str, Tensor]:
        return runs.final_state(self.root / "digits" / "run")["framework"]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    made = Runner(tmp_path_factory.mktemp("semisup"))
    made.run("--run-name", "whole", *FINETUNE)
    return made


def backbone_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def test_the_published_loop_makes_a_folder_for_each_rate(runner: Runner) -> None:
    before = runner.folders()
    for rate in ("0.01", "0.02"):
        runner.run(
            "--lr-backbone",
            rate,
            "--lr-classifier",
            "0.5",
            "--weights",
            "finetune",
            "--epochs",
            "1",
        )
    made = sorted(runner.folders() - before)
    assert [re.sub("-[0-9a-f]{8}$", "", path.name) for path in made] == [
        f"ckpt_00000011-20pct-finetune-lr{rate}-0.5-1ep" for rate in ("0.01", "0.02")
    ]
    for path in made:
        result = json.loads((path / "result.json").read_text())
        assert runs.status(path)["state"] == "done"
        assert (result["weights"], result["labels"], result["images"]) == (
            "ckpt_00000011",
            "20pct",
            288,
        )
        assert 0 <= result["last_test_top1"] <= result["best_test_top1"] <= 100
        assert len((path / "subset.txt").read_text().splitlines()) == 288


def test_it_ends_with_a_line_of_its_table_and_learns(runner: Runner) -> None:
    text = runner.run("--run-name", "learns", *FINETUNE, "--epochs", "6", "--train-percent", "100")
    assert re.search(r"ckpt_00000011 +finetune +100pct +1438 +0\.05 +0\.5 ", text)
    # chance: 10; up to 4 of 8 pixels are shifted away
    assert runner.result("learns")["last_test_top1"] > 20


def test_training_starts_from_the_pretrained_backbone(runner: Runner) -> None:
    runner.run(
        "--run-name",
        "start",
        *FINETUNE,
        prepare=partial(runs.signal_at, step=0, number=signal.SIGTERM),
        code=75,
    )
    keys = runs.final_state(runner.folder("start"))["framework"]
    tuned, given = (
        backbone_of(keys, "backbone."),
        backbone_of(runner.pretrained(), "online.backbone."),
    )
    weights = [key for key, value in given.items() if value.ndim == 4]  # statistics move faster
    distance = max(float((tuned[key] - given[key]).abs().max()) for key in weights)
    assert set(tuned) == set(given)
    assert 0 < distance < 0.02  # one step away; weights go up to 0.1 and more


def test_a_finished_run_is_found_complete(runner: Runner) -> None:
    before, result = runs.digest(runner.folder("whole")), runner.result("whole")
    assert "at step 10" in runner.run("--run-name", "whole", *FINETUNE)
    assert (runs.digest(runner.folder("whole")), runner.result("whole")) == (before, result)


def test_other_test_images_are_not_mixed_into_a_run(runner: Runner, tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "data")
    keys = {"DATA__PATH": str(data), "DATA__DATASET": "imagefolder", "AUG__RECIPE": "cifar10"}
    keys |= {"FINETUNE__BATCH_SIZE": 16, "FINETUNE__TRAIN_PERCENT": 100}
    flags = ("--run-name", "images", *FINETUNE)
    runner.run(*flags, **keys)
    for path in (data / "val" / "red").glob("*.png"):
        path.rename(path.with_name(f"new{path.name}"))
    text = runner.run(*flags, code=2, **keys)
    assert "the test images are other ones now" in text
    runner.run("--eval", *flags, **keys)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_run_goes_on_bit_identically(runner: Runner, world: int) -> None:
    mixed = {"FINETUNE__MIXUP": 0.8, "FINETUNE__CUTMIX": 1.0, "FINETUNE__REPEATED_AUG": 3}
    mixed |= {"FINETUNE__AUG__RAND_AUGMENT": "rand-m9-mstd0.5-inc1", "FINETUNE__AUG__ERASING": 0.25}
    runner.run("--run-name", f"straight{world}", *FINETUNE, world=world, **mixed)
    killed = ("--run-name", f"killed{world}", *FINETUNE)
    jobs = runner.start(*killed, world=world, prepare=partial(runs.kill_at, step=7), **mixed)
    assert all(job.wait() < 0 for job in jobs)
    assert runs.resumed_at(runner.run(*killed, world=world, **mixed)) == 6
    assert runs.digest(runner.folder(f"killed{world}")) == runs.digest(
        runner.folder(f"straight{world}")
    )


def test_an_optimiser_of_timm_with_layer_decay_is_killed_and_goes_on(runner: Runner) -> None:
    keys: dict[str, Any] = {"FINETUNE__OPTIM__NAME": "timm/lamb", "FINETUNE__LAYER_DECAY": 0.7}
    flags = ("--weights", "finetune", "--lr-backbone", "0.01", "--lr-classifier", "0.01")
    runner.run("--run-name", "lamb", *flags, **keys)
    (job,) = runner.start(
        "--run-name", "lambs", *flags, prepare=partial(runs.kill_at, step=7), **keys
    )
    assert job.wait() < 0
    assert runs.resumed_at(runner.run("--run-name", "lambs", *flags, **keys)) == 6
    assert runs.digest(runner.folder("lambs")) == runs.digest(runner.folder("lamb"))


def test_asked_to_stop_it_saves_and_goes_on(runner: Runner) -> None:
    stop = partial(runs.signal_at, step=4, number=signal.SIGTERM)
    runner.run("--run-name", "stopped", *FINETUNE, prepare=stop, code=75)
    assert runs.status(runner.folder("stopped"))["state"] == "preempted"
    runner.run("--run-name", "stopped", *FINETUNE)
    assert runs.digest(runner.folder("stopped")) == runs.digest(runner.folder("whole"))


# ---- frozen --------------------------------------------------------------------------------------


def test_a_frozen_backbone_stays_bit_identical(runner: Runner) -> None:
    runner.run("--run-name", "frozen", FINETUNE__DROP_PATH=0.1, FINETUNE__MIXUP=0.8)
    tuned = backbone_of(runs.final_state(runner.folder("frozen"))["framework"], "backbone.")
    given = backbone_of(runner.pretrained(), "online.backbone.")
    assert set(tuned) == set(given)
    assert all(torch.equal(tuned[key], given[key]) for key in given)


def move_a_statistic(rank: int) -> None:
    """Move one number of the frozen backbone in the middle of the first epoch."""
    import main_semisup

    freeze = main_semisup.freeze

    def wrapper(backbone: Any, **options: Any) -> Any:
        runs.at_step(2, lambda: backbone.bn1.running_mean.data[0].add_(1e-6))
        return freeze(backbone, **options)

    main_semisup.freeze = wrapper


def test_a_frozen_backbone_that_moves_stops_the_run(runner: Runner) -> None:
    text = runner.run("--run-name", "moved", prepare=move_a_statistic, code=1)
    assert "frozen backbone moved: bn1.running_mean" in text
    # the epoch is saved before its evaluation, which is where the check stands
    assert runs.steps_saved(runner.folder("moved")) == [3, 5]
    # and the same command does not go on from the backbone that moved
    assert "frozen backbone moved: bn1.running_mean" in runner.run("--run-name", "moved", code=1)


# ---- what is measured ----------------------------------------------------------------------------


def test_accuracy_is_the_same_on_any_number_of_processes(runner: Runner) -> None:
    def measured(world: int) -> list[str]:
        text = runner.run("--run-name", "whole", *FINETUNE, "--eval", world=world)
        return re.findall(r"^.*ckpt_00000011 +finetune.*$", text, re.MULTILINE)[0].split()[-4:]

    before = runs.digest(runner.folder("whole"))
    result = runner.result("whole")
    assert measured(1) == measured(2)
    assert [f"{result[key]:.2f}" for key in ("last_test_top1", "last_test_top5")] == measured(1)[:2]
    assert runs.digest(runner.folder("whole")) == before


def test_held_out_labels_are_watched_and_the_test_split_is_read_at_the_end(runner: Runner) -> None:
    runner.run("--run-name", "held", *FINETUNE, FINETUNE__HOLD_OUT=0.25)
    result = runner.result("held")
    assert (result["images"], result["held_out"]) == (216, 72)
    assert {key for key in result if "top1" in key} == {
        "last_val_top1",
        "best_val_top1",
        "last_test_top1",
    }
    lines = [
        json.loads(x) for x in (runner.folder("held") / "metrics.jsonl").read_text().splitlines()
    ]
    watched = [line for line in lines if any("top1" in key for key in line)]
    assert len(watched) == 2
    assert not any("test_top1" in line for line in watched)


def test_without_the_test_split_it_is_not_even_opened(runner: Runner, tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "images", train=24, val=2, size=12)
    shutil.rmtree(data / "val")
    files = ("--data-path", str(data), "--run-name", "no-test", *FINETUNE)
    keys = {"DATA__DATASET": "imagefolder", "DATA__IMG_SIZE": 12, "FINETUNE__TRAIN_PERCENT": 100}
    runner.run(*files, **keys, FINETUNE__HOLD_OUT=0.25, FINETUNE__TEST=False)
    assert not any("test" in key for key in runner.result("no-test"))
    assert "val" in runner.run(*files, **keys, FINETUNE__HOLD_OUT=0.25, code=2)


def test_evaluations_may_be_rare_but_never_miss_the_last_epoch(runner: Runner) -> None:
    text = runner.run("--run-name", "rare", *FINETUNE, "--epochs", "5", FINETUNE__EVAL_EPOCHS=3)
    assert re.findall(r"epoch (\d) done", text) == ["3", "5"]


def test_a_list_of_labels_stands_for_the_draw(runner: Runner) -> None:
    listed = runner.root / "few.txt"
    names = (runner.folder("whole") / "subset.txt").read_text().splitlines()[:24]
    listed.write_text("\n".join(names) + "\n")
    text = runner.run(*FINETUNE, "--subset", str(listed))
    (folder,) = [path for path in runner.folders() if "-few-" in path.name]
    assert (folder / "subset.txt").read_text() == listed.read_text()
    assert "global batch 24" in text  # fewer images than a batch: all of them


# ---- weights -------------------------------------------------------------------------------------


def test_random_weights_alone_or_beside(runner: Runner) -> None:
    before = runner.folders()
    text = runner.run(*FINETUNE, "--epochs", "1", "--random-baseline", "--seed", "5")
    assert {path.name.split("-")[0] for path in runner.folders() - before} == {
        "ckpt_00000011",
        "random",
    }
    assert len(re.findall(r"(ckpt_00000011|random) +finetune", text)) == 2
    text = runner.run(
        *FINETUNE, "--epochs", "1", "--pretrained", "none", "--run-name", "r", tag="alone"
    )
    assert "random weights" in text
    runner.run(*FINETUNE, "--epochs", "1", "--random-baseline", "--run-name", "named")
    assert (runner.result("named")["weights"], runner.result("named-random")["weights"]) == (
        "ckpt_00000011",
        "random",
    )


def test_a_runs_folder_names_its_newest_weights(runner: Runner) -> None:
    text = runner.run(
        *FINETUNE, "--epochs", "1", "--pretrained", str(runner.root / "digits" / "run"), tag="other"
    )
    assert "ckpt_00000011.pt" in text


def test_two_networks_of_a_file_are_two_runs(runner: Runner) -> None:
    text = runner.run("--run-name", "averaged", "--which", "target")
    assert "took target, the file also holds: online (--which online)" in text
    assert text.count("left out: ") == 1, "said once per loading"
    tuned = backbone_of(runs.final_state(runner.folder("averaged"))["framework"], "backbone.")
    given = backbone_of(runner.pretrained(), "target.backbone.")
    online = backbone_of(runner.pretrained(), "online.backbone.")
    assert all(torch.equal(tuned[key], given[key]) for key in given)
    assert not torch.equal(given["conv1.weight"], online["conv1.weight"])
    assert runner.result("averaged")["weights"] == "ckpt_00000011-target"
    # A run of one network does not go on as a run of the other.
    assert ", target" in runner.run("--run-name", "averaged", "--which", "online", code=2)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--weights", "finetune"), "--lr-backbone"),
        (("--weights", "thaw"), "FINETUNE.WEIGHTS"),
        (("--subset", "absent.txt"), "absent.txt"),
        (("--train-percent", "0"), "TRAIN_PERCENT"),
        (("--lr-backbones", "1"), "--lr-backbone"),
        (("--training-mode", "SSL"), "--training-mode"),
        (("--eval", "--run-name", "nothing"), "--eval"),
        (("--run-name", "../../other/x"), "--run-name"),
        (("--run-name", ".."), "--run-name"),
    ],
)
def test_what_a_person_can_mend_is_one_line(
    runner: Runner, flags: tuple[str, ...], words: str
) -> None:
    text = runner.run(*flags, code=2)
    assert words in text
    assert "Traceback" not in text


FAMILIES = {
    "resnet8": ("barlow", {"MODEL__BACKBONE__NAME": "resnet8"}),
    "deit": (
        "deit",
        {
            "MODEL__BACKBONE__NAME": "deit_tiny",
            "MODEL__BACKBONE__PATCH_SIZE": 8,
            "DATA__IMG_SIZE": 16,
        },
    ),
    "two tokens": (
        "sit",
        {
            **{
                "MODEL__BACKBONE__NAME": "deit_tiny",
                "MODEL__BACKBONE__PATCH_SIZE": 8,
                "DATA__IMG_SIZE": 16,
            },
            **{"MODEL__BACKBONE__NUM_TOKENS": 2, "FINETUNE__REPRESENTATION_SIZE": 16},
        },
    ),
    "two tokens, frozen": (
        "sit_linear",
        {
            **{
                "MODEL__BACKBONE__NAME": "deit_tiny",
                "MODEL__BACKBONE__PATCH_SIZE": 8,
                "DATA__IMG_SIZE": 16,
            },
            "MODEL__BACKBONE__NUM_TOKENS": 2,
        },
    ),
    "swin": ("swin", {"MODEL__BACKBONE__NAME": "swin_tiny", "DATA__IMG_SIZE": 32}),
}


@pytest.mark.parametrize(
    "family",
    # 28 M parameters
    [pytest.param(f, marks=pytest.mark.slow) if f == "swin" else f for f in FAMILIES],
)
def test_every_family_is_fine_tuned_with_its_recipe(runner: Runner, family: str) -> None:
    protocol, keys = FAMILIES[family]
    decay = () if protocol in ("barlow", "sit_linear") else ("--layer-decay", "0.75")
    flags = (
        "--pretrained",
        "none",
        "--protocol",
        protocol,
        "--epochs",
        "1",
        "--train-percent",
        "1",
        *decay,
    )
    more = {
        "FINETUNE__SCHEDULE__WARMUP_EPOCHS": 0,
        "FINETUNE__BATCH_SIZE": 14,
        "FINETUNE__TRAIN_PERCENT": 1,
    }
    runner.run(
        *flags, **keys, **more, FINETUNE__EPOCHS=1, tag=family.replace(" ", "").replace(",", "")
    )


@pytest.mark.slow
def test_a_sweep_of_two_points_on_digits(runner: Runner) -> None:
    words = runs.arguments("moco_v2", runner.root, "run", NAME="digits")
    place, opts = words[2:6], words[6:]
    flags = "--epochs 1 --train-percent 20 --lr-backbone 0.01 0.05 --seeds 0 1 --start pretrained".split()
    argv = ["--device", "cpu", *place, "--batch-size", "64", *flags, "--", *opts]
    command = [sys.executable, str(Path(__file__).parents[2] / "tools" / "sweep.py"), *argv]
    assert subprocess.run(command, timeout=600).returncode == 0
    rows = (runner.root / "digits" / "run" / "semisup" / "sweep.csv").read_text().splitlines()
    assert len(rows) == 3
    assert sum(",yes," in row for row in rows) == 1
