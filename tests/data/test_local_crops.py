"""Local views of multi-crop: what they are, that their draws are keyed, and how they are shown."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data import build_views
from data.augment.base import Recipe, sample_keys, view_size
from data.augment.crops import CropDraws, RandomResizedCrop, crop_one
from data.augment.ops import GaussianBlur
from data.augment.preview import save_preview, view_names
from data.augment.recipes import add_local_views, build_recipe
from data.loader import GlobalLoader
from data.sampler import Request
from data.sources import ArraySource
from data.sources.folder import imagefolder
from data.worker import Fetcher
from models import framework_options
from utils.config.load import load_config
from utils.config.schema import declare

CPU = torch.device("cpu")
GLOBAL = build_recipe("byol", 32)
RECIPE = add_local_views(GLOBAL, 3, 16, (0.05, 0.25))


def source(count: int = 24) -> ArraySource:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=generator)
    return ArraySource("toy", images, torch.arange(count), [str(i) for i in range(count)])


def batch(recipe: Recipe, step: int = 1, **options: object) -> list[Tensor]:
    settings = {"global_batch": 8, "seed": 1, "device": CPU, "rank": 0, "world": 1} | options
    loader = GlobalLoader(settings.pop("source", None) or source(), recipe, **settings)
    _, parts = next(iter(loader.from_step(step, step + 1)))
    return [torch.cat(views) for views in zip(*(part.views for part in parts), strict=True)]


def test_they_follow_the_global_views_and_differ_in_size_scale_and_blur() -> None:
    assert RECIPE[:2] == GLOBAL
    assert [view_size(view) for view in RECIPE] == [32, 32, 16, 16, 16]
    for crop, *rest in RECIPE[2:]:
        assert (crop.scale, crop.ratio) == ((0.05, 0.25), GLOBAL[0][0].ratio)
        # DINO's; the first view of BYOL is always blurred
        assert next(op for op in rest if isinstance(op, GaussianBlur)).p == 0.5
        first = [op for op in GLOBAL[0][1:] if not isinstance(op, GaussianBlur)]
        assert [op for op in rest if not isinstance(op, GaussianBlur)] == first
    assert add_local_views(GLOBAL, 0, 16, (0.05, 0.25)) == GLOBAL


def test_the_configuration_gives_them() -> None:
    opts = "DATA.IMG_SIZE 32 AUG.RECIPE byol AUG.CROP_MIN 0.25 AUG.LOCAL_CROPS.NUMBER 3"
    opts += " AUG.LOCAL_CROPS.SIZE 16 AUG.LOCAL_CROPS.SCALE [0.05,0.25]"
    cfg = load_config(declare(framework_options()), [], opts.split())
    assert build_views(cfg)[2:] == RECIPE[2:]
    assert [view[0].scale for view in build_views(cfg)[:2]] == [(0.25, 1.0)] * 2


@pytest.mark.parametrize(
    ("recipe", "size", "scale", "message"),
    [
        ("eval", 16, (0.05, 0.25), "LOCAL_CROPS.NUMBER 2: .*set it to 0"),
        (
            "byol",
            48,
            (0.05, 0.25),
            "LOCAL_CROPS.SIZE 48 must be between 1 and the other views' size, 32",
        ),
        ("byol", 16, (0.4, 0.05), r"LOCAL_CROPS.SCALE \[0.4, 0.05\] must rise"),
    ],
)
def test_what_cannot_be_made_is_refused(
    recipe: str, size: int, scale: tuple[float, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        add_local_views(build_recipe(recipe, 32), 2, size, scale)


@pytest.mark.parametrize("resident", [True, False])
def test_global_views_do_not_change_by_a_bit(resident: bool) -> None:
    with_local, without = (batch(recipe, resident=resident) for recipe in (RECIPE, GLOBAL))
    assert all(map(torch.equal, with_local, without))
    # no two local views share their draws
    assert not torch.equal(with_local[2], with_local[3])


def test_each_sample_gets_its_crops_whatever_the_path(image_folder: Path) -> None:
    """The worker, the array on the device, decoding on the device, more processes: one draw."""
    plain = batch(RECIPE, backend="torch", resident=False)
    level = 2.01 / 255 / 0.224  # noise: rounded twice, columns and rows
    for name, other in {
        "micro-batches": batch(RECIPE, backend="torch", resident=False, accumulation=2),
        "later start": batch(RECIPE, backend="torch", resident=False, num_workers=1),
    }.items():
        assert all(map(torch.equal, plain, other)), name
    crops_only = tuple((view[0],) for view in RECIPE)
    resident, worker = (batch(crops_only, resident=here) for here in (True, False))
    for first, second in zip(resident, worker, strict=True):
        assert (first - second).abs().max() <= level
    pytest.importorskip("simplejpeg")
    files = imagefolder(str(image_folder), "train")
    decoded = [
        batch(crops_only, source=files, global_batch=4, decode=where)
        for where in ("worker", "device")
    ]
    for first, second in zip(*decoded, strict=True):
        assert (first - second).abs().max() <= level


def test_fused_kernels_and_torch_agree_on_local_views() -> None:
    pytest.importorskip("numba")
    fused, plain = (batch(RECIPE, backend=backend) for backend in ("fused", "torch"))
    for first, second in zip(fused[2:], plain[2:], strict=True):
        assert (first - second).abs().max() < 1e-3


def test_a_crop_is_a_function_of_seed_epoch_sample_and_view() -> None:
    images, chosen = source(), np.array([3, 0, 5])
    views = Fetcher(images, RECIPE, seed=9)[Request(0, 2, chosen)]["views"]
    for number in (2, 3, 4):
        op = RECIPE[number][0]
        assert isinstance(op, RandomResizedCrop)
        draws = CropDraws(op, sample_keys(9, 2, chosen, number))
        for place, index in enumerate(chosen):
            expected = crop_one(images.load(int(index)), (op,), draws.box(place, 40, 40))
            assert torch.equal(views[number][place], expected)


def test_the_preview_shows_them_in_a_white_border(tmp_path: Path) -> None:
    save_preview(tmp_path / "views.png", source(), RECIPE, seed=1, num_images=2)
    assert view_names(RECIPE) == ["query", "key", "local 1", "local 2", "local 3"]
    page = np.asarray(Image.open(tmp_path / "views.png").convert("RGB"))
    zoom = 96 // 32
    tile = 34 * zoom
    assert page.shape[1] == 6 * tile
    grid = page[len(page) - 2 * tile :]
    for column in range(6):
        picture = grid[zoom : tile - zoom, column * tile + zoom : (column + 1) * tile - zoom]
        white = (picture == 255).all(axis=2)
        border = 8 * zoom if column >= 3 else 0
        outside = np.ones_like(white)
        outside[border : len(white) - border, border : len(white) - border] = False
        assert white[outside].all()
        assert white[~outside].mean() < 0.9
