"""MoCo v2 (Chen et al. 2020, arXiv:2003.04297; momentum contrast: He et al. 2020, arXiv:1911.05722)."""

import torch
from torch import Tensor

from models.parts.backbones import Backbone
from models.parts.heads import Encoder, mlp
from models.parts.losses import contrast_metrics, queue_contrast, unit
from models.parts.momentum import KeyQueue, MomentumFramework
from models.parts.negatives import SyntheticConfig
from models.parts.norm import convert_split_batch_norm
from utils.distributed import broadcast_host, exchange_rows, gather_rows, rank, world_size
from utils.schedules import Progress


class MoCoV2(MomentumFramework):
    """One direction, a queue of keys, batch norm shuffled between processes; ``batch_norm`` local: without
    shuffling.

    On one process shuffling changes no statistics; ``bn_groups`` > 1 then emulates that many processes.
    """

    def __init__(
        self,
        backbone: Backbone,
        target_backbone: Backbone | None = None,
        *,
        out_dim: int = 128,
        num_mlp_layers: int = 2,
        queue_size: int = 65536,
        temperature: float = 0.2,
        base_momentum: float = 0.999,
        symmetric: bool = False,
        batch_norm: str = "shuffle",
        bn_groups: int = 1,
    ) -> None:
        if batch_norm not in ("shuffle", "sync", "local"):
            raise ValueError(f"BATCH_NORM: {batch_norm!r} is not one of shuffle, sync, local")
        width = backbone.num_features
        super().__init__(
            Encoder(backbone, mlp(width, width, out_dim, num_mlp_layers, batch_norm=False)), target_backbone
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
        """Contrast view 1's queries with view 2's keys (and the reverse, halved, if ``symmetric``)."""
        pairs = [(views[0], views[1]), (views[1], views[0])] if self.symmetric else [(views[0], views[1])]
        contrasts = []
        for query_view, key_view in pairs:
            queries = unit(self.online(query_view))
            keys = self._keys(key_view)
            rows = self.paired_rows(queries, keys, len(query_view))
            synthetics = self.synthetics(progress)
            contrasts.append(queue_contrast(*rows, self.queue.keys, self.temperature, synthetics))
            self.queue.hold(keys)
        loss = torch.stack([contrast.loss for contrast in contrasts]).mean()
        return {"loss": loss, "embedding": keys[: len(views[0])], **contrast_metrics(*contrasts)}

    def synthetics(self, progress: Progress) -> SyntheticConfig | None:
        """Return what to synthesise at this step; nothing in MoCo, see SynCo."""
        return None

    def after_step(self, progress: Progress) -> None:
        """Enqueue the step's keys, then average the target."""
        self.queue.flush()
        self.update_target(self.base_momentum)

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Encode keys (N, D); each batch norm sees a random part of the global batch (paper, section 3.3).

        On one process, where all of them see the same batch, there is nothing to shuffle but BN_GROUPS.
        """
        if not self.shuffle:
            return unit(self.target(images))
        num = len(images)
        # Drawn on one process too: the draws that follow, SynCo's, are then those of the published code.
        order = broadcast_host(torch.randperm(num * world_size()))
        if world_size() == 1 and self.bn_groups <= 1:
            return unit(self.target(images))
        keys = unit(self.target(exchange_rows(images, order)))
        back = order.argsort()[rank() * num : (rank() + 1) * num].to(keys.device)
        return torch.cat([gather_rows(stream)[back] for stream in keys.split(num)])
