"""Loaders: a run's global batches as augmented views, and evaluation batches in order."""

import contextlib
import logging
from collections.abc import Generator, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

import utils.distributed as distributed
from data.augment.base import Recipe, View, is_random, needs_pil, sample_keys
from data.augment.crops import crop_batch, draw_boxes
from data.augment.pipeline import choose_backend, draw_photometric, photometric
from data.augment.recipes import build_recipe, check_view, for_pixels
from data.device_decode import FileReader, check_decodable, decode_in_order
from data.sampler import BatchPlan, Request, RequestSampler
from data.sources.base import Source
from data.worker import BadImages, BadImagesError, Fetched, Fetcher
from data.worker_pool import fetch_in_order
from utils.batch import Batch

logger = logging.getLogger("synco")

T = TypeVar("T")


class GlobalLoader:
    """Endless batches of a run: a function of (seed, step), whatever the ranks and workers.

    `recipe` gives the views, `global_batch` is the number of images of a step over all ranks and
    micro-batches. Images held as one array stay on `device` (`resident`), others are decoded and
    cropped by `num_workers` processes, and so are arrays where the recipe works on single images
    (RandAugment). With `drop_last=False` an epoch's last batch is filled up from the epoch's start.
    `repeated_aug` puts so many differently augmented copies of an image into an epoch of unchanged
    length. `backend` says what augments the views (`data.augment.pipeline.choose_backend`). With
    `decode` "device" the workers only read files (`data.device_decode`); images held as one array
    are not decoded.
    """

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        *,
        global_batch: int,
        seed: int,
        device: torch.device,
        accumulation: int = 1,
        num_workers: int = 0,
        drop_last: bool = True,
        timeout: float = 300,
        max_bad_fraction: float = 1e-4,
        resident: bool | None = None,
        repeated_aug: int = 1,
        backend: str = "auto",
        decode: str = "worker",
        rank: int | None = None,
        world: int | None = None,
        size_key: str = "TRAIN.BATCH_SIZE",
    ) -> None:
        recipe = for_pixels(recipe, source.pixels)
        for view in recipe:
            check_view(view)
        if resident and source.images is None:
            raise ValueError("resident images need a data set held as one array, not one of files")
        if resident and needs_pil(recipe):
            reason = "RandAugment, which works on single PIL images"
            raise ValueError(f"resident images cannot run {reason}")
        self.source, self.recipe, self.seed = source, recipe, seed
        self.device = torch.device(device)
        self.num_workers, self.timeout = num_workers, timeout
        self.backend = choose_backend(backend, self.device, source.pixels)
        self.rank = distributed.rank() if rank is None else rank
        world = distributed.world_size() if world is None else world
        self.plan = BatchPlan(
            len(source), global_batch, seed, world, accumulation, drop_last, repeated_aug, size_key
        )
        # the images that one process sees in an epoch
        self.bad = BadImages(max_bad_fraction, self.steps_per_epoch * global_batch // world)
        if resident is None:
            resident = source.images is not None and not needs_pil(recipe)
        self.resident, self._images = resident, None
        if resident and source.images is not None:
            self._images = source.images.to(self.device)
        self.decodes = decode == "device" and source.images is None
        if self.decodes:
            check_decodable(recipe, source)

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of steps in an epoch."""
        return self.plan.steps_per_epoch

    def from_step(self, step: int, total_steps: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yield (step, micro-batches) from `step` up to `total_steps`; starting is O(1)."""
        # nothing before `step` is read or drawn
        requests = RequestSampler(self.plan, self.rank, step, total_steps)
        with contextlib.closing(self._batches(requests)) as batches:
            for current in range(step, total_steps):
                yield current, [next(batches) for _ in range(self.plan.accumulation)]

    def _batches(self, requests: RequestSampler) -> Generator[Batch, None, None]:
        if self._images is not None:
            for request in requests:
                yield self._resident_batch(request, self._images)
            return
        host = Fetcher(self.source, self.recipe, self.seed)
        how = (self.num_workers, self.timeout, self.device)
        if self.decodes:
            read = fetch_in_order(FileReader(host), requests, *how)
            fetched = decode_in_order(read, host, self.device)
        else:
            size = host.shared_bytes(self.plan.micro_batch)
            fetched = fetch_in_order(host, requests, *how, size)
        with contextlib.closing(fetched):
            for item in fetched:
                self.bad.count(item["epoch"], item["failures"])
                yield self._finish(item)

    def _resident_batch(self, request: Request, images: Tensor) -> Batch:
        """Gather, crop and augment rows of the array on the device."""
        rows = images[_to(torch.from_numpy(request.indices), self.device)]
        shape = rows.shape[-2:]
        views = []
        for number, view in enumerate(self.recipe):
            keys = sample_keys(self.seed, request.epoch, request.indices, number, request.copies)
            crops = crop_batch(rows, view, draw_boxes(view, keys, shape))
            views.append(self._augment(crops, view, keys))
        return self._batch(views, torch.from_numpy(request.indices))

    def _finish(self, item: Fetched) -> Batch:
        """Augment cropped uint8 views (N,3,S,S) on the device."""
        # Also on a CPU not in the workers. To hand over two views of 224 costs both sides 0.6 ms an
        # image as uint8 and 2.1 ms as float32 (-m benchmarks views), and the augmentation 1.2 ms.
        wanted, copies = item["wanted"].numpy(), item["copies"].numpy()
        views = []
        for number, (view, crops) in enumerate(zip(self.recipe, item["views"], strict=True)):
            keys = sample_keys(self.seed, item["epoch"], wanted, number, copies)
            views.append(self._augment(_to(crops, self.device), view, keys))
        return self._batch(views, item["indices"])

    def _augment(self, crops: Tensor, view: View, keys: np.ndarray) -> Tensor:
        return photometric(
            crops, view, draw_photometric(view, keys), self.backend, self.source.pixels
        )

    def _batch(self, views: list[Tensor], indices: Tensor) -> Batch:
        return Batch(views, _to(self.source.labels[indices], self.device), indices)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    # only from pinned memory a copy runs beside the host; decoded images are on the device already
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def evaluation_batches(
    source: Source,
    img_size: int,
    *,
    batch_size: int,
    device: torch.device,
    num_workers: int = 0,
    recipe: str = "eval",
    timeout: float = 300,
    skip_unreadable: bool = False,
    rank: int | None = None,
    world: int | None = None,
) -> Iterator[Batch]:
    """Yield this rank's images (rank, rank + world, ...) in order, one unpadded view each.

    Shards may differ by one image between ranks. An unreadable image is a `BadImagesError` naming
    it: an evaluation never replaces silently. `skip_unreadable` (for a bank of training images,
    where training has replaced it) leaves it out with a warning.
    """
    views = build_recipe(recipe, img_size)
    if is_random(views):
        raise ValueError(f"evaluation recipe {recipe!r} is random; use 'eval'")
    device = torch.device(device)
    rank = distributed.rank() if rank is None else rank
    world = distributed.world_size() if world is None else world
    mine = np.arange(rank, len(source), world)
    requests = [Request(0, 0, mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]
    workers = 0 if source.images is not None else num_workers
    return _evaluate(source, views, requests, workers, timeout, device, skip_unreadable)


def _evaluate(
    source: Source,
    recipe: Recipe,
    requests: list[Request],
    num_workers: int,
    timeout: float,
    device: torch.device,
    skip_unreadable: bool,
) -> Iterator[Batch]:
    fetcher = Fetcher(source, recipe, seed=None)
    size = fetcher.shared_bytes(max((len(request.indices) for request in requests), default=0))
    items = fetch_in_order(fetcher, requests, num_workers, timeout, device, size)
    with contextlib.closing(items) as fetched:
        for item in fetched:
            if item["failures"] and not skip_unreadable:
                name, reason = item["failures"][0]
                raise BadImagesError(
                    f"cannot read {name}: {reason}. Repair or remove it: evaluations replace "
                    "nothing"
                )
            keep = _readable(source, item)
            if not keep.any():
                continue  # a network need not take an empty batch: Swin does not
            indices = item["indices"][keep]
            (crops,) = item["views"]
            if not keep.all():  # indexing copies
                crops = crops[keep]
            views = [photometric(_to(crops, device), recipe[0], {}, pixels=source.pixels)]
            yield Batch(views, _to(source.labels[indices], device), indices)


def _readable(source: Source, item: Fetched) -> Tensor:
    """Return (N,) bool, which images could be read; warn of the others."""
    for name, reason in item["failures"]:
        logger.warning("unreadable image left out: %s (%s)", name, reason)
    bad = {name for name, _ in item["failures"]}
    return torch.tensor([source.name(int(index)) not in bad for index in item["indices"]])
