"""A rank that hangs ends the run within the time limit, and the others name it."""

import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs

TIMEOUT = 2.0
KEYS = {"KNN__EVERY_EPOCHS": 1, "KNN__K": (5,), "TRAIN__RANK_TIMEOUT": TIMEOUT, "TRAIN__EPOCHS": 2}
LIMIT = 30.0


def hang(rank: int, *, where: str, victim: int) -> None:
    """Let ``victim`` sleep in a step, in an evaluation or in a save."""
    import main_pretrain
    from utils.checkpoints import file as checkpoint

    def sleep() -> None:
        print("asleep", time.time(), flush=True)
        time.sleep(LIMIT)

    if rank != victim:
        return
    if where == "step":
        runs.at_step(5, sleep)
    elif where == "save":
        save = checkpoint.save
        checkpoint.save = lambda *args, **keys: sleep() or save(*args, **keys)
    else:
        fit = main_pretrain.fit  # the program's own name of engine.loop.fit

        def wrapped(state: Any, loader: Any, step: Any, plan: Any, run: Any, evaluate: Any) -> Any:
            return fit(
                state, loader, step, plan, run, lambda progress: sleep() or evaluate(progress)
            )

        main_pretrain.fit = wrapped


@pytest.mark.parametrize(
    ("where", "victim", "doing"),
    [
        ("step", 1, "step 5"),
        ("step", 0, "step 5"),
        ("save", 0, "the checkpoint of step 3"),
        ("evaluation", 1, f"the evaluation after {runs.STEPS} steps"),
    ],
)
def test_a_rank_that_hangs_is_named(where: str, victim: int, doing: str, tmp_path: Path) -> None:
    argv = runs.arguments("moby", tmp_path, "t", world=2, **KEYS)
    prepare = partial(hang, where=where, victim=victim)
    jobs = forked.start("main_pretrain", argv, tmp_path / "log", ranks=2, prepare=prepare)
    jobs[victim].wait_for("asleep")
    survivor = jobs[1 - victim]
    assert survivor.wait(LIMIT) == 5, survivor.text()
    found = re.search(r"asleep ([\d.]+)", jobs[victim].text())
    assert found
    print(where, victim, "seconds", time.time() - float(found[1]))
    jobs[victim].send(signal.SIGKILL)
    jobs[victim].wait()
    (line,) = [line for line in survivor.text().splitlines() if line.startswith("error")]
    assert f"lost the other processes; no answer from rank {victim}, which began {doing} " in line
    assert "Traceback" not in survivor.text()
    if victim:
        assert f"no answer from rank {victim}" in runs.status(tmp_path / "moby" / "t")["reason"]
