"""Everything that makes tensors out of files; here, the loaders that a configuration describes."""

from collections.abc import Iterator

import torch
from yacs.config import CfgNode

from data.augment.base import Recipe
from data.augment.recipes import add_local_views, build_recipe
from data.loader import GlobalLoader, evaluation_batches
from data.sources.base import Source
from utils.batch import Batch


def build_views(cfg: CfgNode) -> Recipe:
    """Return the views of pretraining: two global ones, then the local ones of `LOCAL_CROPS`."""
    size = cfg.AUG.VIEW_SIZE or cfg.DATA.IMG_SIZE
    recipe = build_recipe(cfg.AUG.RECIPE, size, cfg.AUG.CROP_MIN or None)
    local = cfg.AUG.LOCAL_CROPS
    return add_local_views(recipe, local.NUMBER, local.SIZE, tuple(local.SCALE))


def build_loader(
    cfg: CfgNode,
    source: Source,
    recipe: Recipe,
    device: torch.device,
    *,
    global_batch: int,
    accumulation: int = 1,
    max_bad_fraction: float | None = None,
    drop_last: bool = True,
    repeated_aug: int = 1,
    decode: str = "worker",
    size_key: str = "TRAIN.BATCH_SIZE",
) -> GlobalLoader:
    """Return the endless batches of a run, see `GlobalLoader`.

    `max_bad_fraction` replaces DATA.MAX_BAD_FRACTION, `size_key` names the batch size in messages.
    """
    if max_bad_fraction is None:
        max_bad_fraction = cfg.DATA.MAX_BAD_FRACTION
    return GlobalLoader(
        source,
        recipe,
        seed=cfg.SEED,
        device=device,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        backend=cfg.AUG.BACKEND,
        global_batch=global_batch,
        accumulation=accumulation,
        max_bad_fraction=max_bad_fraction,
        drop_last=drop_last,
        repeated_aug=repeated_aug,
        decode=decode,
        size_key=size_key,
    )


def evaluation_loader(
    cfg: CfgNode,
    source: Source,
    device: torch.device,
    batch_size: int,
    skip_unreadable: bool = False,
) -> Iterator[Batch]:
    """Yield this process's images in order, without augmentation, see `evaluation_batches`."""
    return evaluation_batches(
        source,
        cfg.DATA.IMG_SIZE,
        batch_size=batch_size,
        device=device,
        num_workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        skip_unreadable=skip_unreadable,
    )
