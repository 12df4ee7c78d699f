"""What all benchmarks share: sides that take turns, their times, ratios and memory."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from engine.precision import DTYPES


class Side(NamedTuple):
    """One of the things that are compared."""

    name: str
    run: Callable[[], object]


def repeated(name: str, run: Callable[[], object], times: int) -> Side:
    """Return a side that runs several times a round."""

    def once() -> None:
        for _ in range(times):
            run()

    return Side(name, once)


def measure(
    sides: list[Side], rounds: int, device: torch.device, wall: bool = False
) -> dict[str, list[float]]:
    """Time every side once a round, in turn, after one untimed round; milliseconds by side.

    `wall`: by the clock, for what also waits for other processes or for a disk.
    """
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    # in turn, so that what slows the machine for a while slows all sides alike
    for number in range(rounds + 1):
        for side in sides:
            elapsed = _wall_time(side.run, device) if wall else _time_once(side.run, device)
            if number:
                times[side.name].append(elapsed)
    return times


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    # the time of this thread alone: a busy neighbour changes it little
    begin = time.thread_time()
    run()
    return (time.thread_time() - begin) * 1e3


def _wall_time(run: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = (time.perf_counter() - begin) * 1e3
    del result  # not earlier: freeing a list of a million files takes time
    return elapsed


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the median over rounds of slow / fast."""
    # of ratios, not a ratio of medians: both times of a round saw the same machine
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def show(times: dict[str, list[float]]) -> None:
    """Print each side's median."""
    for name, values in times.items():
        print(f"{name:44s} {statistics.median(values):9.1f} ms")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context of a precision; that of fp32 does nothing."""
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Return the most memory (MiB) that `run` held at once, beyond what existed before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    # a CPU has no counter of its peak: the profiler sees each allocation and each release
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20
