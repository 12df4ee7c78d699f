"""docs/augmentation.md adds an operation: its code, word for word, runs through every path."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import data.augment.ops
import data.augment.recipes
from data.augment.base import BatchOp, Recipe, sample_keys
from data.augment.fused.opcodes import can_run
from data.augment.ops import HorizontalFlip, Solarize
from data.augment.pipeline import draw_photometric, photometric
from data.augment.preview import first_batch, save_preview
from data.augment.recipes import RECIPES, build_recipe, check_view
from data.loader import GlobalLoader
from data.sources.base import ArraySource

DOC = Path(__file__).resolve().parents[2] / "docs" / "augmentation.md"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Give the doc's recipe, made by the doc's code in the files that the doc names."""
    operation, named = re.findall(
        r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL
    )
    monkeypatch.setattr(data.augment.recipes, "RECIPES", dict(RECIPES))
    ops, recipes = dict(vars(data.augment.ops)), dict(vars(data.augment.recipes))
    exec(operation, ops)
    exec(named, recipes | {"Posterize": ops["Posterize"]})
    return build_recipe("posterized", 24)


@pytest.fixture
def source() -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return ArraySource("toy", images, torch.arange(12), [str(i) for i in range(12)])


def batch(source: ArraySource, recipe: Recipe, backend: str) -> list[Tensor]:
    loader = GlobalLoader(
        source, recipe, global_batch=12, seed=1, device=torch.device("cpu"), backend=backend
    )
    return next(loader.from_step(0, 1))[1][0].views


def test_a_pretraining_batch_and_the_preview_show_it(
    recipe: Recipe, source: ArraySource, tmp_path: Path
) -> None:
    views = batch(source, recipe, "torch")
    without = batch(source, tuple(view[:-1] for view in recipe), "torch")
    for view, plain in zip(views, without, strict=True):
        assert not torch.equal(view, plain)
        assert len(view[:, 0].unique()) <= 8 < len(plain[:, 0].unique())  # three bits
    save_preview(tmp_path / "views.png", source, recipe, seed=1)
    assert (tmp_path / "views.png").stat().st_size > 1000
    assert len(first_batch(source, recipe, 1).views[0][:, 0].unique()) <= 8


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_a_view_with_it_runs_by_torch(recipe: Recipe, source: ArraySource, backend: str) -> None:
    if backend == "fused":
        pytest.importorskip("numba", reason="the fused path needs numba")
    known, new = recipe[0][1:-1], recipe[0][1:]
    assert (can_run(known), can_run(new)) == (True, False)
    for ours, plain in zip(
        batch(source, recipe, backend), batch(source, recipe, "torch"), strict=True
    ):
        assert torch.equal(ours, plain)


def test_only_the_samples_that_drew_it_change(recipe: Recipe, source: ArraySource) -> None:
    view = (replace(recipe[0][-1], p=0.5),)
    draws = draw_photometric(view, sample_keys(0, 0, np.arange(12), 0))
    plain = photometric(source.images, (), {})
    changed = (photometric(source.images, view, draws) != plain).flatten(1).any(1)
    assert changed.tolist() == draws["posterize"].tolist()
    assert 0 < changed.sum() < 12


def test_a_stream_that_is_taken_is_refused(recipe: Recipe) -> None:
    class Copied(Solarize):
        streams = (1,)

    class Renamed(Solarize):
        name = "flip"

    for wrong, claim in ((Copied(), "1"), (Renamed(), "'flip'")):
        with pytest.raises(ValueError, match=f"HorizontalFlip both use the stream or name {claim}"):
            check_view((recipe[0][0], HorizontalFlip(), wrong))


def test_no_two_operations_share_a_stream_or_a_name() -> None:
    kinds = [
        k for k in vars(data.augment.ops).values() if isinstance(k, type) and issubclass(k, BatchOp)
    ]
    kinds.remove(BatchOp)
    streams = [stream for kind in kinds for stream in kind.streams]
    assert len(kinds) == len({kind.name for kind in kinds}) == 6
    assert len(streams) == len(set(streams))
