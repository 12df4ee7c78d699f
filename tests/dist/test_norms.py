"""Batch norms that span processes, or parts of a batch, equal plain batch norms on the matching batches."""

from collections.abc import Callable

import pytest
import torch
from forked import Pool
from torch import Tensor, nn

from models.parts.norm import (
    SplitBatchNorm2d,
    SyncBatchNorm,
    convert_split_batch_norm,
    convert_sync_batch_norm,
)
from utils import distributed

SHAPES = {"conv": (12, 5, 3, 4), "dense": (12, 5)}
SIZES = {"even": (6, 6), "uneven": (9, 3), "one": (11, 1)}


def filled(norm: nn.Module) -> nn.Module:
    """Draw weights and statistics, so that nothing is a one or a zero by chance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*norm.parameters(), *norm.buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator, dtype=value.dtype) + 0.5)
    return norm.double()


def batch(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Draw inputs far from zero, where a naive variance cancels, and weights of a loss."""
    generator = torch.Generator().manual_seed(2)
    draws = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return 1000 + 3 * draws[0], draws[1]


def pass_through(norm: nn.Module, inputs: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Do two training steps and an evaluation, the loss a weighted sum of squares."""
    inputs = inputs.detach().requires_grad_()
    for _ in range(2):
        out = norm(inputs)
        (out.square() * weights).sum().backward()
    found = {"output": out.detach(), "input grad": inputs.grad}
    for name, parameter in norm.named_parameters():
        found[f"{name} grad"] = parameter.grad
    found |= norm.state_dict()
    with torch.no_grad():
        found["eval"] = norm.eval()(inputs)
    return found


def sync_pass(
    kind: str, sizes: tuple[int, int], momentum: float | None, affine: bool
) -> dict[str, Tensor]:
    shape = SHAPES[kind]
    norm = filled(SyncBatchNorm(shape[1], momentum=momentum, affine=affine))
    inputs, weights = (part.split(sizes)[distributed.rank()] for part in batch(shape))
    return pass_through(norm, inputs, weights)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", SHAPES)
def test_sync_batch_norm_equals_one_process_with_the_joint_batch(
    ranks: Pool, kind: str, sizes: str, momentum: float | None, affine: bool
) -> None:
    plain = (nn.BatchNorm2d if kind == "conv" else nn.BatchNorm1d)(
        5, momentum=momentum, affine=affine
    )
    expected = pass_through(filled(plain), *batch(SHAPES[kind]))
    halves = ranks.run(sync_pass, kind, SIZES[sizes], momentum, affine)
    for name, value in expected.items():
        if name in ("output", "input grad", "eval"):
            found = torch.cat([half[name] for half in halves])
        elif name.endswith("grad"):
            found = halves[0][name] + halves[1][name]
        else:
            assert torch.equal(halves[0][name], halves[1][name])
            found = halves[0][name]
        torch.testing.assert_close(
            found, value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def half_precision() -> tuple[torch.dtype, Tensor, Tensor]:
    """Normalise a map of 2 x 300 values a channel in bf16, which has no integer between 300 and 302."""
    norm = SyncBatchNorm(2)
    inputs = torch.arange(300.0).view(1, 1, 300, 1).repeat(1, 2, 1, 1).bfloat16()
    out = norm(inputs)
    return out.dtype, norm.running_mean, out.float().mean((0, 2, 3))


def test_sync_batch_norm_counts_exactly_in_half_precision(ranks: Pool) -> None:
    expected = torch.arange(300.0).bfloat16().float().mean() * 0.1
    for dtype, running_mean, mean in ranks.run(half_precision):
        assert dtype == torch.bfloat16
        torch.testing.assert_close(running_mean, expected.expand(2), rtol=1e-6, atol=0)
        assert mean.abs().max() < 1e-3


def test_sync_batch_norm_on_one_process_is_batch_norm() -> None:
    shape = SHAPES["conv"]
    expected = pass_through(filled(nn.BatchNorm2d(5)), *batch(shape))
    found = pass_through(filled(SyncBatchNorm(5)), *batch(shape))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
def test_split_batch_norm_equals_a_batch_norm_for_each_group(splits: int) -> None:
    inputs, weights = batch(SHAPES["conv"])
    found = pass_through(filled(SplitBatchNorm2d(5, splits)), inputs, weights)
    groups = [
        pass_through(filled(nn.BatchNorm2d(5)), inputs[n::splits], weights[n::splits])
        for n in range(splits)
    ]
    for name in ("output", "input grad"):
        for n, group in enumerate(groups):
            torch.testing.assert_close(found[name][n::splits], group[name], rtol=1e-10, atol=1e-10)
    for name in ("weight grad", "bias grad"):
        torch.testing.assert_close(
            found[name], sum(group[name] for group in groups), rtol=1e-10, atol=1e-10
        )
    for name in ("running_mean", "running_var"):
        mean = torch.stack([group[name] for group in groups]).mean(0)
        torch.testing.assert_close(found[name], mean, rtol=1e-10, atol=1e-10)
    assert found["num_batches_tracked"] == 2


def test_split_batch_norm_evaluates_like_a_batch_norm() -> None:
    split, plain = filled(SplitBatchNorm2d(5, 4)).eval(), filled(nn.BatchNorm2d(5)).eval()
    inputs, _ = batch((7, 5, 3, 4))  # 7 is no multiple of 4, and need not be
    assert torch.equal(split(inputs), plain(inputs))


def test_split_batch_norm_refuses_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"BN_GROUPS: a batch of 7 does not divide into 4 groups"):
        SplitBatchNorm2d(5, 4)(torch.randn(7, 5, 2, 2))
    SplitBatchNorm2d(5, 4)(torch.randn(4, 5, 2, 2))  # four values a channel
    with pytest.raises(ValueError, match=r"BN_GROUPS: 4 groups of a batch of 4 have one image"):
        SplitBatchNorm2d(5, 4)(torch.randn(4, 5, 1, 1))


def test_conversions_keep_weights_statistics_and_mode() -> None:
    def make() -> nn.Sequential:
        return filled(
            nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.Flatten(), nn.BatchNorm1d(80))
        )

    images = torch.randn(4, 3, 4, 4, dtype=torch.float64)
    for convert, kinds in (
        (convert_sync_batch_norm, (SyncBatchNorm, SyncBatchNorm)),
        (lambda module: convert_split_batch_norm(module, 2), (SplitBatchNorm2d, nn.BatchNorm1d)),
    ):
        plain, converted = make().eval(), convert(make().eval())
        assert (type(converted[1]), type(converted[3])) == kinds
        assert not converted[1].training
        assert torch.equal(plain(images), converted(images))


@pytest.mark.parametrize(
    "convert", [convert_sync_batch_norm, lambda module: convert_split_batch_norm(module, 2)]
)
def test_conversions_leave_frozen_what_is_frozen(convert: Callable[[nn.Module], nn.Module]) -> None:
    module = nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5)).requires_grad_(False)
    module[0].weight.requires_grad_()
    trained = list(map(id, module.parameters()))
    assert [p.requires_grad for p in convert(module).parameters()] == [True, False, False, False]
    assert list(map(id, module.parameters())) == trained  # an optimiser built before keeps them
