"""MoCo v2 (Chen et al. 2020, arXiv:2003.04297; momentum contrast: He et al., arXiv:1911.05722)."""

from typing import Annotated

import torch
from torch import Tensor

from models.parts.backbones import Backbone
from models.parts.heads import Encoder, mlp
from models.parts.losses import Contrast, contrast_metrics, queue_contrast, sum_over_views, unit
from models.parts.momentum import KeyQueue, MomentumFramework
from models.parts.negatives import SyntheticConfig
from models.parts.norm import convert_split_batch_norm
from utils.config.key import Count, Fraction, Limits, Temperature
from utils.distributed import (
    broadcast_host,
    exchange_rows,
    gather_rows,
    note_shared,
    rank,
    world_size,
)
from utils.schedules import Progress


class MoCoV2(MomentumFramework):
    """Contrast queries with a queue of keys, in one direction.

    `batch_norm` is "shuffle" (keys are shuffled between processes), "sync" (synchronised) or
    "local". On one process shuffling changes no statistics: `bn_groups` > 1 then normalises as that
    many processes would.
    """

    can_take_local_views = True

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        out_dim: Count = 128,
        num_mlp_layers: int = 2,
        queue_size: Count = 65536,
        temperature: Temperature = 0.2,
        base_momentum: Fraction = 0.999,
        symmetric: bool = False,
        batch_norm: Annotated[str, Limits(choices=("shuffle", "sync", "local"))] = "shuffle",
        bn_groups: Count = 1,
    ) -> None:
        if batch_norm not in ("shuffle", "sync", "local"):
            raise ValueError(f"BATCH_NORM: {batch_norm!r} is not one of shuffle, sync, local")
        if batch_norm == "sync" and bn_groups > 1:
            raise ValueError(
                f"BATCH_NORM sync normalises over all processes, BN_GROUPS {bn_groups} over parts "
                "of one; set BN_GROUPS to 1, or BATCH_NORM to shuffle"
            )
        width = backbone.num_features
        super().__init__(
            Encoder(backbone, mlp(width, width, out_dim, num_mlp_layers, batch_norm=False)),
            target_backbone,
        )
        self.queue = KeyQueue(queue_size, out_dim)
        self.temperature = temperature
        self.base_momentum = base_momentum
        self.symmetric = symmetric
        self.shuffle = batch_norm == "shuffle"
        self.sync_batch_norm = batch_norm == "sync"
        self.bn_groups = bn_groups
        if bn_groups > 1:
            convert_split_batch_norm(self, bn_groups)

    def forward(self, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """Contrast queries of view 1 with keys of view 2; `symmetric`: the mean of both ways.

        Queries of local views meet all keys of the step: those of view 2, `symmetric` of both.
        """
        ways = [(views[0], views[1]), (views[1], views[0])]
        pairs = ways if self.symmetric else ways[:1]
        num, local = len(views[0]), views[2:]
        local_queries = unit(self.online.stacked(local)) if local else None
        contrasts, local_losses = [], []
        for query_view, key_view in pairs:
            queries = unit(self.online(query_view))
            keys = self._keys(key_view)
            contrasts.append(self._contrast(queries, keys, num, progress))
            if local_queries is not None:
                local_losses.append(self._contrast(local_queries, keys, num, progress).loss)
            # after the contrast: a query must not meet its own key among the negatives
            self.queue.hold(keys)
        losses = [contrast.loss for contrast in contrasts] + local_losses
        loss = sum_over_views(losses, len(local)) / len(pairs)
        return {
            "loss": loss,
            "embedding": keys[: len(views[0])],
            **contrast_metrics(*contrasts),
            **self.health(*contrasts, queue_age=self.queue.age(progress)),
        }

    def _contrast(self, queries: Tensor, keys: Tensor, num: int, progress: Progress) -> Contrast:
        rows = self.paired_rows(queries, keys, num)
        return queue_contrast(*rows, self.queue.keys, self.temperature, self.synthetics(progress))

    def synthetics(self, progress: Progress) -> SyntheticConfig | None:
        """Return what to synthesise at this step: nothing in MoCo. SynCo overrides it."""
        return None

    def after_step(self, progress: Progress) -> None:
        """Enqueue the step's keys, then average the target."""
        self.queue.flush()
        self.update_target(self.base_momentum)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Encode keys (N, D); each batch norm sees a random part of the global batch.

        On one process there is nothing to shuffle, unless `bn_groups` splits the batch.
        """
        if not self.shuffle:
            return unit(self.target(images))
        num = len(images)
        # Drawn on one process too: the draws of SynCo that follow are then the published ones.
        order = broadcast_host(torch.randperm(num * world_size()))
        if world_size() == 1 and self.bn_groups <= 1:
            keys = unit(self.target(images))
            # what several processes would exchange: a dry run counts it
            note_shared("shuffled", images)
            note_shared("gathered", keys)
            return keys
        keys = unit(self.target(exchange_rows(images, order)))
        # the inverse permutation, of this process's rows
        back = order.argsort()[rank() * num : (rank() + 1) * num]
        back = back.to(keys.device, non_blocking=True)
        return torch.cat([gather_rows(stream)[back] for stream in keys.split(num)])
