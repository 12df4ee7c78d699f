"""Projection and prediction heads, and the encoder that joins a backbone to one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.parts.batchformer import BatchFormer


def mlp(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    num_layers: int = 2,
    *,
    batch_norm: bool = True,
    bias: bool = True,
    last_batch_norm: bool = False,
) -> nn.Sequential:
    """Build `num_layers` linear layers with batch norm and ReLU between them; 0: the identity.

    MoCo v2: two layers without batch norm. BYOL and MoBY: batch norm after hidden layers only, and
    biases. MoCo v3: no biases, and a batch norm without affine parameters after the last layer of
    the projector. The initialisation is PyTorch's default, as in the originals.
    """
    if num_layers == 0:
        if in_dim != out_dim:
            raise ValueError(
                f"a head of 0 layers (NUM_MLP_LAYERS, PROJ_NUM_LAYERS, PRED_NUM_LAYERS) keeps the "
                f"{in_dim} numbers it is given, but OUT_DIM is {out_dim}; set OUT_DIM to {in_dim}, "
                "or take 1 layer or more"
            )
        return nn.Sequential(nn.Identity())
    layers: list[nn.Module] = []
    for index in range(num_layers):
        last = index == num_layers - 1
        width = out_dim if last else hidden_dim
        layers.append(nn.Linear(in_dim, width, bias=bias))
        if batch_norm and not last:
            layers.append(nn.BatchNorm1d(width))
        if not last:
            layers.append(nn.ReLU(inplace=True))
        in_dim = width
    if last_batch_norm:
        layers.append(nn.BatchNorm1d(out_dim, affine=False))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """A backbone followed by a projector: the online and the target network.

    With `stack_views` all views go through the backbone in one pass. That is faster, but batch
    norms of the backbone then have the statistics of all views together.
    """

    stack_views = False
    keeps_features = False  # while training, for an on-line probe
    _features: Tensor | None = None

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        # None, so that the state dict has no key of it
        self.batchformer: BatchFormer | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Project images (N, 3, H, W) to (N, D), or to (2N, D) while training under BatchFormer."""
        return self._project(self._kept(self.backbone(images)))

    def each(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Project two views, each by itself; under `stack_views` only the heads do so.

        Local views follow as one tensor, see `stacked`.
        """
        views, local = views[:2], views[2:]
        if self.stack_views:
            features = self._kept(self.backbone(torch.cat(list(views))))
            # The heads see one view at a time, so their batch norms have its statistics alone.
            projected = [self._project(part) for part in features.chunk(len(views))]
        else:
            projected = [self(view) for view in views]
        return [*projected, self.stacked(local)] if local else projected

    def stacked(self, views: Sequence[Tensor]) -> Tensor:
        """Project n views (N, 3, H, W) in one pass; the rows of a view follow those before it."""
        return self._project(self.backbone(torch.cat(list(views))), len(views))

    def take_features(self) -> Tensor:
        """Return the detached features of the first pass since the last call, first view first."""
        assert self._features is not None, "no pass while `keeps_features`"
        features, self._features = self._features, None
        return features

    def _kept(self, features: Tensor) -> Tensor:
        # Only the first pass of a step: later ones see other views.
        if self.keeps_features and self.training and self._features is None:
            self._features = features.detach()
        return features

    def _project(self, features: Tensor, num_views: int = 1) -> Tensor:
        if self.batchformer is not None:
            # each view by itself: its samples attend to other images only
            features = torch.cat([self.batchformer(view) for view in features.chunk(num_views)])
        return self.projector(features)
