"""A worker killed under torchrun: the launcher starts all again, and they go on to the same weights."""

import os
import signal
import time
from pathlib import Path

import forked
import pytest
import runs
from figures import figure
from test_launchers import PRETRAIN, Place, torchrun

KILLS = 3


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def workers(agent: int) -> list[int]:
    """Return the launcher's two training processes, rank 0 first, once they are there."""
    found: dict[str, int] = {}
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            parent = int((environ.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(
                item.split("=", 1) for item in environ.read_text().split("\0") if "=" in item
            )
        except (OSError, ValueError):
            continue
        if parent == agent and "LOCAL_RANK" in variables:
            found[variables["LOCAL_RANK"]] = int(environ.parent.name)
    return [found[rank] for rank in sorted(found)]


def steps(place: Place, tag: str) -> int:
    saved = runs.steps_saved(place.folder(tag)) if place.folder(tag).exists() else []
    return saved[-1] if saved else 0


def wait_for_step(place: Place, tag: str, step: int, agent: int) -> list[int]:
    """Wait until a checkpoint of at least ``step`` is there and return the processes that train then."""
    end = time.monotonic() + 2 * forked.LIMIT
    while time.monotonic() < end:
        if steps(place, tag) >= step and len(found := workers(agent)) == 2:
            return found
        time.sleep(0.02)
    raise AssertionError(f"no step {step}, the last is {steps(place, tag)}")


@pytest.mark.slow
def test_killed_workers_are_started_again(place: Place) -> None:
    more = (
        "--epochs",
        "16",
        "--opts",
        "CHECKPOINT.EVERY_STEPS",
        "1",
        "MODEL.BACKBONE.STEM",
        "cifar_stride2",
    )
    place.run(*torchrun(PRETRAIN, *place.flags("whole", 4, *more)))
    command = torchrun("--max-restarts=3", PRETRAIN, *place.flags("killed", 4, *more))
    process = place.start(*command)
    for number in range(KILLS):
        step = steps(place, "killed")
        found = wait_for_step(place, "killed", step + 5, process.pid)
        os.kill(found[number % 2], signal.SIGKILL)
        time.sleep(1.0)  # the launcher looks every tenth of a second
    text, _ = process.communicate(timeout=4 * forked.LIMIT)
    assert process.returncode == 0, text
    resumed = text.count("resumed from")
    same = runs.digest(place.folder("killed")) == runs.digest(place.folder("whole"))
    figure("SIGKILLs of one rank under torchrun --max-restarts=3", KILLS)
    figure("restarts that went on from a checkpoint", f"{resumed}/{KILLS}")
    figure("final state identical", "yes" if same else "no")
    assert resumed == KILLS
    assert same
