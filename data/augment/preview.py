"""Pictures of what the network sees: grids of views or of any normalised images."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.augment.base import Recipe
from data.loader import GlobalLoader, evaluation_batches
from data.pixels import PLAIN, Pixels
from data.sources.base import Source, subset
from utils.batch import Batch

logger = logging.getLogger("synco")

_SIDE = 96  # small images are enlarged to at least this many pixels


def save_preview(
    path: Path, source: Source, recipe: Recipe, seed: int, num_images: int = 8
) -> None:
    """Write the first images beside their views as a grid: a row an image, a column a view."""
    batch = first_batch(source, recipe, seed, num_images)
    warn_of_identical_views(batch.views)
    count, size = len(batch.indices), batch.views[0].shape[-1]
    shown, host = subset(source, batch.indices), torch.device("cpu")
    # rank 0 of 1, as for the views: an evaluation would give each process a part of the images
    originals = next(
        evaluation_batches(shown, size, batch_size=count, device=host, rank=0, world=1)
    )
    columns = [originals.views[0], *(_centred(view, size) for view in batch.views)]
    save_grid(path, torch.stack(columns, 1), ["original", *view_names(recipe)], source.pixels)


def view_names(recipe: Recipe) -> list[str]:
    """Return how pictures call the views of a recipe: two global ones, then local ones."""
    local = [f"local {number}" for number in range(1, len(recipe) - 1)]
    return ["query", "key", *local][: len(recipe)]


def _centred(view: Tensor, size: int) -> Tensor:
    """Return a view (N,3,s,s) inside a white border, (N,3,size,size)."""
    before = (size - view.shape[-1]) // 2
    after = size - view.shape[-1] - before
    # above all levels: `save_grid` clamps it to white
    return torch.nn.functional.pad(view, (before, after, before, after), value=math.inf)


def warn_of_identical_views(views: Sequence[Tensor]) -> None:
    """Warn if all views (N,3,S,S) of every image are the same: then a method learns nothing."""
    # The embeddings of such a run do not collapse, so nothing else would tell.
    if len(views) > 1 and all(torch.equal(view, views[0]) for view in views[1:]):
        logger.warning(
            "the two views of an image are identical: the augmentation does nothing, and the "
            "method has nothing to learn; look at views.png and AUG.RECIPE"
        )


def first_batch(source: Source, recipe: Recipe, seed: int, num_images: int = 8) -> Batch:
    """Return a run's first images, their views (N,3,S,S) on the host, the same on every rank."""
    num_images = min(num_images, len(source))
    host = torch.device("cpu")
    loader = GlobalLoader(
        source, recipe, global_batch=num_images, seed=seed, device=host, rank=0, world=1
    )
    # rank 0 of 1: every process shows the same images
    _, (batch,) = next(iter(loader.from_step(0, 1)))
    return batch


def save_grid(
    path: Path, rows: Tensor, titles: Sequence[str] | None = None, pixels: Pixels = PLAIN
) -> None:
    """Write normalised images (N,V,C,S,S) as a grid of N rows with `titles` (V) above.

    Of more than three channels the first three are shown, of two the first.

    Raises ValueError if there are not as many titles as columns.
    """
    if titles is not None and len(titles) != rows.shape[1]:
        raise ValueError(f"save_grid: {len(titles)} titles for {rows.shape[1]} columns")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (pixels.mean, pixels.std))
    levels = rows.detach().float().cpu() * std + mean
    levels = (
        levels[:, :, :3] if pixels.channels >= 3 else levels[:, :, :1].expand(-1, -1, 3, -1, -1)
    )
    # a white line around each picture
    framed = torch.nn.functional.pad(levels, (1, 1, 1, 1), value=1.0)
    # (N, H, V, W, 3): a row an image, its views side by side
    grid = framed.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    image = Image.fromarray((grid.clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    zoom = max(1, _SIDE // rows.shape[-1])
    image = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    (image if titles is None else _titled(image, titles)).save(path)


def _titled(image: Image.Image, titles: Sequence[str]) -> Image.Image:
    """Return the grid below a white band with each title over its column."""
    font = ImageFont.load_default()
    column = image.width / len(titles)
    fitting = [_cut(title, font, column - 4) for title in titles]
    top = max(int(font.getbbox(title)[3]) for title in [*fitting, "Ag"]) + 6
    page = Image.new("RGB", (image.width, image.height + top), "white")
    page.paste(image, (0, top))
    draw = ImageDraw.Draw(page)
    for number, title in enumerate(fitting):
        left = number * column + (column - font.getlength(title)) / 2
        draw.text((left, 3), title, fill="black", font=font)
    return page


def _cut(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    while title and font.getlength(title) > width:
        title = title[:-1]
    return title
