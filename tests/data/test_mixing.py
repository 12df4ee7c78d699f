"""Mixup and Cutmix: keyed, nothing left behind, and exact shares."""

import numpy as np
import pytest
import torch

from data.augment.mixing import Mixing

IMAGES = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).contiguous()
LABELS = torch.arange(4)
INDICES = torch.arange(10, 14)


def mix(
    step: int = 0, indices: torch.Tensor = INDICES, **options: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return Mixing(4, **options)(IMAGES, LABELS, indices, step)


def test_without_strength_labels_are_only_smoothed() -> None:
    images, shares = mix(smoothing=0.2)
    assert images is IMAGES
    torch.testing.assert_close(shares, torch.eye(4) * 0.8 + 0.05)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixup_blends_images_and_labels_alike(mode: str) -> None:
    images, shares = mix(mixup=0.8, mode=mode)
    torch.testing.assert_close(images[:, 0, 0, 0], shares @ torch.arange(4.0))
    assert not torch.equal(shares, torch.eye(4))


def test_cutmix_gives_each_label_its_area() -> None:
    images, shares = mix(cutmix=1.0, step=3)
    own = (images == IMAGES).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(own, shares.diagonal())
    assert 0 < float(own[0]) < 1


def test_draws_are_a_function_of_seed_step_and_sample() -> None:
    options = {"mixup": 0.8, "cutmix": 1.0}
    first = mix(step=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, mix(step=1, **options), strict=True))
    others = [
        *(mix(step=step, **options)[1] for step in range(2, 6)),
        mix(step=1, indices=INDICES + 1, **options)[1],
        mix(step=1, seed=1, **options)[1],
    ]
    assert not any(torch.equal(first[1], other) for other in others)


def test_the_batch_and_numpy_stay_as_they_were() -> None:
    before, state = IMAGES.clone(), np.random.get_state()[1].copy()
    mix(mixup=0.8)
    assert torch.equal(IMAGES, before)
    assert (np.random.get_state()[1] == state).all()
