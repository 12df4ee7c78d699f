"""Processes for tests, forked by a server that has imported torch and the mains and has run nothing.

A process costs milliseconds instead of the seconds of an import, and inherits no thread of the test
session. Every wait has a limit, and whoever is late is killed: nothing here can hang.
"""

import atexit
import contextlib
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 120.0  # seconds for anything, on a loaded machine
_PRELOAD = [
    *("pytest", "torch", "torchvision", "timm", "sklearn.datasets"),
    *(
        "models",
        "data.augment.fused.cpu",
        "data.loader",
        "data.augment.preview",
        "engine.loop",
        "evaluation.probe",
        "main_pretrain",
        "main_linear",
    ),
]


@cache
def context() -> ForkServerContext:
    """Return the fork server's context; the server starts with the first process."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_PRELOAD)
    saved = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path]), OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        for name, value in saved.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return made


def free_port() -> int:
    """Return a port that nothing listens on.

    Of those below 32768: the system gives the ones above to whoever asks for any, perhaps before
    the caller binds it.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ---- the mains -----------------------------------------------------------------------------------


class Job:
    """A main in a process of its own; its output goes to ``log``."""

    def __init__(
        self, main: str, argv: Sequence[str], log: Path, env: dict[str, str], prepare: Any
    ) -> None:
        self.log = log
        self.process = context().Process(
            target=_run_main, args=(main, list(argv), str(log), env, prepare)
        )
        self.process.start()
        atexit.register(self.process.kill)  # a failed test may leave it waiting

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, limit: float = LIMIT) -> int:
        """Return the exit code, negative for a signal; kill the process and fail after ``limit`` seconds."""
        self.process.join(limit)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {limit} s:\n{self.text()}")
        return self.process.exitcode

    def wait_for(self, text: str, limit: float = LIMIT) -> None:
        """Wait until the output contains ``text``."""
        end = time.monotonic() + limit
        while text not in self.text():
            ended = self.process.exitcode is not None
            if ended or time.monotonic() > end:
                self.process.kill()
                raise AssertionError(
                    f"{'ended' if ended else 'late'} without {text!r}:\n{self.text()}"
                )
            time.sleep(0.01)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def start(
    main: str,
    argv: Sequence[str],
    log: Path,
    ranks: int = 1,
    prepare: Callable[[int], None] | None = None,
) -> list[Job]:
    """Start ``main.main()`` on ``ranks`` processes; each first calls ``prepare(rank)``, of a test module."""
    jobs = []
    port = free_port() if ranks > 1 else 0
    for rank in range(ranks):
        env = {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        jobs.append(Job(main, argv, log.with_suffix(f".{rank}"), env if ranks > 1 else {}, prepare))
    return jobs


def run(main: str, argv: Sequence[str], log: Path, **options: Any) -> list[int]:
    """Start and wait; return the exit codes."""
    return [job.wait() for job in start(main, argv, log, **options)]


def ends(jobs: Sequence[Job], limit: float = LIMIT) -> tuple[list[int], float]:
    """Wait for all; return the exit codes and the seconds from the first end to the last."""
    alive = {job.process.sentinel: job for job in jobs}
    deadline, first = time.monotonic() + limit, None
    while alive and time.monotonic() < deadline:
        for sentinel in connection.wait(list(alive), timeout=1.0):
            del alive[sentinel]  # type: ignore[arg-type]
            first = first or time.monotonic()
    seconds = time.monotonic() - (first or time.monotonic())
    return [job.wait(1.0) for job in jobs], seconds


def as_torchrun(jobs: Sequence[Job], limit: float = LIMIT) -> list[int]:
    """Do what torchrun does: the first failure sends SIGTERM to the others. Return the exit codes."""
    deadline, told = time.monotonic() + limit, False
    while any(job.process.exitcode is None for job in jobs) and time.monotonic() < deadline:
        if not told and any(job.process.exitcode for job in jobs):
            told = True
            for job in jobs:
                if job.process.exitcode is None:
                    job.send(signal.SIGTERM)
        time.sleep(0.1)
    return [job.wait(1.0) for job in jobs]


def _run_main(main: str, argv: list[str], log: str, env: dict[str, str], prepare: Any) -> None:
    import torch

    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # workers start as they do outside of tests
    os.environ.update(env)
    sys.argv = [f"{main}.py", *argv]
    from utils.cli import run_main

    module = importlib.import_module(main)
    if prepare is not None:
        prepare(int(env.get("RANK", "0")))
    run_main(module.main)


# ---- a pool of ranks -----------------------------------------------------------------------------


class Pool:
    """Processes joined by gloo that wait for functions to run."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._workers: list[tuple[Any, connection.Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any, limit: float = LIMIT) -> list[Any]:
        """Return ``function(*args)`` of every rank; fail with the traceback of the first rank that raises."""
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send_bytes(pickle.dumps((function, args)))
        end = time.monotonic() + limit
        results = []
        for rank, (_, pipe) in enumerate(self._workers):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                self.close()
                raise AssertionError(f"rank {rank} hangs in {function.__name__}")
            try:
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                self.close()
                raise AssertionError(f"rank {rank} died in {function.__name__}") from None
        if errors := [error for _, error in results if error]:
            self.close()  # collectives may be out of step
            raise AssertionError("\n".join(errors))
        return [value for value, _ in results]

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp()) / "store"
        for rank in range(self.size):
            ours, theirs = context().Pipe()
            process = context().Process(
                target=_serve, args=(rank, self.size, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))


def _serve(rank: int, size: int, store: str, pipe: connection.Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with contextlib.suppress(EOFError):
        while True:
            function, args = pickle.loads(pipe.recv_bytes())
            torch.manual_seed(0)
            try:
                answer = (function(*args), None)
            except BaseException:
                answer = (None, f"rank {rank}: {traceback.format_exc()}")
            pipe.send_bytes(pickle.dumps(answer))


@contextlib.contextmanager
def pool(size: int = 2) -> Iterator[Pool]:
    """Give a pool and end it."""
    made = Pool(size)
    try:
        yield made
    finally:
        made.close()
