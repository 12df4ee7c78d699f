"""Repeated augmentation: DeiT's order, another draw for each copy, and all promises of batches kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.augment.crops import RandomResizedCrop, Resize
from data.augment.finetune import finetune_recipe
from data.augment.ops import ColorJitter
from data.augment.recipes import build_recipe
from data.loader import GlobalLoader
from data.sampler import BatchPlan, RequestSampler, epoch_order
from data.sources import ArraySource, Source, build_source

CPU = torch.device("cpu")
RECIPE = build_recipe("byol", 16)


def toy(count: int = 50) -> ArraySource:
    images = torch.randint(
        0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=torch.manual_seed(3)
    )
    return ArraySource("toy", images, torch.arange(count), [str(i) for i in range(count)])


def deit_positions(order: np.ndarray, repeats: int, world: int) -> list[list[int]]:
    """Write out DeiT's sampler: repeat in a row, deal to the ranks in turn, keep an epoch's worth."""
    repeated = [int(index) for index in order for _ in range(repeats)]
    return [repeated[rank::world][: len(order) // world] for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("repeats", [2, 3])
def test_every_rank_sees_what_deits_sampler_deals_it(world: int, repeats: int) -> None:
    plan = BatchPlan(48, 8, seed=1, world=world, repeats=repeats)
    for epoch in (0, 3):
        start = epoch * plan.steps_per_epoch
        dealt = [
            [
                int(i)
                for request in RequestSampler(plan, rank, start, start + 6)
                for i in request.indices
            ]
            for rank in range(world)
        ]
        assert dealt == deit_positions(epoch_order(48, 1, epoch), repeats, world)


def test_an_epoch_keeps_its_length_and_each_sees_other_images() -> None:
    plan = BatchPlan(48, 8, seed=1, repeats=3)
    assert plan.steps_per_epoch == BatchPlan(48, 8, seed=1).steps_per_epoch == 6
    requests = list(RequestSampler(plan, 0, 0, 60))
    seen = [
        set(np.concatenate([r.indices for r in requests if r.epoch == e]).tolist())
        for e in range(10)
    ]
    assert [len(images) for images in seen] == [16] * 10
    assert len(set().union(*seen)) > 40  # the published code saw the same third for ever
    for request in requests:
        pairs = set(zip(request.indices.tolist(), np.asarray(request.copies).tolist(), strict=True))
        assert len(pairs) == 8


def test_copies_of_an_image_go_to_different_ranks() -> None:
    plan = BatchPlan(48, 12, seed=1, world=4, repeats=3)
    first = [
        set(next(iter(RequestSampler(plan, rank, 0, 1))).indices.tolist()) for rank in range(4)
    ]
    assert sum(len(images) for images in first) == 12  # no rank has two copies of one
    assert len(set().union(*first)) == 4


def views_of(
    source: Source, repeats: int, world: int, step: int, **options: object
) -> list[Tensor]:
    """Return labels and views of one step in global order, put together from all ranks."""
    found = []
    for rank in range(world):
        loader = GlobalLoader(
            *(source, RECIPE),
            **{"global_batch": 16, "seed": 1, "device": CPU, "repeated_aug": repeats} | options,
            **{"rank": rank, "world": world},
        )
        _, batches = next(iter(loader.from_step(step, step + 1)))
        parts = [[batch.labels, *batch.views] for batch in batches]
        found.append([torch.cat(column) for column in zip(*parts, strict=True)])
    return [torch.stack(column, 1).flatten(0, 1) for column in zip(*found, strict=True)]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (4, 2), (1, 4)])
@pytest.mark.parametrize("step", [0, 7])
def test_global_batches_do_not_depend_on_the_world(
    world: int, accumulation: int, step: int
) -> None:
    ours = views_of(toy(), 3, world, step, accumulation=accumulation)
    assert all(torch.equal(a, b) for a, b in zip(ours, views_of(toy(), 3, 1, step), strict=True))


def test_one_repeat_is_bit_identical_to_none() -> None:
    plain = GlobalLoader(toy(), RECIPE, global_batch=16, seed=1, device=CPU)
    _, (batch,) = next(iter(plain.from_step(5, 6)))
    once = views_of(toy(), 1, 1, 5)
    assert torch.equal(once[0], batch.labels)
    assert all(torch.equal(a, b) for a, b in zip(once[1:], batch.views, strict=True))


@pytest.mark.parametrize("resident", [True, False])
def test_each_copy_has_an_augmentation_of_its_own(resident: bool) -> None:
    labels, *views = views_of(toy(), 4, 1, 0, resident=resident)
    assert labels.tolist() == [index for index in labels[::4].tolist() for _ in range(4)]
    for view in views:
        assert all(not torch.equal(view[i], view[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("resident", [True, False])
def test_each_copy_has_its_own_crop_and_its_own_colours(resident: bool) -> None:
    """Each kind of draw alone: the other would hide that one is repeated."""
    for view in ((Resize(12), ColorJitter(0.8, 0.8, 0.8, 0.2, p=1.0)), (RandomResizedCrop(12),)):
        loader = GlobalLoader(
            *(toy(), (view,)),
            **{
                "global_batch": 16,
                "seed": 1,
                "device": CPU,
                "repeated_aug": 4,
                "resident": resident,
            },
        )
        _, (batch,) = next(iter(loader.from_step(0, 1)))
        found = batch.views[0]
        assert all(not torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


def test_copies_are_the_same_with_workers_and_with_rand_augment(image_folder: Path) -> None:
    source = build_source("imagefolder", str(image_folder), "train")
    recipe = finetune_recipe(40, rand_augment="rand-m9-mstd0.5", erasing=0.5)
    loaders = [
        GlobalLoader(
            source, recipe, global_batch=6, seed=1, device=CPU, num_workers=n, repeated_aug=3
        )
        for n in (0, 2)
    ]
    batches = [[batch for _, (batch,) in loader.from_step(1, 4)] for loader in loaders]
    for first, second in zip(*batches, strict=True):
        assert torch.equal(first.views[0], second.views[0])
        assert len(set(first.indices.tolist())) == 2
        assert all(
            not torch.equal(first.views[0][i], first.views[0][j])
            for i in range(3)
            for j in range(i)
        )


def test_no_repeat_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"REPEATED_AUG 0 must be at least 1"):
        GlobalLoader(toy(), RECIPE, global_batch=16, seed=1, device=CPU, repeated_aug=0)
