"""The input of a training step in benchmarks: images of a folder, of CIFAR-10 or random ones."""

from collections.abc import Generator

import torch
from torch import Tensor

from data.augment.base import Recipe
from data.loader import GlobalLoader
from data.sources import build_source
from data.sources.base import ArraySource, Source
from utils.batch import Batch

_WITHOUT_END = 1 << 40  # steps


def random_images(number: int, size: int) -> Source:
    """Return square random images of 8 bits that are held in memory."""
    draws = torch.Generator().manual_seed(0)
    shape = (number, 3, size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws)
    return ArraySource("random", pixels, torch.zeros(number, dtype=torch.int64), ["0"])


def images_of(folder: str, cifar: str, number: int, size: int) -> Source:
    """Return images of `folder`/train, else of CIFAR-10 in `cifar`, else `number` random ones."""
    if folder:
        return build_source("imagefolder", folder, "train")
    if cifar:
        return build_source("cifar10", cifar, "train")
    print("no folder of images was given: random ones in their place")
    return random_images(number, size)


def batches(
    source: Source,
    recipe: Recipe,
    device: torch.device,
    batch: int,
    *,
    workers: int = 0,
    decode: str = "worker",
    backend: str = "auto",
) -> Generator[Batch, None, None]:
    """Yield this process's batches without end; `batch` images over all processes."""
    loader = GlobalLoader(
        source,
        recipe,
        global_batch=batch,
        seed=0,
        device=device,
        num_workers=workers,
        decode=decode,
        backend=backend,
    )
    return (step[0] for _, step in loader.from_step(0, _WITHOUT_END))


def views_of(batch: Batch) -> list[Tensor]:
    """Return a batch's views (B, 3, H, W), channels last."""
    return [view.contiguous(memory_format=torch.channels_last) for view in batch.views]
