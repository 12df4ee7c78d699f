"""Averaged gradients: those of DistributedDataParallel, in places that never change."""

import pytest
import torch
from forked import Pool
from torch import Tensor, nn

from utils import distributed
from engine.gradients import AveragedGradients


class Net(nn.Module):
    """Layers of several types, memory formats and sizes, one of them frozen, one that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.wide = nn.Linear(6, 4).double()
        self.spare = nn.Linear(4, 4).double()

    def forward(self, images: Tensor, spare: bool = True) -> Tensor:
        rows = self.wide(self.frozen(self.norm(self.conv(images).mean((2, 3)))).double())
        return (self.spare(rows) if spare else rows).square().sum()


def images(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + distributed.rank())
    return torch.randn(4, 3, 8, 8, generator=generator)


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def against_ddp(bucket_bytes: int) -> bool:
    ours, theirs = (
        AveragedGradients(Net(), bucket_bytes),
        nn.parallel.DistributedDataParallel(Net()),
    )
    for step in range(3):
        for model in (ours, theirs):
            model.zero_grad()
            with model.no_sync():
                model(images(2 * step)).backward()
            model(images(2 * step + 1)).backward()
        pairs = list(zip(gradients(ours), gradients(theirs), strict=True))
        torch.testing.assert_close(
            [a for a, _ in pairs], [b for _, b in pairs], rtol=1e-6, atol=1e-7
        )
        assert len(pairs) == 8
    strides = [p.grad.stride() == p.stride() for p in ours.parameters() if p.grad is not None]
    return all(strides)


@pytest.mark.parametrize("bucket_bytes", [1, 200, 1 << 20])
def test_they_are_those_of_ddp_laid_out_as_the_parameters(ranks: Pool, bucket_bytes: int) -> None:
    assert ranks.run(against_ddp, bucket_bytes) == [True, True]


def left_out() -> str:
    model = AveragedGradients(Net())
    with pytest.raises(RuntimeError) as error:
        model(images(0), spare=False).backward()
    model.zero_grad()
    model(images(0)).backward()  # a failed pass leaves nothing behind
    return str(error.value)


def test_a_parameter_without_gradient_is_named(ranks: Pool) -> None:
    for message in ranks.run(left_out):
        assert "spare.bias" in message or "spare.weight" in message


def order_of_travel() -> list[int]:
    """Return the sizes that are reduced in each of three steps."""
    import torch.distributed as dist

    sizes: list[int] = []
    original = dist.all_reduce
    model = AveragedGradients(Net(), 100)

    def noted(tensor: Tensor, *args: object, **kwargs: object) -> object:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = noted
    try:
        for step in range(3):
            model.zero_grad()
            model(images(step)).backward()
    finally:
        dist.all_reduce = original
    return sizes


def test_buckets_are_the_same_in_the_first_step_as_later(ranks: Pool) -> None:
    for sizes in ranks.run(order_of_travel):
        third = len(sizes) // 3
        assert third > 2
        assert sizes == 3 * sizes[:third]
