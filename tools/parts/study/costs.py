"""Run a command on one thread and count what it and its children use, also over stops."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tools.parts.children import ending_with_this_process
from utils.checkpoints.atomic import write_text

ROOT = Path(__file__).resolve().parents[3]
POLL = 0.5  # seconds between two looks at a child
_TELL = 10.0  # seconds between two notes of a cost
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """What a process and its children used."""

    cpu_seconds: float
    wall_seconds: float
    peak_mib: float


def start(command: Sequence[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    """Start a child on one thread that does not outlive this program."""
    return subprocess.Popen(
        command,
        stdout=log,
        stderr=log,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=ending_with_this_process(),
    )


def run(command: Sequence[str], log: Path, costs: Path | None) -> Cost:
    """Run a command to its end; return what it used, with the starts before a stop."""
    begin, told = time.monotonic(), 0.0
    earlier = Cost(0.0, 0.0, 0.0)
    if costs and costs.exists():
        earlier = Cost(**json.loads(costs.read_bytes()))
    with log.open("ab") as file:
        child = start(command, file)
    ended = 0
    while not ended:
        # Ctrl-C reaches the child too, which saves and ends: its cost must not be lost
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(POLL)
            # unlike `wait`: with what the child and its children used
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            if costs and not ended and time.monotonic() > told + _TELL:
                # kept while the child runs, for the case that this program is killed
                told, used = time.monotonic(), tree_cpu_seconds(child.pid)
                _keep(costs, earlier, used, told - begin, _peak_mib(child.pid))
    child.returncode = os.waitstatus_to_exitcode(status)
    used = usage.ru_utime + usage.ru_stime
    cost = _keep(costs, earlier, used, time.monotonic() - begin, usage.ru_maxrss / 1024)
    if child.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"exit code {child.returncode}: {''.join(last)} ({log})")
    return cost


def _keep(costs: Path | None, earlier: Cost, cpu: float, wall: float, mib: float) -> Cost:
    """Add to an earlier cost what was used since, and write it to the file `costs`."""
    cost = Cost(earlier.cpu_seconds + cpu, earlier.wall_seconds + wall, max(earlier.peak_mib, mib))
    if costs:
        write_text(costs, json.dumps(vars(cost)))
    return cost


def _peak_mib(pid: int) -> float:
    """Return the most memory that a process has had, 0 if it has ended."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc", str(pid), "status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
    return 0.0


def tree_cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process, its children and those that ended have used."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # behind the name, which may hold anything: state, parent, ...; 11 to 14 are times
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            used[int(stat.parent.name)] = sum(map(int, fields[11:15])) / _TICKS
    family, found = {pid}, 0.0
    while family:
        found += sum(used.get(member, 0.0) for member in family)
        family = {child for child, parent in parents.items() if parent in family}
    return found
