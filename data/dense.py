"""Load images of any size with annotations: what detection and segmentation share.

A task says how a sample is augmented and how samples become a batch; the keys of all draws, the
replacement of unreadable samples and the order are decided here.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment.base import sample_keys
from data.decode import fast_jpeg
from data.sampler import BatchPlan, Request, RequestSampler
from data.worker import BadImages, BadImagesError, Loaded, Named, load_or_replace, loaded_as
from data.worker_pool import fetch_in_order
from utils import distributed

A = TypeVar("A")  # annotation of an image
A_co = TypeVar("A_co", covariant=True)
S = TypeVar("S")  # augmented sample, or prepared test sample
T = TypeVar("T")  # samples of a micro-batch, as they leave a worker
B_co = TypeVar("B_co", covariant=True)  # micro-batch on the device


class Annotated(Named, Protocol[A_co]):
    """A data set of images and their annotations."""

    def sample(self, index: int) -> tuple[Tensor, A_co]:
        """Read an image, uint8 (3,H,W), and its annotation."""


class TrainingSamples(Dataset[tuple[Loaded, T]], Generic[A, S, T]):
    """Turn a request into augmented samples; every draw is keyed by (seed, epoch, index).

    `augment` gets an image, its annotation and the key (1,). Everything here is pickled for workers
    that are not forked.
    """

    def __init__(
        self,
        source: Annotated[A],
        seed: int,
        augment: Callable[[Tensor, A, np.ndarray], S],
        collate: Callable[[list[S]], T],
    ) -> None:
        self.source, self.seed, self.augment, self.collate = source, seed, augment, collate
        fast_jpeg()  # found, or missed in the log, before any worker starts

    def __getitem__(self, request: Request) -> tuple[Loaded, T]:
        """Load the samples of a request; an unreadable one is replaced as its key says."""
        failures: list[tuple[str, str]] = []
        loaded, samples = [], []
        # keyed by the index that was asked for, also where another image takes its place
        keys = sample_keys(self.seed, request.epoch, request.indices, 0, request.copies)
        for place, wanted in enumerate(request.indices.tolist()):
            index, sample = load_or_replace(
                self.source, self.source.sample, self.seed, request.epoch, wanted, failures
            )
            loaded.append(index)
            samples.append(self.augment(*sample, keys[place : place + 1]))
        return loaded_as(request, loaded, failures), self.collate(samples)


class DenseLoader(ABC, Generic[T, B_co]):
    """Endless batches for `engine.loop.fit`: a function of (seed, step), whatever the workers."""

    def __init__(
        self,
        samples: Dataset[tuple[Loaded, T]],
        plan: BatchPlan,
        *,
        device: torch.device,
        workers: int = 0,
        timeout: float = 300,
        max_bad_fraction: float = 1e-4,
        batch_bytes: int = 0,
    ) -> None:
        self.samples, self.plan, self.device = samples, plan, device
        self.how = (workers, timeout, device, batch_bytes)
        seen = plan.steps_per_epoch * plan.global_batch // plan.world
        self.bad = BadImages(max_bad_fraction, seen)

    def from_step(self, step: int, total_steps: int) -> Iterator[tuple[int, list[B_co]]]:
        """Yield (step, micro-batches) from `step` up to (not including) `total_steps`."""
        requests = RequestSampler(self.plan, distributed.rank(), step, total_steps)
        with contextlib.closing(fetch_in_order(self.samples, requests, *self.how)) as fetched:
            for current in range(step, total_steps):
                parts = []
                for _ in range(self.plan.accumulation):
                    loaded, samples = next(fetched)
                    self.bad.count(loaded["epoch"], loaded["failures"])
                    parts.append(self.finish(loaded, samples))
                yield current, parts

    @abstractmethod
    def finish(self, loaded: Loaded, samples: T) -> B_co:
        """Make a micro-batch on the device."""


class _TestSamples(Dataset[tuple[int, "S | str"]], Generic[A, S]):
    """Prepared test samples; what makes one unreadable comes as a text."""

    def __init__(self, source: Annotated[A], prepare: Callable[[Tensor, A], S]) -> None:
        self.source, self.prepare = source, prepare

    def __getitem__(self, request: Request) -> tuple[int, "S | str"]:
        (index,) = map(int, request.indices)
        try:
            image, annotation = self.source.sample(index)
        except Exception as error:  # whatever a decoder may raise: the file is bad
            reason = f"{type(error).__name__}: {error}"
            return index, f"cannot read {self.source.name(index)}: {reason}. Repair or remove it"
        return index, self.prepare(image, annotation)


def samples_in_order(
    source: Annotated[A],
    prepare: Callable[[Tensor, A], S],
    *,
    device: torch.device,
    workers: int = 0,
    timeout: float = 300,
    count: int = 0,
) -> Iterator[tuple[int, S]]:
    """Yield (index, prepared sample) of this rank's images, each image on exactly one rank.

    `count` gives the first so many whatever the rank (for pictures). Raises `BadImagesError` for an
    image that cannot be read: evaluations replace nothing.
    """
    first, step = (0, 1) if count else (distributed.rank(), distributed.world_size())
    mine = range(first, min(count or len(source), len(source)), step)
    requests = [Request(0, 0, np.array([index])) for index in mine]
    samples = _TestSamples(source, prepare)
    with contextlib.closing(fetch_in_order(samples, requests, workers, timeout, device)) as fetched:
        for index, sample in fetched:
            if isinstance(sample, str):
                raise BadImagesError(sample)
            yield index, sample
