"""A picture of what a recipe does to images."""

from pathlib import Path

import torch
from PIL import Image

from data.loader import GlobalLoader
from data.source import Source
from data.views import IMAGENET_MEAN, IMAGENET_STD, Recipe


def save_preview(path: Path, source: Source, recipe: Recipe, seed: int, num_images: int = 8) -> None:
    """Write a grid, one row an image of the first batch, one column a view, as the network sees them."""
    num_images = min(num_images, len(source))
    loader = GlobalLoader(
        source, recipe, global_batch=num_images, seed=seed, device=torch.device("cpu"), rank=0, world=1
    )
    _, (batch,) = next(iter(loader.from_step(0, 1)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    rows = torch.stack(batch.views, dim=1) * std + mean  # (N, V, 3, S, S) in [0, 1]
    grid = (
        torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
        .permute(0, 3, 1, 4, 2)
        .flatten(0, 1)
        .flatten(1, 2)
    )
    pixels = (grid.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    zoom = max(1, 96 // rows.shape[-1])
    image = Image.fromarray(pixels)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
