"""MoCo v3 (Chen, Xie and He 2021, arXiv:2104.02057)."""

import torch
from torch import Tensor

from models.parts.backbones import Backbone
from models.parts.heads import Encoder, mlp
from models.parts.losses import batch_contrast, contrast_metrics, sum_over_views
from models.parts.momentum import MomentumFramework
from utils.config.key import Count, Fraction, Rise, Temperature
from utils.schedules import Progress, momentum_at


class MoCoV3(MomentumFramework):
    """Contrast each view's prediction with the other view's keys of the global batch.

    Published for ResNets: 2 projector layers and no batch norm at the end of the predictor. For
    transformers: 3 layers and a batch norm without affine parameters (`proj_num_layers` 3,
    `pred_last_batch_norm` True).
    """

    sync_batch_norm = True
    can_take_local_views = can_stack_views = True
    sums_batchformer_pairs = True

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        hidden_dim: Count = 4096,
        out_dim: Count = 256,
        proj_num_layers: int = 2,
        pred_num_layers: int = 2,
        pred_last_batch_norm: bool = False,
        temperature: Temperature = 1.0,
        base_momentum: Fraction = 0.99,
        momentum_schedule: Rise = "cosine",
    ) -> None:
        width = backbone.num_features
        projector = mlp(
            # no biases: the batch norm behind each layer would subtract them again
            width,
            hidden_dim,
            out_dim,
            proj_num_layers,
            bias=False,
            last_batch_norm=True,
        )
        super().__init__(Encoder(backbone, projector), target_backbone)
        self.predictor = mlp(
            out_dim,
            hidden_dim,
            out_dim,
            pred_num_layers,
            bias=False,
            last_batch_norm=pred_last_batch_norm,
        )
        self.temperature = temperature
        self.base_momentum = base_momentum
        self.momentum_schedule = momentum_schedule

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Sum the contrasts of both directions, under BatchFormer over all pairs of streams."""
        queries = [self.predictor(rows) for rows in self.online.each(views)]
        # not of unit length yet: `batch_contrast` does that
        with torch.no_grad():
            keys = self.target.each(views[:2])
        num = len(views[0])
        pairs = self.crossed_pairs(queries, keys, num)
        contrasts = [batch_contrast(*pair, self.temperature) for pair in pairs]
        num_local = len(views) - 2
        loss = sum_over_views([contrast.loss for contrast in contrasts], num_local)
        # those of the global views; those of local ones are the second half
        contrasts = contrasts[: len(contrasts) // 2] if num_local else contrasts
        if self.online.batchformer is not None and self.online.batchformer.loss == "mean":
            # four pairs of streams a direction weigh as much as one
            loss = loss * (2.0 / len(contrasts))
        return {
            "loss": loss,
            "embedding": keys[0][:num],
            **contrast_metrics(*contrasts),
            **self.health(*contrasts),
        }

    def after_step(self, progress: Progress) -> None:
        """Average the target with the next step's momentum, which rises to 1."""
        self.update_target(
            momentum_at(progress.next.fraction, self.base_momentum, self.momentum_schedule)
        )
