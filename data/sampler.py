"""The order of samples: epochs are keyed permutations, steps are slices of the global batch.

Nothing is stored and nothing depends on the world size: position p of a global batch goes to rank p
% W and, within the rank, to micro-batch (p // W) // n where n is the micro-batch size per rank.

With repeated augmentation (Hoffer et al. 2020; DeiT) an image of the permutation stands R times in
a row: its copies go to different ranks and are augmented differently. An epoch keeps its length: it
sees the first 1/R of its permutation, and the next epoch another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from utils.randomness import hashed


@dataclass(frozen=True)
class BatchPlan:
    """How `num_samples` are cut into global batches, and those for ranks and accumulation.

    `repeats` is how often each image of an epoch occurs in it.
    """

    num_samples: int
    global_batch: int
    seed: int
    world: int = 1
    accumulation: int = 1
    drop_last: bool = True
    repeats: int = 1
    size_key: str = "TRAIN.BATCH_SIZE"  # of the configuration, for messages

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be cut evenly, and say which can."""
        if self.repeats < 1:
            raise ValueError(f"REPEATED_AUG {self.repeats} must be at least 1 (1: no repetition)")
        # each micro-batch of each process has the same size: gradients are plain means
        share = self.world * self.accumulation
        size = f"{self.size_key} (--batch-size) x TRAIN.ACCUMULATION_STEPS x processes"
        per_rank, left = divmod(self.global_batch, share)
        if left or self.global_batch < 1:
            works = f"{per_rank * share} or {(per_rank + 1) * share}" if per_rank > 0 else share
            raise ValueError(
                f"global batch {self.global_batch} ({size}) cannot be divided over {self.world} "
                f"processes and {self.accumulation} accumulation steps: use {works}"
            )
        if self.num_samples < self.global_batch:
            largest = self.num_samples // share
            remedy = f"set {self.size_key} to at most {largest}"
            if not largest:
                remedy = "use fewer of the latter two"
            raise ValueError(
                f"the data set has {self.num_samples} images, fewer than one global batch of "
                f"{self.global_batch} ({size} = {per_rank} x {self.accumulation} x {self.world}): "
                f"{remedy}"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of global batches in an epoch."""
        full, left = divmod(self.num_samples, self.global_batch)
        return full if self.drop_last else full + (left > 0)

    @property
    def micro_batch(self) -> int:
        """Return the size of one micro-batch on one rank."""
        return self.global_batch // (self.world * self.accumulation)


@dataclass(frozen=True)
class Request:
    """One micro-batch to fetch: samples `indices` (n,) of `epoch`.

    `copies` (n,) or 0 says which repetition of its sample each is.
    """

    step: int
    epoch: int
    indices: np.ndarray
    copies: np.ndarray | int = 0


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation (num_samples,) int64 of an epoch, a pure function of its arguments."""
    # The hashes never tie. So the order is the same with every version of every library.
    return np.argsort(hashed(np.arange(num_samples), "order", seed, epoch))


def global_batch(order: np.ndarray, plan: BatchPlan, position: int) -> np.ndarray:
    """Return indices and copy numbers (2,G) of batch `position` of an epoch of `order`."""
    start = position * plan.global_batch
    # the last batch wraps around to the epoch's start
    places = np.arange(start, start + plan.global_batch) % len(order)
    return np.stack([order[places // plan.repeats], places % plan.repeats])


def rank_batches(batch: np.ndarray, plan: BatchPlan, rank: int) -> list[np.ndarray]:
    """Cut the part of `rank` out of a global batch (2,G): one array (2,n) per micro-batch."""
    # every W-th: copies of an image are neighbours and go to different ranks
    return np.split(batch[:, rank :: plan.world], plan.accumulation, axis=1)


class RequestSampler:
    """The requests of one rank from step `start` up to `stop`, across epochs."""

    def __init__(self, plan: BatchPlan, rank: int, start: int, stop: int) -> None:
        self.plan, self.rank, self.start, self.stop = plan, rank, start, stop

    def __len__(self) -> int:
        """Return the number of requests."""
        return max(0, self.stop - self.start) * self.plan.accumulation

    def __iter__(self) -> Iterator[Request]:
        """Yield `accumulation` requests a step."""
        # the order of an epoch is made once, and only when a step of it is due
        current, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.plan.steps_per_epoch)
            if epoch != current:
                current, order = epoch, epoch_order(self.plan.num_samples, self.plan.seed, epoch)
            batch = global_batch(order, self.plan, position)
            for part in rank_batches(batch, self.plan, self.rank):
                yield Request(step, epoch, *part)
