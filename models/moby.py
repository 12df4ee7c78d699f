"""MoBY: MoCo v2 and BYOL joined for transformers (Xie et al. 2021, arXiv:2105.04553)."""

import itertools

import torch
from torch import Tensor

from models.parts.backbones import Backbone
from models.parts.heads import Encoder, mlp
from models.parts.losses import contrast_metrics, queue_contrast, sum_over_views, unit
from models.parts.momentum import KeyQueue, MomentumFramework, view_pairs
from models.parts.negatives import SyntheticConfig
from utils.config.key import Count, Fraction, Rise, Temperature
from utils.schedules import Progress, momentum_at


class MoBY(MomentumFramework):
    """Contrast in both directions against two queues, with a predictor and a rising momentum."""

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
        queue_size: Count = 4096,
        temperature: Temperature = 0.2,
        base_momentum: Fraction = 0.99,
        momentum_schedule: Rise = "cosine",
    ) -> None:
        projector = mlp(backbone.num_features, hidden_dim, out_dim, proj_num_layers)
        super().__init__(Encoder(backbone, projector), target_backbone)
        self.predictor = mlp(out_dim, hidden_dim, out_dim, pred_num_layers)
        # Two queues: queries of a view meet only keys of the other view.
        self.queue1 = KeyQueue(queue_size, out_dim)  # keys of view 1
        self.queue2 = KeyQueue(queue_size, out_dim)  # keys of view 2
        self.temperature = temperature
        self.base_momentum = base_momentum
        self.momentum_schedule = momentum_schedule

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Contrast each view's queries with the other view's keys. The two losses are summed.

        Queries of local views meet the keys of both.
        """
        queries = [unit(self.predictor(rows)) for rows in self.online.each(views)]
        with torch.no_grad():
            keys = [unit(rows) for rows in self.target.each(views[:2])]
        synthetics = self.synthetics(progress)
        num = len(views[0])
        contrasts = []
        # queries that meet keys of view 2 meet old keys of view 2; so for view 1
        queues = itertools.cycle((self.queue2.keys, self.queue1.keys))
        for pair, queue in zip(view_pairs(queries, keys), queues, strict=False):
            rows = self.paired_rows(*pair, num)
            contrasts.append(queue_contrast(*rows, queue, self.temperature, synthetics))
        # after the contrasts: a query must not meet its own key among the negatives
        self.queue1.hold(keys[0])
        self.queue2.hold(keys[1])
        return {
            "loss": sum_over_views([contrast.loss for contrast in contrasts], len(views) - 2),
            "embedding": keys[0][:num],
            **contrast_metrics(*contrasts[:2]),  # of global views
            **self.health(*contrasts[:2], queue_age=self.queue1.age(progress)),
        }

    def synthetics(self, progress: Progress) -> SyntheticConfig | None:
        """Return what to synthesise at this step: nothing in MoBY. SynCo-v2 overrides it."""
        return None

    def after_step(self, progress: Progress) -> None:
        """Enqueue the step's keys, then average the target with the next step's momentum."""
        self.queue1.flush()
        self.queue2.flush()
        self.update_target(
            momentum_at(progress.next.fraction, self.base_momentum, self.momentum_schedule)
        )
