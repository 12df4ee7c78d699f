"""BYOL: bootstrap your own latent (Grill et al. 2020, arXiv:2006.07733)."""

import torch
from torch import Tensor

from models.parts.backbones import Backbone
from models.parts.heads import Encoder, mlp
from models.parts.losses import cosine_regression, sum_over_views, unit
from models.parts.momentum import MomentumFramework, view_pairs
from utils.config.key import Count, Fraction, Rise
from utils.schedules import Progress, momentum_at


class BYOL(MomentumFramework):
    """Predict the target's embedding of the other view. The loss is half the paper's."""

    sync_batch_norm = True
    can_take_local_views = can_stack_views = True

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        hidden_dim: Count = 4096,
        out_dim: Count = 256,
        proj_num_layers: int = 2,
        pred_num_layers: int = 2,
        base_momentum: Fraction = 0.996,
        momentum_schedule: Rise = "cosine",
    ) -> None:
        projector = mlp(backbone.num_features, hidden_dim, out_dim, proj_num_layers)
        super().__init__(Encoder(backbone, projector), target_backbone)
        self.predictor = mlp(out_dim, hidden_dim, out_dim, pred_num_layers)
        self.base_momentum = base_momentum
        self.momentum_schedule = momentum_schedule

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Regress each view's prediction on the other view's target, local ones on both."""
        predictions = [self.predictor(rows) for rows in self.online.each(views)]
        # the paper's stop-gradient: only the online network learns
        with torch.no_grad():
            targets = [unit(rows) for rows in self.target.each(views[:2])]
        num = len(views[0])
        # both ways, so that each global view is predicted once
        losses = [
            cosine_regression(*self.paired_rows(*pair, num))
            for pair in view_pairs(predictions, targets)
        ]
        return {"loss": sum_over_views(losses, len(views) - 2), "embedding": targets[0][:num]}

    def after_step(self, progress: Progress) -> None:
        """Average the target with the next step's momentum, which rises to 1."""
        self.update_target(
            momentum_at(progress.next.fraction, self.base_momentum, self.momentum_schedule)
        )
