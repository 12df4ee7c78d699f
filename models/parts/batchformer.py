"""BatchFormer: attention between the samples of a batch (Hou, Yu and Tao 2022, arXiv:2203.01522).

In training it returns two streams: the plain features and the attended ones. Both go through the
same head. In evaluation it is the identity.
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from utils.config.key import Count, Fraction, Limits

PAIRINGS = ("mean", "sum", "joint")


class BatchFormer(nn.Module):
    """Transformer layers whose sequence is the batch of one process.

    `trained` False freezes them at their random start. The published code does so by accident: its
    momentum encoder holds the same layers and switches their gradients off. `loss` says which
    streams of query and key are compared: "mean" averages over the four pairs (`add_bf` 36 of the
    published code), "sum" adds them (`add_bf` 1), "joint" compares only equal streams (`add_bf` 2).
    """

    def __init__(
        self,
        width: int,
        *,
        num_layers: Count = 1,
        num_heads: Count = 4,
        dropout: Fraction = 0.5,
        trained: bool = True,
        loss: Annotated[str, Limits(choices=PAIRINGS)] = "mean",
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"MODEL.BATCHFORMER.NUM_HEADS: {num_heads} does not divide the backbone's width "
                f"{width}"
            )
        if loss not in PAIRINGS:
            raise ValueError(
                f"MODEL.BATCHFORMER.LOSS: {loss!r} is not one of {', '.join(PAIRINGS)}"
            )
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, dim_feedforward=width, dropout=dropout)
            for _ in range(num_layers)
        )
        self.loss = loss
        self.requires_grad_(trained)

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, F), in training with the attended ones below, (2N, F)."""
        if not self.training:
            return features
        attended = features[:, None]  # a sequence of N, a batch of one
        for layer in self.layers:
            attended = layer(attended)
        # The head sees both, so that it also fits single images, which an evaluation gives it.
        return torch.cat([features, attended[:, 0].to(features.dtype)])
