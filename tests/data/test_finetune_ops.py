"""What fine-tuning adds: RandAugment, random erasing, the padded crop; laws, draws and where they run."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision.transforms import functional as tv

from benchmarks.input.views import reference_transform
from data.augment.base import device_ops, host_ops, is_random, needs_pil, sample_keys
from data.augment.crops import (
    RandomCropPad,
    RandomResizedCrop,
    Resize,
    crop_batch,
    crop_one,
    draw_boxes,
)
from data.augment.finetune import finetune_recipe
from data.augment.ops import ColorJitter, HorizontalFlip, RandomErasing
from data.augment.pipeline import draw_photometric, host_augment, photometric
from data.augment.randaugment import RAND_AUGMENT, RandAugment, rand_augmenter, seeded_globals
from data.augment.recipes import build_recipe, check_view
from data.loader import GlobalLoader
from data.sources import ArraySource, build_source
from utils.randomness import keyed_normal, splitmix, splitmix_tensor, stream_keys

CPU = torch.device("cpu")
RAND = "rand-m9-mstd0.5-inc1"
SAME_LAW = 1e-3


def toy(count: int = 24, side: int = 24) -> ArraySource:
    images = torch.randint(
        0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.manual_seed(3)
    )
    return ArraySource("toy", images, torch.arange(count), [str(i) for i in range(count)])


def one_batch(source: ArraySource, view: tuple, **options: object) -> Tensor:
    loader = GlobalLoader(source, (view,), global_batch=len(source), seed=1, device=CPU, **options)
    return next(iter(loader.from_step(1, 2)))[1][0].views[0]


# ---- the recipe ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "names"),
    [
        (224, {}, "RandomResizedCrop HorizontalFlip"),
        (224, {"color_jitter": 0.4}, "RandomResizedCrop HorizontalFlip ColorJitter"),
        (
            224,
            {"rand_augment": RAND, "erasing": 0.25},
            "RandomResizedCrop HorizontalFlip RandAugment RandomErasing",
        ),
        (32, {"rand_augment": RAND}, "Resize RandomCropPad HorizontalFlip RandAugment"),
        (33, {}, "RandomResizedCrop HorizontalFlip"),
    ],
)
def test_the_recipe_is_that_of_deit(size: int, options: dict, names: str) -> None:
    (view,) = recipe = finetune_recipe(size, **options)
    assert " ".join(type(op).__name__ for op in view) == names
    assert is_random(recipe)
    assert needs_pil(recipe) == ("rand_augment" in options)


def test_its_numbers_are_the_published_ones() -> None:
    (view,) = finetune_recipe(224, color_jitter=0.4, erasing=0.25)
    assert view == (
        RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic"),
        HorizontalFlip(0.5),
        ColorJitter(0.4, 0.4, 0.4, 0.0, p=1.0),
        RandomErasing(0.25),
    )
    assert finetune_recipe(64, crop_min=0.35, interpolation="bilinear")[0][0] == RandomResizedCrop(
        64, (0.35, 1.0)
    )
    assert finetune_recipe(32)[0][:2] == (Resize(32, "bicubic"), RandomCropPad(32, 4))


def test_sit_fork_crops_squares_of_three_quarters_or_more() -> None:
    fork, sit = build_recipe("sit_fork", 224), build_recipe("sit", 224)
    assert fork[0][0] == RandomResizedCrop(224, (0.75, 1.0), (1.0, 1.0), "bicubic")
    assert [view[1:] for view in fork] == [view[1:] for view in sit]
    assert build_recipe("gmml", 224)[1][0] == RandomResizedCrop(
        224, (0.2, 1.0), (3 / 4, 4 / 3), "bicubic"
    )


CROP, FLIP, RA, ERASE = RandomResizedCrop(16), HorizontalFlip(), RandAugment(RAND), RandomErasing()


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (
            (CROP, ColorJitter(0.4, 0.4, 0.4, 0.0, 1.0), RA),
            "only a flip may come between",
        ),
        ((CROP, ERASE, FLIP), "RandomErasing must come last"),
        ((CROP, RA, RA), "only once"),
        ((Resize(8), CROP), "must start with"),
    ],
)
def test_views_that_cannot_run_are_refused(view: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_view(view)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("m9", "'m9' is not understood; use timm's form"),
        ("rand-m9-mstd-inc1", "'mstd' is not understood"),
        ("rand-m9-x3", "'x3' is not understood"),
    ],
)
def test_rand_augments_that_timm_would_not_understand_are_refused(
    config: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RandAugment(config)


def test_jitter_beside_rand_augment_is_refused_as_it_would_do_nothing() -> None:
    with pytest.raises(ValueError, match=r"color jitter 0\.4 has no effect beside RandAugment"):
        finetune_recipe(224, color_jitter=0.4, rand_augment=RAND)


# ---- padded crop ---------------------------------------------------------------------------------


def test_shifts_follow_torchvisions_law_and_are_applied_as_by_it(photos: np.ndarray) -> None:
    op = RandomCropPad(32, 4)
    boxes = op.draw(
        sample_keys(0, 0, np.arange(20_000), 0), np.full(20_000, 32), np.full(20_000, 36)
    )
    for column, last in ((0, 8), (1, 12)):
        assert stats.chisquare(np.bincount(boxes[:, column], minlength=last + 1)).pvalue > SAME_LAW
    images = torch.from_numpy(photos[:, :32, :36].copy()).permute(0, 3, 1, 2)
    batched = crop_batch(images, (op,), boxes[:6])
    for image, box, ours in zip(images, boxes[:6], batched, strict=True):
        expected = tv.crop(tv.pad(image, [4]), *(int(v) for v in box))
        assert torch.equal(ours, expected)
        assert torch.equal(crop_one(image, (op,), box), expected)


def test_other_sizes_are_resized_before_the_shift(photos: np.ndarray) -> None:
    (view,) = finetune_recipe(16)
    images = torch.from_numpy(photos).permute(0, 3, 1, 2)
    boxes = draw_boxes(view, sample_keys(0, 0, np.arange(6), 0), images.shape[-2:])
    assert boxes is not None
    assert boxes[:, 1].max() <= int(16 * 128 / 96) + 8 - 16
    assert crop_batch(images, view, boxes).shape == (6, 3, 16, 16)
    with pytest.raises(
        ValueError, match=r"4 x 4 pixels with 4 around it is smaller than the crop of 16"
    ):
        RandomCropPad(16).draw(sample_keys(0, 0, np.arange(1), 0), np.array([4]), np.array([4]))


def test_resident_and_fetched_shifts_are_the_same() -> None:
    (view,) = finetune_recipe(24, erasing=0.5)
    assert torch.equal(
        one_batch(toy(), view, resident=True), one_batch(toy(), view, resident=False)
    )


# ---- random erasing ------------------------------------------------------------------------------


def found_boxes(view: tuple, count: int, size: int) -> np.ndarray:
    """Return the rectangles (top, left, height, width) that the reference pipeline erases."""
    random.seed(0)
    erase = reference_transform(view).transforms[-1]
    boxes = []
    for _ in range(count):
        changed = erase(torch.zeros(3, size, size)).abs().sum(0).numpy() > 0
        if changed.any():
            rows, cols = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            assert changed[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].all()
            boxes.append([rows[0], cols[0], len(rows), len(cols)])
    return np.array(boxes)


@pytest.mark.filterwarnings("ignore:ks_2samp")
@pytest.mark.parametrize(("p", "size"), [(1.0, 40), (0.25, 17)])
def test_erased_boxes_follow_timms_law(p: float, size: int) -> None:
    count = 3000
    theirs = found_boxes((RandomResizedCrop(size), RandomErasing(p)), count, size)
    draws = RandomErasing(p).draw(sample_keys(1, 2, np.arange(20_000), 0), size)
    ours = draws["erase_box"][draws["erase"]]
    assert (ours[:, 2:] < size).all()  # never a whole row or column
    assert (ours[:, :2] >= 0).all()
    share = draws["erase"].mean()
    assert (
        share == 1.0 if p == 1.0 else stats.binomtest(len(theirs), count, share).pvalue > SAME_LAW
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > SAME_LAW
    for value in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] + b[:, 2],
    ):
        assert stats.ks_2samp(value(ours), value(theirs)).pvalue > SAME_LAW


def test_noise_stands_in_the_box_of_its_sample_and_nowhere_else(photos: np.ndarray) -> None:
    images = torch.from_numpy(photos[:, :48, :48].copy()).permute(0, 3, 1, 2).repeat(4, 1, 1, 1)
    view = (RandomResizedCrop(48), RandomErasing(0.5))
    draws = draw_photometric(view, sample_keys(0, 0, np.arange(24), 0))
    plain, erased = photometric(images, view[:1], {}), photometric(images, view, draws)
    assert 4 < draws["erase"].sum() < 20
    for i, (top, left, height, width) in enumerate(draws["erase_box"]):
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[top : top + height, left : left + width] = bool(draws["erase"][i])
        assert torch.equal((plain[i] != erased[i]).any(0), inside)


def test_noise_is_standard_normal_keyed_and_independent() -> None:
    keys = torch.from_numpy(sample_keys(0, 0, np.arange(40), 0).view(np.int64))
    noise = keyed_normal(keys, (3, 21, 21))
    assert noise.shape == (40, 3, 21, 21)
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > SAME_LAW
    flat = noise.flatten(1)
    assert (torch.corrcoef(flat) - torch.eye(40)).abs().max() < 5 / flat.shape[1] ** 0.5
    assert (torch.corrcoef(flat[:, :50].T) - torch.eye(50)).abs().max() < 5 / 40**0.5
    assert torch.equal(keyed_normal(keys[7:8], (3, 21, 21))[0], noise[7])


def test_tensors_are_hashed_as_arrays_are() -> None:
    values = np.array([0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15], dtype=np.uint64)
    np.testing.assert_array_equal(
        splitmix_tensor(torch.from_numpy(values.view(np.int64))).numpy().view(np.uint64),
        splitmix(values),
    )


# ---- RandAugment ---------------------------------------------------------------------------------


def test_rand_augment_is_timms_after_the_flip_drawn_from_the_key(photos: np.ndarray) -> None:
    (view,) = finetune_recipe(48, rand_augment=RAND)
    assert ([type(op) for op in host_ops(view)], device_ops(view)) == (
        [HorizontalFlip, RandAugment],
        (),
    )
    crop = torch.from_numpy(photos[0, :48, :48].copy()).permute(2, 0, 1)
    flipped = 0
    for i in range(12):
        key = sample_keys(0, 0, np.array([i]), 0)
        flip = bool(draw_photometric(view, key)["flip"][0])
        image = Image.fromarray(photos[0, :48, :48])
        seed = int(stream_keys(key, RAND_AUGMENT)[0])
        random.seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        expected = rand_augmenter(RAND, 48, "bicubic")(tv.hflip(image) if flip else image)
        ours = host_augment(crop, view, key)
        np.testing.assert_array_equal(ours.permute(1, 2, 0).numpy(), np.asarray(expected))
        assert (ours.shape, ours.dtype) == ((3, 48, 48), torch.uint8)
        flipped += flip
    assert 0 < flipped < 12


def test_rand_augment_has_the_settings_of_timms_create_transform() -> None:
    from timm.data import create_transform

    theirs = create_transform(
        224, is_training=True, auto_augment=RAND, interpolation="bicubic"
    ).transforms[2]
    ours = reference_transform(finetune_recipe(224, rand_augment=RAND)[0]).transforms[2]
    assert [(op.name, op.prob, op.magnitude, op.hparams, op.kwargs) for op in ours.ops] == [
        (op.name, op.prob, op.magnitude, op.hparams, op.kwargs) for op in theirs.ops
    ]
    assert ours.num_layers == theirs.num_layers


def test_the_strongest_posterize_is_black_and_no_error(photos: np.ndarray) -> None:
    """A magnitude drawn at its limit asks for 0 bits, which Pillow refuses by now."""
    augment = rand_augmenter("rand-m10-n1-p1-inc1", 32, "bicubic")
    (posterize,) = (op for op in augment.ops if op.name.startswith("Posterize"))
    assert not np.asarray(posterize(Image.fromarray(photos[0]))).any()
    posterize.magnitude = 5
    assert len(np.unique(np.asarray(posterize(Image.fromarray(photos[0]))))) == 4
    posterize.magnitude = 10


def test_rand_augment_disturbs_nobody_elses_random_numbers() -> None:
    source, (view,) = toy(), finetune_recipe(24, rand_augment=RAND)
    random.seed(5)
    np.random.seed(5)
    expected = (random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal())
    random.seed(5)
    np.random.seed(5)
    one_batch(source, view)
    assert (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.standard_normal(),
    ) == expected
    with pytest.raises(KeyError), seeded_globals(1):
        raise KeyError
    random.seed(5)
    assert random.random() == expected[0]


@pytest.mark.parametrize("kind", ["array", "files"])
def test_augmented_batches_depend_neither_on_workers_nor_on_the_start(
    kind: str, image_folder: Path
) -> None:
    source = toy(12) if kind == "array" else build_source("imagefolder", str(image_folder), "train")
    recipe = finetune_recipe(40, rand_augment=RAND, erasing=0.5)
    random.seed(0)
    first, again = (
        {
            step: batch.views[0]
            for step, (batch,) in GlobalLoader(
                source, recipe, global_batch=4, seed=1, device=CPU, num_workers=workers
            ).from_step(start, 7)
        }
        for workers, start in ((0, 0), (2, 4))
    )
    assert sorted(again) == [4, 5, 6]
    assert all(torch.equal(first[step], view) for step, view in again.items())
    assert not torch.equal(first[0], first[3])


def test_arrays_leave_the_device_where_the_recipe_needs_pil() -> None:
    source = toy()
    loaders = [
        GlobalLoader(
            source, finetune_recipe(24, rand_augment=config), global_batch=8, seed=1, device=CPU
        )
        for config in ("", RAND)
    ]
    assert [loader.resident for loader in loaders] == [True, False]
    with pytest.raises(ValueError, match="resident images cannot run RandAugment"):
        GlobalLoader(source, loaders[1].recipe, global_batch=8, seed=1, device=CPU, resident=True)


def test_the_chain_follows_the_law_of_the_reference_pipeline(photos: np.ndarray) -> None:
    """Compare statistics of whole views: mean, spread and left-right balance of every image."""
    (view,) = finetune_recipe(32 + 1, rand_augment=RAND, erasing=0.25)
    count = 500
    image = torch.from_numpy(photos[0]).permute(2, 0, 1)
    source = ArraySource(
        "one", image[None].repeat(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), ["0"]
    )
    ours = one_batch(source, view)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    pipeline, pil = reference_transform(view), Image.fromarray(photos[0])
    theirs = torch.stack([pipeline(pil) for _ in range(count)])
    half = ours.shape[-1] // 2
    for value in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x[..., :half].mean((1, 2, 3)) - x[..., -half:].mean((1, 2, 3)),
        lambda x: x[:, 0].mean((1, 2)) - x[:, 2].mean((1, 2)),
    ):
        assert stats.ks_2samp(value(ours).numpy(), value(theirs).numpy()).pvalue > SAME_LAW
