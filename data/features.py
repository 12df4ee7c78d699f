"""Batches of features, in the order in which the loader of images would give these images."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import utils.distributed as distributed
from data.sampler import BatchPlan, RequestSampler
from data.sources.base import Source
from data.worker import BadImages, BadImagesError
from utils.batch import Batch


class FeatureLoader:
    """Endless batches of features: a function of (seed, step), as `GlobalLoader`'s are.

    A batch is smaller than `global_batch` where there are fewer rows; an epoch's last one is filled
    up from its start. `at` returns features number (n,) on the device; their `labels` and their
    `indices` in the data set are on the host.
    """

    def __init__(
        self,
        at: Callable[[Tensor], Tensor],
        labels: Tensor,
        indices: Tensor,
        *,
        global_batch: int,
        seed: int,
        accumulation: int = 1,
    ) -> None:
        world = distributed.world_size()
        share = world * accumulation
        # few labels make a small batch, which all ranks still share evenly
        fitting = min(global_batch, max(len(labels) // share, 1) * share)
        self.at, self.labels, self.indices = at, labels, indices
        self.rank = distributed.rank()
        self.plan = BatchPlan(
            len(labels),
            fitting,
            seed,
            world,
            accumulation,
            drop_last=False,
            size_key="LINEAR.BATCH_SIZE",
        )

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps in an epoch."""
        return self.plan.steps_per_epoch

    def from_step(self, step: int, total_steps: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, micro-batches) from `step` up to (not including) `total_steps`."""
        requests = iter(RequestSampler(self.plan, self.rank, step, total_steps))
        for current in range(step, total_steps):
            yield (
                current,
                [self._batch(next(requests).indices) for _ in range(self.plan.accumulation)],
            )

    def _batch(self, numbers: np.ndarray) -> Batch:
        # The same numbers pick features, labels and indices, so they stay together.
        chosen = torch.from_numpy(numbers)
        features = self.at(chosen)
        return Batch([features], self.labels[chosen].to(features.device), self.indices[chosen])


def refuse_missing(source: Source, indices: Tensor, max_fraction: float) -> None:
    """Raise `BadImagesError` if more images than DATA.MAX_BAD_FRACTION allows have no features."""
    limit, missing = BadImages(max_fraction, len(source)).limit, len(source) - len(indices)
    if missing > limit:
        raise BadImagesError(
            f"{missing} of {len(source)} images are unreadable, at most {limit} may be: repair or "
            "remove those that the log names or raise DATA.MAX_BAD_FRACTION"
        )
