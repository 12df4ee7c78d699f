"""Projection and prediction heads, and the encoder that joins a backbone to one."""

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
    """Build ``num_layers`` linear layers, (norm and) ReLU between them; 1 is a single layer, 0 the identity.

    MoCo v2: two layers without norm. BYOL and MoBY: hidden BN, biases, none after the last layer. MoCo v3: no
    biases, an affine-free BN after the last layer of the projector. PyTorch's default initialisation, as in
    the originals.
    """
    if num_layers == 0:
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
    """A backbone followed by a projector: what the online and the target network are."""

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.batchformer: BatchFormer | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Project images (N, 3, H, W) to (N, D), or to (2N, D) while training under BatchFormer."""
        features = self.backbone(images)
        if self.batchformer is not None:
            features = self.batchformer(features)
        return self.projector(features)
