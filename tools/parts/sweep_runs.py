"""Run the points of a sweep: one process a point, one point a device at a time.

Two sweeps with a point in common do not run it twice: who holds the lock of its log runs it.
"""

import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from tools.parts.children import ending_with_this_process
from tools.parts.run_files import seconds_as_text
from tools.parts.sweep_points import Point, Result
from utils.checkpoints.locks import try_lock
from utils.progress import ProgressLine, progress_text

logger = logging.getLogger("synco")

ROOT = Path(__file__).resolve().parents[2]
_PROMPT = "$ "  # of the command in the log of a run
_GRACE = 120.0  # seconds that stopped runs get to save
_POLL = 0.2  # seconds
_DIVERGED = 3  # exit code of a run whose gradient was not finite


class _Job(NamedTuple):
    """A run that is under way."""

    point: Point
    process: subprocess.Popen[bytes]
    device: str
    start: float
    log: IO[bytes]  # locked: no other sweep runs this point


@dataclass
class Runner:
    """Runs points side by side, one a device, and remembers why some failed."""

    folder: Path
    shared: Sequence[str]
    subsets: Path | None
    # values of CUDA_VISIBLE_DEVICES, one a run at a time; "" leaves it alone
    devices: Sequence[str]
    keep: bool = False
    content: str = ""  # digest of the files that the runs read
    failed: dict[str, str] = field(default_factory=dict)
    # of those that failed: their loss was not finite
    diverged: set[str] = field(default_factory=set)
    codes: set[int] = field(default_factory=set)  # exit codes of those that failed
    _running: dict[str, "_Job"] = field(default_factory=dict)
    _total: int = 0
    _done: int = 0  # finished or failed, earlier sweeps included
    _seconds: list[float] = field(default_factory=list)  # of the runs that ended
    _waited_for: set[str] = field(default_factory=set)  # names, each said once

    def run(self, points: Sequence[Point]) -> dict[Point, Result]:
        """Return the results of all points that finish, each once, in their order."""
        wanted, free = list(dict.fromkeys(points)), list(self.devices)
        waiting = [point for point in wanted if self.result(point) is None]
        self._total, self._done = len(wanted), len(wanted) - len(waiting)
        if self._total > self._done:
            before = f" ({self._done} are there already)" if self._done else ""
            side = f", {len(free)} at a time" if len(free) > 1 else ""
            logger.info("%d runs%s%s; logs: %s/*.log", self._total, before, side, self.folder)
        line = ProgressLine(self._line)
        line.start()
        try:
            while waiting or self._running:
                while free and self._start_one_of(waiting, free[-1]):
                    free.pop()
                free += self._ended()
                time.sleep(_POLL)
        except BaseException:
            self._stop()
            raise
        finally:
            line.close()
        found = {point: self.result(point) for point in wanted}
        return {point: result for point, result in found.items() if result is not None}

    def _left(self) -> str:
        """Return the time left, judged by the runs that have ended; "" while there are none."""
        if not self._seconds or self._done >= self._total:
            return ""
        each = sum(self._seconds) / len(self._seconds)
        return f"{seconds_as_text(each * (self._total - self._done) / len(self.devices))} left"

    def _line(self, columns: int) -> str:
        fields = [f"{self._done}/{self._total} runs", f"{len(self._running)} running", self._left()]
        return progress_text("sweep", self._done / max(self._total, 1), fields, columns)

    def command(self, point: Point) -> tuple[str, list[str]]:
        """Return a run's name and its command."""
        arguments = point.arguments(self.shared, self.subsets)
        name = point.name([*arguments, self.content])
        return name, [sys.executable, str(ROOT / "main_semisup.py"), "--run-name", name, *arguments]

    def result(self, point: Point) -> Result | None:
        """Return what a finished run wrote, `None` of any other."""
        place = self.folder / self.command(point)[0]
        try:
            done = json.loads((place / "status.json").read_bytes())["state"] == "done"
            return json.loads((place / "result.json").read_bytes()) if done else None
        except (OSError, ValueError, KeyError):
            return None

    def _start_one_of(self, waiting: list[Point], device: str) -> bool:
        """Start the first point that no other sweep runs; return whether there was one.

        Takes it from `waiting`, and also those that another sweep has finished meanwhile.
        """
        for point in list(waiting):
            name = self.command(point)[0]
            log = self._claim(name)
            if log is None:
                continue
            waiting.remove(point)
            # looked for under the lock: another sweep may have finished it a moment ago
            if self.result(point) is None:
                self._start(point, device, log)
                return True
            log.close()
            self._done += 1
        return False

    def _claim(self, name: str) -> IO[bytes] | None:
        """Return the log of a run, locked, or None while another process is running it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self._log(name).open("ab")
        # a run whose sweep was killed holds the lock of its folder until it has saved
        if try_lock(log, self.folder) and not _is_locked(self.folder / name / ".lock"):
            return log
        log.close()
        if name not in self._waited_for:
            logger.info("waiting for %s: another process is running it", name)
            self._waited_for.add(name)
        return None

    def _start(self, point: Point, device: str, log: IO[bytes]) -> None:
        name, command = self.command(point)
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=device) if device else dict(os.environ)
        log.write(f"{_PROMPT}{shlex.join(command)}\n".encode(errors="backslashreplace"))
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            # In a session of its own the run gets no Ctrl-C; the sweep sends it one SIGTERM.
            start_new_session=True,
            preexec_fn=ending_with_this_process(),
        )
        self._running[name] = _Job(point, process, device, time.monotonic(), log)

    def _ended(self) -> Iterator[str]:
        """Yield the devices of the runs that have ended since the last call."""
        for name, job in list(self._running.items()):
            if job.process.poll() is None:
                continue
            del self._running[name]
            self._done += 1
            self._seconds.append(time.monotonic() - job.start)
            result = self.result(job.point)
            if job.process.returncode or result is None:
                self._note_failure(name, job)
            else:
                self._say(job.point, score(result))
                if not self.keep:
                    self._discard(name)
            job.log.close()
            yield job.device

    def _note_failure(self, name: str, job: "_Job") -> None:
        code = job.process.returncode
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        last = "".join(line for line in lines[-1:] if not line.startswith(_PROMPT))
        if code == _DIVERGED:
            self.diverged.add(name)
        self.codes.add(code)
        self.failed[name] = f"exit code {code}: {last}"
        self._say(job.point, f"FAILED, {self.failed[name]}")

    def _say(self, point: Point, outcome: str) -> None:
        """Write the line of a run that has ended."""
        left = ", ".join(filter(None, [f"{self._done} of {self._total}", self._left()]))
        took = seconds_as_text(self._seconds[-1])
        logger.info("%s: %s: %s (%s)", left, point, outcome, took)

    def _discard(self, name: str) -> None:
        """Remove a finished run's checkpoints, each as large as the model and its optimiser."""
        # the records first: a checkpoint without one is not taken for valid
        for pattern in ("ckpt_*.json", "ckpt_*.pt"):
            for path in (self.folder / name).glob(pattern):
                path.unlink()

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def _stop(self) -> None:
        """Let the runs save and end; kill those that do not."""
        processes = [job.process for job in self._running.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + _GRACE
        try:
            while time.monotonic() < deadline and any(p.poll() is None for p in processes):
                time.sleep(0.05)
        finally:  # also after a second Ctrl-C
            for process in processes:
                process.kill()
                process.wait()


def _is_locked(path: Path) -> bool:
    """Return whether another process holds the lock of a file."""
    if not path.exists():
        return False
    with path.open("a+") as file:
        return not try_lock(file, path.parent)


def score(result: Result) -> str:
    """Return the accuracy of a result: of the labels held out, or of the test split."""
    for name, split in (("last_val_top1", "validation"), ("last_test_top1", "test")):
        if name in result:
            return f"{split} top-1 {result[name]:.2f}"
    return "no accuracy"
