"""Run the points of a sweep: one process a point, one point a device at a time."""

import ctypes
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.parts.sweep_points import Point, Result
from utils.locks import try_lock

ROOT = Path(__file__).resolve().parents[2]
_GRACE = 120.0  # seconds that stopped runs get to save
_POLL = 0.2  # seconds
_DIVERGED = 3  # exit code of a run whose gradient was not finite
_PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Loaded here: between fork and exec of a process with threads, loading may wait for a lock forever.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


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
    _running: dict[str, tuple[Point, subprocess.Popen[bytes], str]] = field(default_factory=dict)

    def run(self, points: Sequence[Point]) -> dict[Point, Result]:
        """Return the results of all points that finish, each once, in their order."""
        waiting, free = list(dict.fromkeys(points)), list(self.devices)
        total, done = len(waiting), 0
        try:
            while waiting or self._running:
                while waiting and free:
                    point = waiting.pop(0)
                    if self.result(point) is None:
                        self._wait_for_earlier(self.command(point)[0])
                    # asked again: the run that was waited for may have finished the point
                    if self.result(point) is None:
                        self._start(point, free.pop(), f"{total - len(waiting)}/{total}")
                    else:
                        done += 1
                free += self._ended()
                time.sleep(0.05)
        except BaseException:
            self._stop()
            raise
        if done:
            print(f"{done} of {total} runs were finished before")
        found = {point: self.result(point) for point in dict.fromkeys(points)}
        return {point: result for point, result in found.items() if result is not None}

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

    def _start(self, point: Point, device: str, number: str) -> None:
        name, command = self.command(point)
        print(f"[{number}] {shlex.join(command)}", flush=True)
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES=device) if device else dict(os.environ)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C does not reach a session of its own: the sweep passes it on, once.
                start_new_session=True,
                preexec_fn=functools.partial(end_with_parent, os.getpid()),
            )
        self._running[name] = (point, process, device)

    def _wait_for_earlier(self, name: str) -> None:
        """Wait for a run of an earlier sweep, which holds the lock of its folder until it ends."""
        path, said = self.folder / name / ".lock", False
        while path.exists():
            with path.open("a+") as file:
                if try_lock(file, path.parent):
                    return
            if not said:
                print(f"waiting for {name}: another process is running it", flush=True)
            said = True
            time.sleep(_POLL)

    def _ended(self) -> Iterator[str]:
        """Yield the devices of the runs that have ended since the last call."""
        for name, (point, process, device) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[name]
            if process.returncode or self.result(point) is None:
                self._note_failure(name, process.returncode)
            elif not self.keep:
                self._discard(name)
            yield device

    def _note_failure(self, name: str, code: int) -> None:
        last = self._log(name).read_text(errors="replace").strip().splitlines()[-1:]
        if code == _DIVERGED:
            self.diverged.add(name)
        self.failed[name] = f"exit code {code}: {''.join(last)}"
        print(f"FAILED {name}: {self.failed[name]}", flush=True)

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
        processes = [process for _, process, _ in self._running.values()]
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


def end_with_parent(parent: int) -> None:
    """Ask the kernel, in a new run, to send SIGTERM when the sweep dies: the run saves and ends."""
    # the sweep's own handler would lose the signal before exec
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the sweep died before the kernel was asked
        os._exit(1)
