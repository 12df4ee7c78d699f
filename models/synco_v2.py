"""SynCo-v2: synthetic hard negatives on MoBY, in both directions, for transformers."""

from typing import Any

from models.moby import MoBY
from models.parts.backbones import Backbone
from models.parts.negatives import SyntheticConfig, refuse_short_queue
from utils.config.key import Count, SixCounts
from utils.schedules import Progress


class SynCoV2(MoBY):
    """MoBY with synthetic negatives in epochs `warmup_epochs` to `cooldown_epochs`.

    Both ends are included. `legacy_window` 4 repeats the published runs on 4 processes: their code
    forgot the number of processes when it counted epochs, so the window opened at epoch 120 of 300
    and never closed. The published yaml files say 128 synthetics for all six types, but their code
    did not read these keys. The default of `num_synthetic` is what the published runs used.
    """

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        num_hard: Count = 256,
        num_synthetic: SixCounts = (128, 128, 128, 64, 64, 64),
        sigma: float = 0.1,
        delta: float = 0.01,
        eta: float = 0.01,
        warmup_epochs: int = 30,
        cooldown_epochs: int = 100,
        legacy_window: int = 0,
        legacy_gradients: bool = False,
        **moby: Any,
    ) -> None:
        super().__init__(backbone, target_backbone, **moby)
        refuse_short_queue(num_hard, self.queue1.keys)
        self.synthetic_config = SyntheticConfig(
            num_hard, tuple(num_synthetic), sigma, delta, eta, legacy_gradients
        )
        self.warmup_epochs = warmup_epochs
        self.cooldown_epochs = cooldown_epochs
        self.legacy_window = legacy_window

    def synthetics(self, progress: Progress) -> SyntheticConfig | None:
        """Return the configured synthetics inside the window."""
        is_open = self.warmup_epochs <= self._epoch(progress) <= self.cooldown_epochs
        return self.synthetic_config if is_open else None

    def left_out(self, last: Progress) -> str:
        """Say whether a run ends before synthetic negatives begin."""
        if self._epoch(last) >= self.warmup_epochs:
            return ""
        return (
            f"MODEL.SYNCO_V2.WARMUP_EPOCHS {self.warmup_epochs}: the run ends before synthetic "
            "negatives begin, so it trains MoBY"
        )

    def _epoch(self, progress: Progress) -> int:
        if self.legacy_window:
            return (progress.step + 1) // (progress.steps_per_epoch * self.legacy_window)
        return progress.epoch
