"""101 images on two processes in batches of eight: every image counts once, as on one process."""

from typing import Any

import numpy as np
import pytest
import torch
from figures import figure
from forked import Pool, pool

IMAGES, BATCH, CLASSES = 101, 8, 7


def source() -> Any:
    from data.sources.base import ArraySource

    pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 8, 8), dtype=np.uint8)
    labels = torch.arange(IMAGES) % CLASSES
    return ArraySource("toy", torch.from_numpy(pixels), labels, [str(c) for c in range(CLASSES)])


def model(images: torch.Tensor) -> torch.Tensor:
    """Give logits that have nothing to do with the labels: some are right by chance."""
    generator = torch.Generator().manual_seed(1)
    return images.flatten(1) @ torch.randn(192, CLASSES, generator=generator)


def evaluated() -> dict[str, float]:
    from data.loader import evaluation_batches
    from evaluation.finetune import accuracy

    device = torch.device("cpu")
    return accuracy(
        model, evaluation_batches(source(), 8, batch_size=BATCH, device=device), "test_", device
    )


@pytest.fixture(scope="module")
def two() -> Any:
    with pool(2) as ranks:
        yield ranks


def test_accuracy_of_uneven_shards_is_that_of_one_process(two: Pool) -> None:
    alone, together = evaluated(), two.run(evaluated)
    figure("accuracy of 101 images: one process", f"{alone['test_top1']:.4f}", "%")
    figure("accuracy of 101 images: two processes", f"{together[0]['test_top1']:.4f}", "%")
    assert together == [alone, alone]
    right = int((model_all().argmax(1) == torch.arange(IMAGES) % CLASSES).sum())
    assert alone["test_top1"] == pytest.approx(100 * right / IMAGES, abs=1e-9)
    assert 0 < right < IMAGES


def model_all() -> torch.Tensor:
    from data.loader import evaluation_batches

    device = torch.device("cpu")
    batches = evaluation_batches(source(), 8, batch_size=IMAGES, device=device)
    return torch.cat([model(batch.views[0]) for batch in batches])
