"""The closed form of the synthetic negatives against the vectors it stands for."""

import pytest
import torch
from plain_loss import queue_contrast_plain
from torch import Tensor

from models.parts.losses import queue_contrast
from models.parts.negatives import (
    ClosedForm,
    SyntheticConfig,
    draw_synthetics,
    hardest,
    materialise,
)

EACH = [tuple(7 if i == kind else 0 for i in range(6)) for kind in range(6)]


def batch(dtype: torch.dtype, unit_queue: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    queries = torch.nn.functional.normalize(torch.randn(5, 16, dtype=dtype), dim=1).requires_grad_()
    keys = torch.nn.functional.normalize(torch.randn(5, 16, dtype=dtype), dim=1)
    queue = torch.randn(40, 16, dtype=dtype)
    return queries, keys, torch.nn.functional.normalize(queue, dim=1) if unit_queue else 0.3 * queue


def loss_and_gradient(function, inputs, config, temperature: float = 0.2) -> tuple[Tensor, ...]:
    queries, keys, queue = inputs
    torch.manual_seed(1)
    contrast = function(queries, keys, queue, temperature, config)
    (gradient,) = torch.autograd.grad(contrast.loss, queries)
    return contrast.loss.detach(), gradient, contrast.positive_rank, contrast.health


@pytest.mark.parametrize("unit_queue", [True, False], ids=["unit", "any-length"])
@pytest.mark.parametrize("legacy", [False, True], ids=["", "legacy"])
@pytest.mark.parametrize("counts", [None, *EACH, (7, 6, 5, 4, 3, 2)], ids=str)
def test_closed_form_equals_materialised(counts, legacy: bool, unit_queue: bool) -> None:
    config = SyntheticConfig(12, counts, 0.1, 0.3, 0.2, legacy) if counts else None
    inputs = batch(torch.float64, unit_queue)
    fast = loss_and_gradient(queue_contrast, inputs, config)
    plain = loss_and_gradient(queue_contrast_plain, inputs, config)
    for ours, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_float32_and_half_inputs() -> None:
    config = SyntheticConfig(12, (7, 6, 5, 4, 3, 2))
    inputs = batch(torch.float32)
    torch.testing.assert_close(
        loss_and_gradient(queue_contrast, inputs, config)[:2],
        loss_and_gradient(queue_contrast_plain, inputs, config)[:2],
        rtol=1e-5,
        atol=1e-6,
    )
    with torch.autocast("cpu", torch.bfloat16):  # a loss in half precision would be off by percents
        under_autocast = loss_and_gradient(queue_contrast, inputs, config)
    torch.testing.assert_close(
        under_autocast[:2], loss_and_gradient(queue_contrast, inputs, config)[:2]
    )


@pytest.mark.parametrize("kind", range(6))
def test_vectors_follow_the_formulas(kind: int) -> None:
    """Unit length, and made of the query and hard negatives only, with coefficients in their ranges."""
    queries, _, queue = (x.detach() for x in batch(torch.float64))
    similarities = queries @ queue.T
    config = SyntheticConfig(12, EACH[kind])
    (draw,) = draw_synthetics(config, hardest(similarities, 12), queries)
    made = materialise([draw], queries, queue)
    torch.testing.assert_close(made.norm(dim=2), torch.ones(5, 7, dtype=torch.float64))
    hard = similarities.topk(12, dim=1).indices
    assert all(set(draw.first[row].tolist()) <= set(hard[row].tolist()) for row in range(5))
    negatives = queue[draw.first]
    expected = {
        0: lambda a: a * queries[:, None] + (1 - a) * negatives,
        1: lambda a: a * queries[:, None] + (1 - a) * negatives,
        4: lambda _: negatives + 0.01 * queries[:, None],
        5: lambda _: negatives + 0.01 * queries.sign()[:, None],
    }
    if kind in expected:
        a = draw.a[..., None] if isinstance(draw.a, Tensor) else draw.a
        torch.testing.assert_close(made, torch.nn.functional.normalize(expected[kind](a), dim=2))
    if kind == 0:
        assert bool(((draw.a >= 0) & (draw.a < 0.5)).all())
    if kind == 1:  # beta - 1 = -a in [0, 0.5): beyond the negative, away from the query
        assert bool(((draw.a <= 0) & (draw.a > -0.5)).all())
        cosine = torch.einsum("bnd,bd->bn", made, queries)
        assert bool((cosine <= similarities.gather(1, draw.first) + 1e-9).all())


@pytest.mark.parametrize(
    ("kind", "sigma", "expected"),
    [
        (0, 0.01, 0.689),
        (1, 0.01, 0.333),
        (2, 0.01, 0.583),
        (3, 0.01, 0.497),
        (3, 0.1, 0.331),
        (4, 0.01, 0.507),
    ],
)
def test_mean_similarity(kind: int, sigma: float, expected: float) -> None:
    """Monte-Carlo means of q.s at q.n = 0.5, D = 128, measured on the published code."""
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(1, 128), dim=1)
    other = torch.nn.functional.normalize(torch.randn(400, 128), dim=1)
    other = torch.nn.functional.normalize(other - (other @ query.T) * query, dim=1)
    queue = 0.5 * query + 0.75**0.5 * other
    config = SyntheticConfig(400, tuple(400 if i == kind else 0 for i in range(6)), sigma)
    means = []
    for _ in range(20):
        draws = draw_synthetics(config, hardest(query @ queue.T, 400), query)
        means.append(float((materialise(draws, query, queue)[0] @ query[0]).mean()))
    assert sum(means) / 20 == pytest.approx(expected, abs=0.01)


def test_no_gradient_but_the_direct_one() -> None:
    """Coefficients, lengths and signs are constants: d loss / d q is the weighted sum of the vectors
    themselves.
    """
    queries, _, queue = batch(torch.float64)
    fixed = queries.detach()
    similarities = fixed @ queue.T
    draws = draw_synthetics(
        SyntheticConfig(12, (7, 6, 5, 4, 3, 2)), hardest(similarities, 12), fixed
    )
    vectors = materialise(draws, fixed, queue)
    weights = torch.rand(vectors.shape[:2], dtype=torch.float64)
    lengths, buffer, start, direct = (
        queue.norm(dim=1),
        torch.zeros(5, 40, dtype=torch.float64),
        0,
        0.0,
    )
    for draw in draws:
        form = ClosedForm(draw, fixed, queue, similarities, lengths)
        stop = start + form.logits.shape[1]
        torch.testing.assert_close(
            form.logits, torch.einsum("bnd,bd->bn", vectors[:, start:stop], fixed)
        )
        direct = direct + form.accumulate(weights[:, start:stop], buffer, fixed)
        start = stop
    torch.testing.assert_close(
        direct + buffer @ queue, torch.einsum("bn,bnd->bd", weights, vectors)
    )


def test_nothing_of_queue_size_is_kept_for_backward() -> None:
    """What autograd holds between forward and backward is the (B, D) gradient alone."""
    sizes: list[int] = []
    queries, keys, queue = batch(torch.float64)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (sizes.append(t.numel()), t)[1], lambda t: t
    ):
        queue_contrast(queries, keys, queue, 0.2, SyntheticConfig(12, (7, 6, 5, 4, 3, 2)))
    assert max(sizes) <= queries.numel()


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="NUM_HARD: 4 is below"):
        SyntheticConfig(4, (5, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match="six counts"):
        SyntheticConfig(4, (1, 1, 1))
    with pytest.raises(ValueError, match="NUM_HARD: 41 exceeds QUEUE_SIZE 40"):
        queue_contrast(*batch(torch.float64), 0.2, SyntheticConfig(41, (1,) * 6))


@pytest.mark.parametrize(("length", "num"), [(64, 12), (8192, 64), (8192, 512), (65536, 1024)])
def test_the_hard_set_is_in_the_order_of_topk(length: int, num: int) -> None:
    """The draws are positions in it: in another order equal seeds would draw other keys."""
    generator = torch.Generator().manual_seed(length + num)
    similarities = torch.randint(3000, (3, length), generator=generator).float()  # with ties
    expected = similarities.topk(num, dim=1, sorted=False).indices
    assert torch.equal(hardest(similarities, num), expected)


@pytest.mark.parametrize("function", [queue_contrast, queue_contrast_plain])
def test_the_accuracy_counts_synthetic_negatives(function) -> None:
    queries, _, queue = batch(torch.float64)
    for config, num_negatives in ((None, 40), (SyntheticConfig(12, (7, 6, 5, 4, 3, 2)), 67)):
        worst = function(queries, -queries, queue, 0.2, config)
        assert worst.positive_rank.tolist() == [num_negatives] * 5


def test_the_health_of_a_contrast_is_that_of_its_softmax() -> None:
    queries, keys, queue = batch(torch.float64)
    config = SyntheticConfig(12, (7, 6, 5, 4, 3, 2))
    with torch.no_grad():
        plain = queue_contrast(queries, keys, queue, 0.2)
        torch.manual_seed(1)
        joined = queue_contrast(queries, keys, queue, 0.2, config)
    positive = ((queries * keys).sum(1) / 0.2).mean()
    negative = (queries @ queue.T / 0.2).mean()
    assert plain.health.tolist() == pytest.approx([positive.item(), negative.item()])
    assert joined.health[:2].tolist() == pytest.approx(plain.health.tolist())
    # The share follows from how much each query's loss grew: exp(-growth) is the rest's share.
    assert joined.health[2].item() == pytest.approx(share_by_loss(queries, keys, queue, config))


def share_by_loss(queries: Tensor, keys: Tensor, queue: Tensor, config: SyntheticConfig) -> float:
    """Return the share of the synthetics by the plain losses of the queries."""
    fixed = queries.detach()
    negatives = fixed @ queue.T
    torch.manual_seed(1)
    draws = draw_synthetics(config, hardest(negatives, config.num_hard), fixed)
    made = torch.einsum("bd,bnd->bn", fixed, materialise(draws, fixed, queue))
    others = torch.cat([(fixed * keys).sum(1, keepdim=True), negatives], dim=1)
    rest = torch.logsumexp(others / 0.2, 1)
    growth = torch.logsumexp(torch.cat([others, made], dim=1) / 0.2, 1) - rest
    return (1 - (-growth).exp()).mean().item()
