"""The methods, by the name that ``MODEL.NAME`` selects."""

import inspect
from collections.abc import Mapping
from typing import Any

from models.byol import BYOL
from models.moby import MoBY
from models.moco import MoCoV2
from models.parts.backbones import build_backbone
from models.parts.momentum import MomentumFramework
from models.parts.norm import convert_sync_batch_norm
from models.synco import SynCo
from models.synco_v2 import SynCoV2
from utils.distributed import world_size

FRAMEWORKS: dict[str, type[MomentumFramework]] = {
    "moco_v2": MoCoV2,
    "synco": SynCo,
    "byol": BYOL,
    "moby": MoBY,
    "synco_v2": SynCoV2,
}


def framework_defaults() -> dict[str, dict[str, Any]]:
    """Return each method's options and defaults, read from its signature: ``MODEL.<METHOD>`` is declared once."""
    return {name: _options(framework) for name, framework in FRAMEWORKS.items()}


def _options(framework: type) -> dict[str, Any]:
    """Read the keyword-only parameters; ``**rest`` stands for those of the base class."""
    parameters = inspect.signature(framework.__init__).parameters.values()
    inherits = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    options = _options(framework.__mro__[1]) if inherits else {}
    own = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {**options, **own}


def build_framework(
    name: str,
    options: Mapping[str, Any],
    backbone: Mapping[str, Any],
    *,
    img_size: int = 224,
    target_drop_path: float = 0.0,
    use_checkpoint: bool = False,
) -> MomentumFramework:
    """Build the method ``name`` with its ``options`` over ``build_backbone(**backbone)``.

    On several processes batch norms are synchronised where the method asks for it. Raises ``ValueError`` for a name
    that is not in ``FRAMEWORKS``.
    """
    if name not in FRAMEWORKS:
        raise ValueError(f"MODEL.NAME: {name!r} is not one of {', '.join(FRAMEWORKS)}")
    online = build_backbone(**backbone, img_size=img_size, use_checkpoint=use_checkpoint)
    target = build_backbone(**{**backbone, "drop_path": target_drop_path}, img_size=img_size)
    framework = FRAMEWORKS[name](online, target, **options)
    if world_size() > 1 and getattr(framework, "sync_batch_norm", False):
        convert_sync_batch_norm(framework)
    return framework
