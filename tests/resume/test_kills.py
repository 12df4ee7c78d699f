"""Fifty SIGKILLs of two ranks, of both or of one, at any instant, lose nothing but a few steps."""

import random
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import runs
from figures import figure, spread

from utils.checkpoints import file as checkpoint

EVERY = 3  # steps between checkpoints
KILLS = {
    **dict.fromkeys(("synco", "moby", "byol", "sit"), 50),
    **dict.fromkeys(("moco_v2", "synco_v2", "mocov3", "batchformer"), 6),
}


@dataclass
class Tally:
    """What became of the kills of one method."""

    identical: list[bool] = field(default_factory=list)  # a run each, of several kills
    kills: int = 0
    resumed: list[int] = field(default_factory=list)  # the step from which each start went on
    lost: list[int] = field(default_factory=list)  # steps begun and to be done again
    # seconds from a rank's death to its survivor's end
    waits: list[float] = field(default_factory=list)


class Killed:
    """A run of two ranks that is started, killed and started again."""

    def __init__(
        self, method: str, root: Path, tag: str, tally: Tally, draw: random.Random
    ) -> None:
        # 22 or 44 steps: long enough for many kills of one run
        images = 32 if KILLS[method] > 10 else 64
        keys: dict[str, Any] = {"TRAIN__BATCH_SIZE": images // 2, "CHECKPOINT__EVERY_STEPS": EVERY}
        self.argv = runs.arguments(method, root, tag, world=2, **keys)
        self.folder, self.log, self.note = root / method / tag, root / "log", root / "note"
        self.steps = 1438 // images
        self.tally, self.draw = tally, draw

    def finish(self) -> str:
        """Run to the end and return the digest of the state."""
        jobs = forked.start("main_pretrain", self.argv, self.log, ranks=2)
        assert [job.wait() for job in jobs] == [0, 0], jobs[0].text()
        assert runs.status(self.folder)["step"] == self.steps
        self.tally.resumed.append(runs.resumed_at(jobs[0].text()))
        return runs.digest(self.folder)

    def saved(self) -> int:
        """Return the step of the newest checkpoint, 0 if there is none yet."""
        found = checkpoint.newest_valid(self.folder) if self.folder.exists() else None
        return found.step if found else 0

    def kill(self) -> None:
        """Start it and kill both ranks or one: while starting, or after a few steps, at once or later."""
        starting = self.draw.random() < 0.15
        fault = {
            "step": None if starting else self.saved() + self.draw.randrange(7),
            "delay": self.draw.uniform(0, 1)
            if starting
            else self.draw.choice([0.0, self.draw.uniform(0, 0.3)]),
            # a rank that misses one while they join waits for its launcher's timeout
            "ranks": (0, 1) if starting else self.draw.choice([(0, 1), (0,), (1,)]),
            "note": self.note,
        }
        self.note.unlink(missing_ok=True)
        prepare = partial(runs.killed_somewhere, **fault)
        jobs = forked.start("main_pretrain", self.argv, self.log, ranks=2, prepare=prepare)
        codes, seconds = forked.ends(jobs)
        self.tally.resumed.append(runs.resumed_at(jobs[0].text()))
        if -signal.SIGKILL not in codes:
            assert codes == [0, 0], jobs[0].text()  # it was quicker
            return
        self.tally.kills += 1
        if self.note.exists() and self.note.read_text():
            self.tally.lost.append(int(self.note.read_text()) + 1 - self.saved())
        if codes.count(-signal.SIGKILL) == 1:
            self.tally.waits.append(seconds)
            assert sorted(codes)[1] in (0, 5), (
                jobs
            )  # the survivor says that it lost the other; 0: it was done


@pytest.mark.slow
@pytest.mark.parametrize("method", KILLS)
def test_random_kills_of_two_ranks(method: str, tmp_path: Path) -> None:
    draw, tally = random.Random(method), Tally()
    whole = Killed(method, tmp_path, "whole", Tally(), draw).finish()
    while tally.kills < KILLS[method]:
        run = Killed(method, tmp_path, f"killed{len(tally.identical)}", tally, draw)
        while tally.kills < KILLS[method] and run.saved() < run.steps - EVERY:
            run.kill()
        tally.identical.append(run.finish() == whole)
    later = sum(step > 0 for step in tally.resumed)
    figure(f"{method}: SIGKILLs survived", tally.kills if all(tally.identical) else 0)
    figure(f"{method}: runs identical", f"{sum(tally.identical)}/{len(tally.identical)}")
    figure(f"{method}: starts that went on from a step > 0", f"{later}/{len(tally.resumed)}")
    figure(f"{method}: steps lost", spread(tally.lost, 0), f"at a checkpoint every {EVERY}")
    figure(f"{method}: survivor gone after the other rank's death", spread(tally.waits), "s")
    assert all(tally.identical)
    assert later >= KILLS[method] // 2
    assert max(tally.lost) <= EVERY + 1  # a kill inside a save loses the step before it as well
