"""The published commands as a user types them: every launcher, both mains, the same weights."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
import torch

LIMIT = 240.0  # seconds for one command on a loaded machine; some 20 where it is quiet
YAML = """\
_BASE_: base/small.yaml
MODEL:
  NAME: moby
  MOBY: {QUEUE_SIZE: 64, HIDDEN_DIM: 32, OUT_DIM: 16}
TRAIN: {EPOCHS: 2}
"""
BASE = """\
MODEL:
  BACKBONE: {NAME: resnet8}
DATA: {IMG_SIZE: 16, NUM_WORKERS: 1}
AUG: {RECIPE: byol}
OPTIM: {NAME: adamw, BASE_LR: 1e-3}
TRAIN: {PRECISION: fp32}
KNN: {K: [5]}
LOG: {TENSORBOARD: False, PRINT_FREQ: 1}
LINEAR: {EPOCHS: 2, BATCH_SIZE: 8, LRS: [0.1, 1.0]}
"""


class Place:
    """A folder with images, a yaml and the outputs; commands run in it, not in the repository."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = runs.image_folder(root / "images of a test", train=32, val=8, size=20)
        (root / "base").mkdir()
        (root / "base" / "small.yaml").write_text(BASE)
        self.cfg = root / "tiny.yaml"
        self.cfg.write_text(YAML)

    def flags(self, tag: str, batch_size: int, *more: str) -> list[str]:
        paths = [
            "--cfg",
            str(self.cfg),
            "--data-path",
            str(self.data),
            "--output",
            str(self.root / "out"),
        ]
        return [*paths, "--device", "cpu", "--batch-size", str(batch_size), "--tag", tag, *more]

    def folder(self, tag: str) -> Path:
        return self.root / "out" / "tiny" / tag

    def result(self, tag: str) -> dict[str, Any]:
        """Return what a probe of the last checkpoint wrote."""
        return json.loads(
            (self.folder(tag) / "linear" / "ckpt_00000008" / "result.json").read_text()
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RANK", "WORLD_"))
        }
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.root,
            env={**env, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process: subprocess.Popen[str]) -> str:
        """Wait for a command and return its output; it and all it started are killed if it is late."""
        try:
            text, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            text, _ = process.communicate()
            raise AssertionError(f"still running after {LIMIT} s:\n{text}") from None
        assert process.returncode == 0, text
        assert "Traceback" not in text, text
        return text

    def run(self, *command: str) -> str:
        return self.end(self.start(*command))


PRETRAIN, LINEAR = str(forked.ROOT / "main_pretrain.py"), str(forked.ROOT / "main_linear.py")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("a place"))


def launch(*options: str) -> list[str]:
    return [
        "-m",
        "torch.distributed.launch",
        "--nproc_per_node=2",
        f"--master_port={forked.free_port()}",
        *options,
    ]


def torchrun(*options: str) -> list[str]:
    return [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={forked.free_port()}",
        *options,
    ]


@pytest.fixture(scope="module")
def launched(place: Place) -> Place:
    """Pretrain with the published command."""
    text = place.run(*launch(PRETRAIN, *place.flags("launch", 4)))
    assert "global batch 8 = 2 process(es) x 1 micro-batch(es) x 4" in text
    assert runs.outcome(place.folder("launch")) == ("done", 8, "")
    return place


def test_torchrun_gives_the_weights_of_launch(launched: Place) -> None:
    launched.run(*torchrun(PRETRAIN, *launched.flags("torchrun", 4)))
    assert runs.digest(launched.folder("torchrun")) == runs.digest(launched.folder("launch"))


@pytest.mark.slow
def test_two_agents_as_on_two_machines(launched: Place) -> None:
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    options.append(f"--rdzv-endpoint=localhost:{forked.free_port()}")
    flags = launched.flags("agents", 4)
    agents = [
        launched.start("-m", "torch.distributed.run", *options, PRETRAIN, *flags) for _ in range(2)
    ]
    for agent in agents:
        launched.end(agent)
    assert runs.digest(launched.folder("agents")) == runs.digest(launched.folder("launch"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return runs.final_state(folder)["framework"]


def test_plain_python_with_the_same_global_batch(launched: Place) -> None:
    """The same images in the same steps; the sums of another order, so equal only up to rounding."""
    text = launched.run(PRETRAIN, *launched.flags("plain", 8))
    assert "global batch 8 = 1 process(es) x 1 micro-batch(es) x 8" in text
    many, one = weights(launched.folder("launch")), weights(launched.folder("plain"))
    name = "online.backbone.conv1.weight"
    torch.testing.assert_close(many[name], one[name], rtol=0, atol=2e-3)
    assert many["queue1._extra_state"] == one["queue1._extra_state"]


def test_the_probe_with_the_same_flags_finds_the_weights(launched: Place) -> None:
    text = launched.run(*launch(LINEAR, *launched.flags("launch", 4)))
    assert "loaded" in text
    assert "best_top1" in launched.result("launch")


@pytest.mark.slow
def test_the_probe_under_torchrun_and_plain_python(launched: Place) -> None:
    pretrained = ["--pretrained", str(launched.folder("launch") / "ckpt_00000008.pt")]
    launched.run(*torchrun(LINEAR, *launched.flags("probe", 4, *pretrained)))
    launched.run(LINEAR, *launched.flags("probe1", 8, *pretrained))
    assert launched.result("probe1").keys() == launched.result("probe").keys()


@pytest.mark.slow
def test_the_launcher_names_the_error_and_all_ranks_say_it_once(place: Place) -> None:
    process = place.start(*torchrun(PRETRAIN, *place.flags("many", 32)))
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert (
        text.count("error: the data set has 32 images") + text.count("error (rank 1): the data")
        == 1
    )
    report = text[text.index("FAILED") :]  # torchrun's own
    assert "ValueError: the data set has 32 images, fewer than one global batch of 64" in report
    assert "TRAIN.BATCH_SIZE" in report


LATE = """\
import os, runpy, sys, time
sys.path.insert(0, {root!r})
time.sleep(2.0 * (os.environ["LOCAL_RANK"] == "{late}"))
runpy.run_path({main!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("late", "flag", "words"),
    [(0, "--epochs", "TRAIN.EPOCHS"), (1, "--epochs", "TRAIN.EPOCHS"), (0, "--epoch", "unknown")],
)
def test_workers_that_fail_end_the_launcher_say_why_once_and_leave_no_process(
    place: Place, late: int, flag: str, words: str
) -> None:
    script = place.root / f"late{late}.py"
    script.write_text(LATE.format(root=str(forked.ROOT), main=PRETRAIN, late=late))
    process = place.start(*torchrun(str(script), *place.flags("bad", 4, flag, "0")))
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert len(re.findall(rf"^(?:\[\S+\]:)?error.*: {words}", text, re.MULTILINE)) == 1, text
    assert vanishes(process.pid), "a process of the launcher's group lives on"


def vanishes(group: int) -> bool:
    """Wait for the last process of a group: a killed one is reaped a moment after its launcher ends."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def resumed_at(text: str) -> int:
    """Return the step from which a run said it went on; its path has spaces."""
    found = re.search(r"resumed from .* at step (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else 0


CRASH = """\
import os, sys
sys.path[:0] = {paths!r}
import main_pretrain, runs
from utils.cli import run_main
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    runs.kill_at(int(os.environ["RANK"]), step=5, ranks=({victim},))
run_main(main_pretrain.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_a_killed_rank_again_and_the_run_ends_the_same(
    launched: Place, victim: int
) -> None:
    script, tag = launched.root / f"crash{victim}.py", f"restarted{victim}"
    script.write_text(
        CRASH.format(paths=[str(forked.ROOT), str(forked.ROOT / "tests")], victim=victim)
    )
    flags = launched.flags(tag, 4, "--opts", "CHECKPOINT.EVERY_STEPS", "2")
    process = launched.start(*torchrun("--max-restarts=2", str(script), *flags))
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, text
    assert resumed_at(text) == 4, text
    assert runs.outcome(launched.folder(tag)) == ("done", 8, "")
    assert runs.digest(launched.folder(tag)) == runs.digest(launched.folder("launch"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_torchrun_saves_and_the_same_command_goes_on(
    launched: Place, number: signal.Signals
) -> None:
    options = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=100"]
    flags = launched.flags(number.name, 4, "--opts", "TRAIN.EPOCHS", "200")
    log = launched.folder(number.name) / "log.txt"
    process = launched.start(*torchrun(*options, PRETRAIN, *flags))
    deadline = time.monotonic() + LIMIT
    while not (log.exists() and "step 3/" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    text, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, text  # the agent's, whatever the workers return
    assert "asked to stop" in text
    status = runs.status(launched.folder(number.name))
    assert status["state"] == "preempted"
    assert runs.steps_saved(launched.folder(number.name))[-1] == status["step"] > 0
    assert vanishes(process.pid)
    process = launched.start(*torchrun(*options, PRETRAIN, *flags))
    deadline = time.monotonic() + LIMIT
    while f"step {status['step'] + 2}/" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=LIMIT)
    assert resumed_at(text) == status["step"], text
