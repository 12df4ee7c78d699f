"""SynCo on MoCo v2: synthetic hard negatives (Giakoumoglou and Stathaki 2024, arXiv:2410.02401)."""

from typing import Any

from models.moco import MoCoV2
from models.parts.backbones import Backbone
from models.parts.negatives import SyntheticConfig, refuse_short_queue
from utils.config.key import Count, SixCounts
from utils.schedules import Progress


class SynCo(MoCoV2):
    """MoCo v2 with synthetic negatives beside the queue, from epoch `warmup_epochs` on.

    `sigma` is 0.01 in the published code. It was 0.1 until August 2024, so the published runs most
    likely had 0.1. `legacy_gradients` makes types 5 and 6 as the code did before October 2024, so
    most likely in the published runs.
    """

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        num_hard: Count = 1024,
        num_synthetic: SixCounts = (256, 256, 256, 64, 64, 64),
        sigma: float = 0.01,
        delta: float = 0.01,
        eta: float = 0.01,
        warmup_epochs: int = 10,
        legacy_gradients: bool = False,
        **moco: Any,
    ) -> None:
        super().__init__(backbone, target_backbone, **moco)
        refuse_short_queue(num_hard, self.queue.keys)
        self.synthetic_config = SyntheticConfig(
            num_hard, tuple(num_synthetic), sigma, delta, eta, legacy_gradients
        )
        self.warmup_epochs = warmup_epochs

    def synthetics(self, progress: Progress) -> SyntheticConfig | None:
        """Return the configured synthetics once the warm-up is over."""
        return self.synthetic_config if progress.epoch >= self.warmup_epochs else None

    def left_out(self, last: Progress) -> str:
        """Say whether a run ends before synthetic negatives begin."""
        if self.synthetics(last):
            return ""
        return (
            f"MODEL.SYNCO.WARMUP_EPOCHS {self.warmup_epochs}: the run ends before synthetic "
            "negatives begin, so it trains MoCo v2"
        )
