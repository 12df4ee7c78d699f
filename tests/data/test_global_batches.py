"""Global batches: the same whatever the world size, the workers, the accumulation and the start step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.augment.recipes import build_recipe
from data.loader import Batch, GlobalLoader, evaluation_batches
from data.sampler import BatchPlan, epoch_order
from data.sources import ArraySource, Source, build_source

CPU = torch.device("cpu")
RECIPE = build_recipe("byol", 16)


def array_source(count: int = 50) -> ArraySource:
    """Return `count` random 12x12 images, labelled with their index."""
    images = torch.randint(
        0, 256, (count, 3, 12, 12), dtype=torch.uint8, generator=torch.manual_seed(3)
    )
    return ArraySource("toy", images, torch.arange(count), [str(i) for i in range(count)])


def global_step(
    source: Source, step: int, world: int, **options: object
) -> tuple[list[Tensor], Tensor]:
    """Return the views and labels of one step in global order, put together from all ranks."""
    settings = {"global_batch": 16, "seed": 1, "device": CPU} | options
    views: list[list[Tensor]] = []
    labels = []
    for rank in range(world):
        loader = GlobalLoader(source, RECIPE, rank=rank, world=world, **settings)
        (found, micro_batches), *_ = loader.from_step(step, step + 1)
        assert found == step
        views.append([torch.cat([batch.views[v] for batch in micro_batches]) for v in range(2)])
        labels.append(torch.cat([batch.labels for batch in micro_batches]))
    # position p lies on rank p % W: stack along a new second axis and flatten
    return [torch.stack([v[i] for v in views], 1).flatten(0, 1) for i in range(2)], torch.stack(
        labels, 1
    ).flatten()


def assert_same(first: tuple[list[Tensor], Tensor], second: tuple[list[Tensor], Tensor]) -> None:
    """Assert bit-identical views and labels."""
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


@pytest.mark.parametrize(
    ("world", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 4)]
)
@pytest.mark.parametrize("step", [0, 7])
def test_global_batches_do_not_depend_on_the_world_size(
    world: int, accumulation: int, step: int
) -> None:
    source = array_source()
    assert_same(
        global_step(source, step, world, accumulation=accumulation), global_step(source, step, 1)
    )


@pytest.mark.parametrize("kind", ["array", "files"])
def test_global_batches_do_not_depend_on_workers(kind: str, image_folder: Path) -> None:
    source = (
        array_source()
        if kind == "array"
        else build_source("imagefolder", str(image_folder), "train")
    )
    options = {"global_batch": 4, "resident": False}
    runs = [
        list(
            GlobalLoader(source, RECIPE, seed=1, device=CPU, num_workers=n, **options).from_step(
                2, 8
            )
        )
        for n in (0, 2)
    ]
    for (step, (first,)), (other_step, (second,)) in zip(*runs, strict=True):
        assert step == other_step
        assert_same((first.views, first.labels), (second.views, second.labels))


def test_starting_later_gives_the_same_steps() -> None:
    loader = GlobalLoader(array_source(), RECIPE, global_batch=16, seed=1, device=CPU)
    whole = dict(loader.from_step(0, 8))
    for step, (batch,) in loader.from_step(5, 8):
        assert_same((batch.views, batch.labels), (whole[step][0].views, whole[step][0].labels))


def test_resident_crops_are_within_a_level_of_the_workers_crops() -> None:
    source, recipe = array_source(), build_recipe("linear", 16)
    kinds = [
        GlobalLoader(source, recipe, global_batch=48, seed=1, device=CPU, resident=r)
        for r in (True, False)
    ]
    first, second = (next(iter(loader.from_step(3, 4)))[1][0] for loader in kinds)  # in epoch 3
    assert torch.equal(first.indices, second.indices)
    assert (first.views[0] - second.views[0]).abs().max() <= 1.01 / 255 / 0.224


def test_an_epoch_visits_every_sample_once_and_epochs_differ() -> None:
    loader = GlobalLoader(array_source(48), RECIPE, global_batch=16, seed=1, device=CPU)
    seen = [batch.indices for _, (batch,) in loader.from_step(0, 6)]
    first, second = torch.cat(seen[:3]), torch.cat(seen[3:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(48))
    assert first.tolist() != second.tolist()
    assert not np.array_equal(epoch_order(48, 1, 0), epoch_order(48, 2, 0))


def test_batches_hold_the_labels_of_their_indices_and_normalised_views() -> None:
    source = array_source()
    loader = GlobalLoader(source, RECIPE, global_batch=16, seed=1, device=CPU, accumulation=2)
    _, batches = next(iter(loader.from_step(0, 1)))
    assert [len(batch.indices) for batch in batches] == [8, 8]
    for batch in batches:
        assert torch.equal(batch.labels, source.labels[batch.indices])
        assert [(view.shape, view.dtype) for view in batch.views] == [
            ((8, 3, 16, 16), torch.float32)
        ] * 2
        assert all(-2.2 < view.min() < view.max() < 2.7 for view in batch.views)


def test_the_same_sample_looks_different_in_each_view_and_epoch() -> None:
    source = ArraySource("toy", array_source(1).images, torch.zeros(1, dtype=torch.int64), ["0"])
    loader = GlobalLoader(source, build_recipe("simclr", 16), global_batch=1, seed=1, device=CPU)
    views = [view for _, (batch,) in loader.from_step(0, 3) for view in batch.views]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_keeping_the_last_batch_fills_it_up_from_the_start_of_the_epoch() -> None:
    loader = GlobalLoader(
        array_source(), RECIPE, global_batch=16, seed=1, device=CPU, drop_last=False
    )
    assert loader.steps_per_epoch == 4
    assert (
        GlobalLoader(array_source(), RECIPE, global_batch=16, seed=1, device=CPU).steps_per_epoch
        == 3
    )
    seen = torch.cat([batch.indices for _, (batch,) in loader.from_step(0, 4)])
    assert sorted(seen[:50].tolist()) == list(range(50))
    assert torch.equal(seen[50:], seen[:14])


def test_epoch_order_is_pinned() -> None:
    """Change these numbers only on purpose: every stored result of a run depends on them."""
    assert epoch_order(8, 0, 0).tolist() == [1, 4, 7, 2, 0, 3, 5, 6]


@pytest.mark.parametrize(
    ("count", "batch", "world", "accumulation", "message"),
    [
        (50, 10, 4, 1, "global batch 10 .* cannot be divided over 4 processes .* use 8 or 12"),
        (50, 8, 2, 3, "TRAIN.BATCH_SIZE .* 2 processes and 3 accumulation steps: use 6 or 12"),
        (50, 2, 4, 1, "use 4"),
        (
            50,
            64,
            2,
            2,
            r"50 images, fewer than one global batch .* 16 x 2 x 2\): set TRAIN.BATCH_SIZE to at most 12",
        ),
        (3, 8, 8, 1, "1 x 1 x 8.: use fewer of the latter two"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_sizes_that_do(
    count: int, batch: int, world: int, accumulation: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(count, batch, seed=0, world=world, accumulation=accumulation)


def test_a_message_names_the_key_that_the_program_reads() -> None:
    with pytest.raises(
        ValueError, match=r"LINEAR.BATCH_SIZE \(--batch-size\).*set LINEAR.BATCH_SIZE to"
    ):
        GlobalLoader(
            array_source(),
            RECIPE,
            global_batch=64,
            seed=0,
            device=CPU,
            size_key="LINEAR.BATCH_SIZE",
        )


def test_resident_files_are_refused(image_folder: Path) -> None:
    source = build_source("imagefolder", str(image_folder), "train")
    with pytest.raises(ValueError, match="resident"):
        GlobalLoader(source, RECIPE, global_batch=4, seed=1, device=CPU, resident=True)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_visits_every_image_once_in_order(world: int) -> None:
    source = array_source()
    ranks = [
        list(evaluation_batches(source, 12, batch_size=8, device=CPU, rank=rank, world=world))
        for rank in range(world)
    ]
    for rank, batches in enumerate(ranks):
        indices = torch.cat([batch.indices for batch in batches])
        assert indices.tolist() == list(range(rank, 50, world))
        assert torch.equal(torch.cat([batch.labels for batch in batches]), source.labels[indices])
    batch: Batch = ranks[0][0]
    levels = (batch.views[0] * torch.tensor([0.229, 0.224, 0.225])[:, None, None]) + torch.tensor(
        [0.485, 0.456, 0.406]
    )[:, None, None]
    torch.testing.assert_close(
        levels * 255, source.images[batch.indices].float(), rtol=0, atol=1e-3
    )


def test_evaluation_of_files_is_the_same_with_workers(image_folder: Path) -> None:
    source = build_source("imagefolder", str(image_folder), "val")
    one, two = (
        list(evaluation_batches(source, 128, batch_size=2, device=CPU, num_workers=n))
        for n in (0, 2)
    )
    assert [len(batch.indices) for batch in one] == [2, 2, 1]
    for first, second in zip(one, two, strict=True):
        assert_same((first.views, first.labels), (second.views, second.labels))


def test_random_recipes_are_refused_in_evaluation() -> None:
    with pytest.raises(ValueError, match="'linear' is random"):
        evaluation_batches(array_source(), 12, batch_size=8, device=CPU, recipe="linear")
