"""Worker processes that load: how they start, how their failures are explained, how they end."""

import atexit
import contextlib
import functools
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from operator import length_hint
from typing import TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

import utils.distributed as distributed
from utils.limits import error_number, worker_failure

logger = logging.getLogger("synco")

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_SHM = "/dev/shm"  # where batches travel from the workers
_PREFETCHED = 2  # batches that each worker prepares ahead
_PATIENCE = 6.0  # seconds for workers to end by themselves


class LoaderError(RuntimeError):
    """A loader worker died or hung."""


def _init_worker(_worker: int) -> None:
    """Give a worker one thread, and leave signals to the main process."""
    torch.set_num_threads(1)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a scheduler signals the whole group
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    # multiprocessing only prints that a batch could not be sent: the run would wait for it forever.
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]


def _end_worker(error: Exception, _item: object) -> None:
    """End this worker with the number of the error, which tells the main process the reason."""
    os._exit(error_number(error) or 1)


def refuse_small_shm(batch_bytes: int, num_batches: int) -> None:
    """Refuse batches that /dev/shm cannot hold while they wait for this machine's processes."""
    if not os.path.isdir(_SHM):
        return
    # all ranks of a machine share its /dev/shm
    needed = batch_bytes * num_batches * distributed.local_world_size()
    free = shutil.disk_usage(_SHM).free
    if needed > free:
        raise ValueError(
            f"{_SHM} has {free / 2**20:.1f} MiB free, and the loader workers may fill "
            f"{needed / 2**20:.1f} MiB: enlarge it (docker run --shm-size=8g or --ipc=host), or "
            "lower DATA.NUM_WORKERS (0 needs none) or the batch size"
        )


@functools.cache  # said once
def _warn_of_few_cores(num_workers: int) -> None:
    """Say that a machine has fewer cores than loader workers."""
    cores, ranks = len(os.sched_getaffinity(0)), distributed.local_world_size()
    if num_workers * ranks > cores:
        logger.warning(
            "%d loader workers share %d cores; --workers %d starts one for each",
            num_workers * ranks,
            cores,
            max(1, cores // ranks),
        )


def fetch_in_order(
    dataset: Dataset[T],
    requests: Iterable[object],
    num_workers: int,
    timeout: float,
    device: torch.device,
    batch_bytes: int = 0,
) -> Generator[T, None, None]:
    """Run `dataset[request]` for all requests in order, in `num_workers` processes or in this one.

    `batch_bytes` is what one result takes in shared memory, where it is known.
    """
    if num_workers == 0:
        yield from (dataset[request] for request in requests)
        return
    waiting = _PREFETCHED * num_workers
    refuse_small_shm(batch_bytes, min(waiting, length_hint(requests, waiting)))
    _warn_of_few_cores(num_workers)
    iterator, workers = _start(dataset, requests, num_workers, timeout, device)
    stop = functools.partial(_stop, iterator, workers)
    # a program that ends inside the loop would leave workers behind
    atexit.register(stop)
    try:
        yield from iterator
    except Exception as error:
        explained = _explained(error, timeout, [worker.exitcode for worker in workers])
        if explained is None:
            raise
        raise explained from error
    finally:
        stop()
        atexit.unregister(stop)


def _start(
    dataset: Dataset[T],
    requests: Iterable[object],
    num_workers: int,
    timeout: float,
    device: torch.device,
) -> tuple[Iterator[T], list[BaseProcess]]:
    """Start the workers; return torch's iterator over their results, and their processes."""
    before = set(multiprocessing.active_children())
    # Held back until a worker ignores them: one that dies of a signal would end the run.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():
            # two long warnings; `_warn_of_few_cores` says it in one line
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                dataset,
                sampler=requests,
                batch_size=None,
                num_workers=num_workers,
                prefetch_factor=_PREFETCHED,
                timeout=timeout,
                pin_memory=device.type == "cuda",
                worker_init_fn=_init_worker,
            )
            iterator = iter(loader)
    except BaseException:  # no further process or thread: those that have started would stay
        _kill([child for child in multiprocessing.active_children() if child not in before])
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return iterator, [child for child in multiprocessing.active_children() if child not in before]


def _explained(error: Exception, timeout: float, codes: list[int | None]) -> Exception | None:
    """Return an error of the workers in one line; None for a bug of this code."""
    text = str(error)
    if text.startswith("DataLoader timed out"):
        return LoaderError(
            f"no batch came from the loader workers within DATA.TIMEOUT, {timeout:g} s: the "
            "storage is slow or stuck"
        )
    if text.startswith("DataLoader"):
        return LoaderError(worker_failure(text, next(filter(None, codes), 0)))
    # torch: "Caught NAME in DataLoader worker process 0.", a traceback, "module.NAME: the message"
    parts = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)
    mendable = isinstance(error, (ValueError, OSError, ImportError, MemoryError))
    if mendable and text.startswith("Caught ") and len(parts) > 1:
        return type(error)(" ".join(parts[-1].split()))
    return None


def _stop(iterator: object, workers: list[BaseProcess]) -> None:
    """Ask the workers to end and kill those that hang."""
    # They ignore SIGTERM, which torch sends to those that do not end by themselves.
    deadline = threading.Timer(_PATIENCE, _kill, [workers])
    deadline.start()
    # The error is the SIGCHLD handler's report of the workers that we killed.
    with contextlib.suppress(RuntimeError):
        iterator._shutdown_workers()  # type: ignore[attr-defined]
    deadline.cancel()
    _kill(workers)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
