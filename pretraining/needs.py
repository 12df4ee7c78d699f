"""What a run needs of cores, network and memory: the formulas of docs/scaling.md and --dry-run.

Bytes are those that one process sends in a step of the optimiser; it receives as many. All that
travels is float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

WORLDS = (8, 64, 512)  # processes that --dry-run and the page show beside one
SHARE = 0.1  # of a step, in which its traffic should fit
_BYTES = 4  # of a float32


def averaged(values: float, world: int) -> float:
    """Return the bytes of an average over all processes (all-reduce in a ring)."""
    # half of the way sums parts, the other half hands the sums on
    return 2 * (world - 1) / world * _BYTES * values


def gathered(values: float, world: int) -> float:
    """Return the bytes of handing `values` of each process to all others (all-gather in a ring)."""
    return (world - 1) * _BYTES * values


def shuffled(values: float, world: int) -> float:
    """Return the mean bytes of rows that change places at random (all-to-all)."""
    # one row in `world` stays where it is
    return (world - 1) / world * _BYTES * values


def scaled_rate(base: float, batch: int, reference: int) -> float:
    """Return the learning rate of a global batch; `reference` 0: it does not depend on the batch.

    The linear rule of Goyal et al. 2017 (arXiv:1706.02677).
    """
    return base * batch / reference if reference else base


def cores(images_per_second: float, of_one_core: float) -> float:
    """Return how many cores make the views that a device takes."""
    return images_per_second / of_one_core


def gigabits(sent: float, seconds: float) -> float:
    """Return the Gbit/s of a process's network with which `sent` bytes take `SHARE` of a step."""
    return 8 * sent / (SHARE * seconds) / 1e9


@dataclass(frozen=True)
class Shared:
    """The numbers that a process shares with the others in a step of the optimiser."""

    gradients: int = 0  # averaged
    keys: int = 0  # gathered: each process's embeddings go to all
    images: int = 0  # shuffled, for batch norm
    norms_forward: int = 0  # gathered: mean, deviation and count of synchronised batch norms
    norms_backward: int = 0  # averaged: two sums a channel

    def sent(self, world: int) -> dict[str, float]:
        """Return the bytes that a process sends, by purpose."""
        norms = gathered(self.norms_forward, world) + averaged(self.norms_backward, world)
        return {
            "gradients": averaged(self.gradients, world),
            "keys": gathered(self.keys, world),
            "images": shuffled(self.images, world),
            "norms": norms,
        }


@dataclass(frozen=True)
class Queue:
    """A queue of keys, of which each process holds all."""

    size: int
    dim: int
    rows: int  # keys that a process adds in a step

    def describe(self, world: int) -> str:
        """Say how many steps the queue remembers, or that it is too short."""
        if self.size % (self.rows * world):
            return f"no multiple of {self.rows * world}"
        return f"{self.size // (self.rows * world)} steps"

    def mebibytes(self) -> float:
        """Return the memory of the queue on each process."""
        return _BYTES * self.size * self.dim / 2**20


def describe(
    images: int,
    base_rate: float,
    reference: int,
    seconds: float,
    shared: Shared,
    queues: Sequence[Queue],
) -> list[str]:
    """Return a table: what changes where `images` a process and step run on more processes.

    `seconds` is a step's time on one process.
    """
    lines = [
        f"more processes with {images} images each a step (docs/scaling.md); MB that each sends:",
        "processes   batch  peak lr  gradients    keys  images   norms  Gbit/s*  queue",
    ]
    for number in (1, *WORLDS):
        batch, sent = images * number, shared.sent(number)
        rate = scaled_rate(base_rate, batch, reference)
        columns = [f"{value / 1e6:8.1f}" for value in sent.values()]
        needed = gigabits(sum(sent.values()), seconds)
        held = queues[0].describe(number) if queues else "none"
        head = f"{number:9d} {batch:7d} {rate:8.4g}   {''.join(columns)}"
        lines.append(f"{head} {needed:8.2f}  {held}")
    lines.append(f"* with which the network takes {SHARE:.0%} of a step of {seconds:.3f} s")
    if queues:
        size = sum(queue.mebibytes() for queue in queues)
        lengths = " + ".join(f"{queue.size} x {queue.dim}" for queue in queues)
        lines.append(f"queue: {lengths} keys, {size:.1f} MiB on each process")
    return lines
