"""Build what a configuration describes: the method that `MODEL.NAME` selects, or a backbone."""

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from yacs.config import CfgNode

from models.batchformer import BatchFormerMoCoV3
from models.byol import BYOL
from models.moby import MoBY
from models.moco import MoCoV2
from models.mocov3 import MoCoV3
from models.parts.backbones import Backbone, build_backbone
from models.parts.batchformer import BatchFormer
from models.parts.momentum import MomentumFramework
from models.parts.norm import convert_sync_batch_norm
from models.parts.resolution import evaluate_as_trained
from models.sit import SiT
from models.synco import SynCo
from models.synco_v2 import SynCoV2
from models.weights.load import check_norm_eps, load_network
from utils.checkpoints.foreign import read_torch
from utils.config.key import Key
from utils.config.methods import options_of
from utils.config.sections import method_section, section_options
from utils.distributed import world_size

logger = logging.getLogger("synco")

FRAMEWORKS: dict[str, type[MomentumFramework]] = {
    "moco_v2": MoCoV2,
    "synco": SynCo,
    "byol": BYOL,
    "moby": MoBY,
    "synco_v2": SynCoV2,
    "mocov3": MoCoV3,
    "batchformer": BatchFormerMoCoV3,
    "sit": SiT,
}


def framework_options() -> dict[str, dict[str, Key]]:
    """Return the declared options of each method, those that were registered later too."""
    return options_of({name: (inspect.getfile(c), c.__name__) for name, c in FRAMEWORKS.items()})


def build_framework(cfg: CfgNode) -> MomentumFramework:
    """Build the method and the networks that a configuration describes."""
    return assemble_framework(
        cfg.MODEL.NAME,
        section_options(cfg.MODEL[method_section(cfg.MODEL.NAME)]),
        section_options(cfg.MODEL.BACKBONE),
        batchformer=section_options(cfg.MODEL.BATCHFORMER),
        img_size=cfg.DATA.IMG_SIZE,
        channels=cfg.DATA.CHANNELS,
        use_checkpoint=cfg.TRAIN.USE_CHECKPOINT,
        stack_views=cfg.MODEL.STACK_VIEWS,
        view_size=cfg.AUG.VIEW_SIZE,
        local_size=cfg.AUG.LOCAL_CROPS.SIZE if cfg.AUG.LOCAL_CROPS.NUMBER else 0,
    )


def assemble_framework(
    name: str,
    options: Mapping[str, Any],
    backbone: Mapping[str, Any],
    *,
    batchformer: Mapping[str, Any] | None = None,
    img_size: int = 224,
    channels: int = 3,
    use_checkpoint: bool = False,
    stack_views: bool = False,
    view_size: int = 0,
    local_size: int = 0,
) -> MomentumFramework:
    """Build the method `name` with its `options` over two of `build_backbone(**backbone)`.

    `backbone` may also hold `target_drop_path`, the target's own drop-path rate (default 0);
    `batchformer` holds `enabled` and the options of `BatchFormer`. `view_size` is that of the
    views, 0 for `img_size`; `local_size` that of local views, 0 without any. On several processes
    batch norms are synchronised where the method asks for it. Raises `ValueError` for a name that
    is not in `FRAMEWORKS`.
    """
    if name not in FRAMEWORKS:
        raise ValueError(f"MODEL.NAME: {name!r} is not one of {', '.join(FRAMEWORKS)}")
    if channels != 3 and issubclass(FRAMEWORKS[name], SiT):
        raise ValueError(
            f"DATA.CHANNELS {channels}: {name} reconstructs RGB pixels; use another MODEL.NAME"
        )
    shared = {**backbone, "img_size": img_size, "channels": channels}
    target_drop_path = shared.pop("target_drop_path", 0.0)
    online = build_backbone(**shared, use_checkpoint=use_checkpoint)
    shared["drop_path"] = target_drop_path
    # No `use_checkpoint`: the target has no backward, so it holds no activations.
    target = build_backbone(**shared)
    # The keywords differ from method to method, so mypy cannot check this call.
    framework = cast(Any, FRAMEWORKS[name])(online, target, **options)
    module = dict(batchformer or {})
    if module.pop("enabled", False) or framework.needs_batchformer:
        framework.attach_batchformer(BatchFormer(online.num_features, **module))
    if stack_views:
        framework.stack_views()
    if view_size or local_size:
        framework.take_view_sizes(img_size, view_size, local_size, channels)
    # Last, so that the batch norms of the heads are converted too.
    if world_size() > 1 and framework.sync_batch_norm:
        convert_sync_batch_norm(framework)
    return framework


def online_backbone(cfg: CfgNode, **changes: Any) -> Backbone:
    """Build the online network's backbone of a configuration; `changes` replace its options."""
    images = {"img_size": cfg.DATA.IMG_SIZE, "channels": cfg.DATA.CHANNELS}
    options = section_options(cfg.MODEL.BACKBONE) | images | changes
    options.pop("target_drop_path", None)  # of the target network, which is not built here
    backbone = build_backbone(**options)
    if cfg.AUG.VIEW_SIZE or cfg.AUG.LOCAL_CROPS.NUMBER:
        evaluate_as_trained(backbone)
    return backbone


def pretrained_backbone(
    cfg: CfgNode, weights: Path | None, which: str = "", **changes: Any
) -> tuple[Backbone, str]:
    """Build the backbone on a file of weights (`None`: random ones); say which network it took.

    `which` asks for a network of a file of several, see `find_network`. Raises `ValueError` if the
    file lacks a part of the backbone.
    """
    backbone = online_backbone(cfg, **changes)
    if weights is None:
        return backbone, "online"
    checkpoint = read_torch(weights)
    check_norm_eps(checkpoint, cfg.MODEL.BACKBONE.NORM_EPS, str(weights))
    report = load_network(backbone, checkpoint, str(weights), which)
    logger.info(report)
    return backbone, report.network.taken
