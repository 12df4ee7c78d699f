"""The keyed draws: pure functions with the laws of torchvision."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms

from data.augment.base import sample_keys
from data.augment.crops import RandomResizedCrop
from data.augment.pipeline import draw_photometric
from data.augment.recipes import build_recipe
from utils.randomness import uniform

KEYS = sample_keys(1, 2, np.arange(20_000), 0)
# p-value below which two samples are taken to differ; every draw is fixed, so no flakiness
SAME_LAW = 1e-3


def test_uniforms_are_uniform_and_streams_and_views_independent() -> None:
    first, second = uniform(KEYS, 1), uniform(KEYS, 2)
    other_view = uniform(sample_keys(1, 2, np.arange(20_000), 1), 1)
    assert first.min() >= 0.0
    assert first.max() < 1.0
    assert stats.kstest(first, "uniform").pvalue > SAME_LAW
    for other in (second, other_view, np.roll(first, 1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.02


@pytest.mark.parametrize("change", [(2, 2, 0), (1, 3, 0), (1, 2, 1)])
def test_seed_epoch_and_view_each_change_the_draw(change: tuple[int, int, int]) -> None:
    seed, epoch, view = change
    assert not np.any(
        uniform(sample_keys(seed, epoch, np.arange(50), view), 1) == uniform(KEYS[:50], 1)
    )


def test_one_sample_draws_what_a_batch_draws() -> None:
    view = build_recipe("byol", 32)[1]
    sizes = np.arange(100) + 30
    keys = sample_keys(7, 0, np.arange(100), 1)
    boxes, draws = view[0].draw(keys, sizes, sizes[::-1]), draw_photometric(view, keys)
    for i in (0, 13, 99):
        key = sample_keys(7, 0, np.array([i]), 1)
        np.testing.assert_array_equal(view[0].draw(key, sizes[[i]], sizes[[99 - i]]), boxes[[i]])
        for name, values in draw_photometric(view, key).items():
            np.testing.assert_array_equal(values, draws[name][[i]])


@pytest.mark.filterwarnings("ignore:ks_2samp")
@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (224, 224, (0.08, 1.0)),
        (300, 500, (0.2, 1.0)),
        (40, 600, (0.2, 1.0)),
        (600, 40, (0.08, 1.0)),
        (8, 8, (0.3, 1.0)),
    ],
)
def test_crop_boxes_follow_torchvisions_law(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    op = RandomResizedCrop(16, scale)
    count = 3000
    ours = op.draw(KEYS[:count], np.full(count, height), np.full(count, width))
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(image, op.scale, op.ratio) for _ in range(count)]
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > SAME_LAW
    area, shape = (
        (boxes[:, 2] * boxes[:, 3] for boxes in (ours, theirs)),
        (b[:, 2] / b[:, 3] for b in (ours, theirs)),
    )
    assert stats.ks_2samp(*area).pvalue > SAME_LAW
    assert stats.ks_2samp(*shape).pvalue > SAME_LAW
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1)])
def test_crop_falls_back_to_torchvisions_central_crop(height: int, width: int) -> None:
    op = RandomResizedCrop(16, (0.9, 1.0))
    expected = transforms.RandomResizedCrop.get_params(
        torch.zeros(3, height, width), op.scale, op.ratio
    )
    np.testing.assert_array_equal(
        op.draw(KEYS[:50], np.full(50, height), np.full(50, width)), [expected] * 50
    )


def test_jitter_follows_torchvisions_law() -> None:
    draws = draw_photometric(build_recipe("moco_v1", 32)[0], KEYS)
    torch.manual_seed(0)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.4)
    theirs = [
        transforms.ColorJitter.get_params(
            jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
        )
        for _ in range(3000)
    ]
    for column, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        assert stats.ks_2samp(draws[name], [params[column] for params in theirs]).pvalue > SAME_LAW
    counts = np.unique(draws["order"] @ (4 ** np.arange(4)), return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > SAME_LAW


def test_operations_are_applied_with_their_probabilities() -> None:
    draws = draw_photometric(build_recipe("byol", 32)[1], KEYS)
    for name, p in {"flip": 0.5, "jitter": 0.8, "gray": 0.2, "blur": 0.1, "solarize": 0.2}.items():
        assert stats.binomtest(int(draws[name].sum()), len(KEYS), p).pvalue > SAME_LAW
    assert stats.kstest(draws["sigma"], stats.uniform(0.1, 1.9).cdf).pvalue > SAME_LAW
    assert draw_photometric(build_recipe("byol", 32)[0], KEYS)["blur"].all()
    assert draw_photometric(build_recipe("moco_v1", 32)[0], KEYS)["jitter"].all()


def test_draws_are_pinned() -> None:
    """Change these numbers only on purpose: every stored result of a run depends on them."""
    pinned = [0.8924128705959274, 0.6411254009397996, 0.2750134568645074]
    np.testing.assert_allclose(
        uniform(sample_keys(0, 0, np.arange(3), 0), 1), pinned, rtol=0, atol=1e-15
    )
