"""UPerNet, FCN and linear heads over a backbone's maps, and their loss.

Parameters have mmsegmentation's names, so that files of weights go both ways. UPerNet: Xiao et al.
2018, arXiv:1807.10221; FCN: Long et al. 2015, arXiv:1411.4038.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.distributed import all_reduce_sum, world_size

IGNORE = 255  # the label of a pixel that counts nowhere


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, width_in: int, width: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 * dilation  # keeps height and width
        self.conv = nn.Conv2d(
            width_in, width, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map (N,C,H,W) to (N,`width`,H,W)."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Head(nn.Module):
    """What the heads share: dropout and the class layer."""

    def __init__(self, width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)  # drops whole channels
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def classify(self, x: Tensor) -> Tensor:
        """Return float32 logits (N,classes,H,W), under autocast too."""
        # In bf16 many classes tie: the arg-max would then depend on their order.
        with torch.autocast(x.device.type, enabled=False):
            return self.conv_seg(self.dropout(x.float()))


class UPerNet(Head):
    """Pyramid pooling on the last map, a feature pyramid over all; logits at the first's size."""

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        width: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
    ) -> None:
        super().__init__(width, num_classes, dropout)
        last = widths[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNorm(last, width))
            for scale in pool_scales
        )
        self.bottleneck = ConvNorm(last + len(pool_scales) * width, width, 3)
        # the last map has no lateral and no output convolution: the bottleneck is both
        self.lateral_convs = nn.ModuleList(ConvNorm(below, width) for below in widths[:-1])
        self.fpn_convs = nn.ModuleList(ConvNorm(width, width, 3) for _ in widths[:-1])
        self.fpn_bottleneck = ConvNorm(len(widths) * width, width, 3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits of maps from the largest to the smallest."""
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=False)]
        laterals.append(self._pool(maps[-1]))
        # top-down: each level has already taken up those above it
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + resize_like(
                laterals[level], laterals[level - 1]
            )
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        outputs.append(laterals[-1])
        joined = torch.cat([resize_like(x, outputs[0]) for x in outputs], dim=1)
        return self.classify(self.fpn_bottleneck(joined))

    def _pool(self, last: Tensor) -> Tensor:
        pooled = [resize_like(pool(last), last) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([last, *pooled], dim=1))


class FCN(Head):
    """Convolutions of 3x3 on one map; `concat` joins their result with the map itself."""

    def __init__(
        self,
        width_in: int,
        num_classes: int,
        *,
        width: int = 512,
        num_convs: int = 2,
        dilation: int = 1,
        concat: bool = True,
        dropout: float = 0.1,
        stage: int = -1,
    ) -> None:
        super().__init__(width, num_classes, dropout)
        self.stage = stage
        widths = [width_in] + [width] * (num_convs - 1)
        self.convs = nn.Sequential(*(ConvNorm(below, width, 3, dilation) for below in widths))
        self.conv_cat = ConvNorm(width_in + width, width, 3) if concat else None

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits of one of `maps`, at its size."""
        x = maps[self.stage]
        out = self.convs(x)
        if self.conv_cat is not None:
            out = self.conv_cat(torch.cat([x, out], dim=1))
        return self.classify(out)


class LinearHead(Head):
    """Batch norm and one linear layer on a frozen backbone's maps, as DINOv2 probes.

    Oquab et al. 2023, arXiv:2304.07193, section 7.4. Several maps are joined at the first's size.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__(sum(widths), num_classes, dropout=0.0)
        self.bn = nn.BatchNorm2d(sum(widths))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits at the size of the first map."""
        joined = torch.cat([resize_like(x, maps[0]) for x in maps], dim=1)
        return self.classify(self.bn(joined))


class LinearGrid(nn.Module):
    """Linear heads that start alike and learn at different rates from the same features."""

    def __init__(self, head: LinearHead, widths: Sequence[int], count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([head])
        for _ in range(count - 1):
            other = LinearHead(widths, head.conv_seg.out_channels)
            # equal starts: heads then differ by their rate only
            other.load_state_dict(head.state_dict())
            self.heads.append(other)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the logits (G*N,classes,H,W) of G heads, head after head."""
        return torch.cat([head(maps) for head in self.heads])


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (N,C,H,W) bilinearly to `size`."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """Resize (N,C,H,W) bilinearly to the size of `other`."""
    return resize(x, other.shape[2:])


def pixel_loss(logits: Tensor, labels: Tensor, over: str = "all") -> Tensor:
    """Return the mean cross-entropy of logits (N,C,h,w) resized to labels (N,H,W).

    An ignored pixel has loss 0. The mean is over `all` pixels, as mmsegmentation's published runs
    have it, or over the `labelled` ones of all processes' batches, so all must call this together.
    """
    # in half precision the sum over a million pixels would lose its digits
    logits = resize(logits.float(), labels.shape[1:])
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum")
    if over == "all":
        return total / labels.numel()
    labelled = all_reduce_sum((labels != IGNORE).sum())
    # The mean of the processes' gradients is then that of one process with all their images. A
    # batch without one labelled pixel has loss 0, not 0 / 0.
    return total * world_size() / labelled.clamp_min(1)
