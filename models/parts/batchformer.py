"""BatchFormer: attention between the samples of a batch (Hou, Yu and Tao 2022, arXiv:2203.01522).

In training a batch leaves it as two streams, the plain features and the attended ones, which share the head
that follows. In evaluation it is the identity, so the backbone never knows it.
"""

import torch
from torch import Tensor, nn

PAIRINGS = ("mean", "sum", "joint")


class BatchFormer(nn.Module):
    """Transformer layers whose sequence is the batch of one process.

    ``trained`` False freezes them at their random start, as the published code does by accident (spec F1).
    ``loss`` says how a query's two streams meet a key's two: ``mean`` over the four pairs (published
    ``add_bf`` 36), their ``sum`` (``add_bf`` 1), or ``joint``: each with its own kind only (``add_bf`` 2).
    """

    def __init__(
        self,
        width: int,
        *,
        num_layers: int = 1,
        num_heads: int = 4,
        dropout: float = 0.5,
        trained: bool = True,
        loss: str = "mean",
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"MODEL.BATCHFORMER.NUM_HEADS: {num_heads} does not divide the backbone's width {width}"
            )
        if loss not in PAIRINGS:
            raise ValueError(f"MODEL.BATCHFORMER.LOSS: {loss!r} is not one of {', '.join(PAIRINGS)}")
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, num_heads, dim_feedforward=width, dropout=dropout)
            for _ in range(num_layers)
        )
        self.loss = loss
        self.requires_grad_(trained)

    def forward(self, features: Tensor) -> Tensor:
        """Return (2N, F), plain then attended, of features (N, F); in eval mode the features themselves."""
        if not self.training:
            return features
        attended = features[:, None]  # a sequence of N, a batch of one
        for layer in self.layers:
            attended = layer(attended)
        return torch.cat([features, attended[:, 0].to(features.dtype)])
