"""Twenty stop signals at random times: all ranks stop at one step, save, leave nothing behind, and go on."""

import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
from figures import figure

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
SIGNALS = 20
STEPS = 96


def signal_later(
    rank: int,
    *,
    step: int,
    delay: float,
    number: signal.Signals,
    ranks: tuple[int, ...],
    note: Path,
) -> None:
    """Send a signal to this process and note when; all that it starts stays in its session."""
    os.setsid()

    def send() -> None:
        note.with_suffix(f".{rank}").write_text(str(time.monotonic()))
        runs.send_self(number)

    if rank in ranks:
        runs.at_step(step, lambda: threading.Timer(delay, send).start())


def living(sessions: set[int]) -> list[int]:
    """Return the processes of some sessions that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) in sessions and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(sessions: set[int]) -> bool:
    """Wait a little for the last process of the sessions."""
    end = time.monotonic() + 10
    while living(sessions) and time.monotonic() < end:
        time.sleep(0.05)
    return not living(sessions)


@pytest.mark.slow
def test_signals_at_random_times(tmp_path: Path) -> None:
    data = runs.image_folder(tmp_path / "images", train=48, val=12)
    keys: dict[str, Any] = {
        "DATA__DATASET": "imagefolder",
        "DATA__PATH": str(data),
        "DATA__NUM_WORKERS": 1,
    }
    keys |= {"AUG__RECIPE": "moco_v2", "TRAIN__BATCH_SIZE": 4, "TRAIN__EPOCHS": STEPS // 6}
    keys |= {
        "KNN__EVERY_EPOCHS": 1,
        "KNN__K": [5],
        "CHECKPOINT__EVERY_STEPS": 0,
        "LINEAR__BATCH_SIZE": 12,
    }
    whole = runs.arguments("synco", tmp_path, "whole", world=2, **keys)
    assert forked.run("main_pretrain", whole, tmp_path / "log", ranks=2) == [0, 0]
    argv, folder = runs.arguments("synco", tmp_path, "t", world=2, **keys), tmp_path / "synco" / "t"
    draw, seconds, orphans, at = random.Random(0), [], 0, 0
    for turn in range(SIGNALS):
        fault = {
            "step": at + draw.randrange(1, 5),
            "delay": draw.uniform(0, 0.2),  # a step, a save or an evaluation takes some hundredths
            "number": NUMBERS[turn % 3],
            "ranks": draw.choice([(0,), (1,), (0, 1)]),
            "note": tmp_path / "sent",
        }
        for old in tmp_path.glob("sent.*"):
            old.unlink()
        prepare = partial(signal_later, **fault)
        jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=prepare)
        sessions = {job.process.pid for job in jobs if job.process.pid}
        assert [job.wait() for job in jobs] == [75, 75], jobs[0].text()
        sent = [float(note.read_text()) for note in tmp_path.glob("sent.*")]
        seconds.append(time.monotonic() - min(sent))
        orphans += not gone(sessions)
        assert runs.resumed_at(jobs[0].text()) == at
        status = runs.status(folder)
        assert status["state"] == "preempted"
        assert status["step"] == runs.steps_saved(folder)[-1] > at
        assert all(f"at step {status['step']}: saved" in job.text() for job in jobs)
        at = status["step"]
    assert forked.run("main_pretrain", argv, tmp_path / "log", ranks=2) == [0, 0]
    same = runs.digest(folder) == runs.digest(tmp_path / "synco" / "whole")
    seconds.sort()
    figure("signals after which all ranks stopped at one step and saved", f"{SIGNALS}/{SIGNALS}")
    figure("final state identical to a run without signals", "yes" if same else "no")
    figure(
        "signal to the last rank's end",
        f"median {seconds[len(seconds) // 2]:.2f}, max {seconds[-1]:.2f}",
        "s",
    )
    figure("processes left behind", orphans)
    assert same
    assert orphans == 0
