"""Losses, in float32 under any autocast. The tests compare each fast form with a plain one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction

import utils.distributed as distributed
from models.parts.negatives import (
    ClosedForm,
    SyntheticConfig,
    draw_synthetics,
    hardest,
    refuse_short_queue,
)


class Contrast(NamedTuple):
    """A contrastive loss (mean over queries) and the positive's place among its negatives."""

    loss: Tensor
    # (B,) int64: how many negatives, synthetic ones too, beat the positive; 0 is a hit
    positive_rank: Tensor
    # (2,) or (3,), means over queries: the positive's logit, a negative's without the synthetic
    # ones, and with these their share of the softmax
    health: Tensor


def cosine_regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - mean cosine of (N, D) pairs: half of equation 2 of arXiv:2006.07733."""
    return 1.0 - (unit(predictions) * unit(targets)).sum(1).mean()


def batch_contrast(queries: Tensor, keys: Tensor, temperature: float) -> "Contrast":
    """Return InfoNCE of queries (N, D) and keys (N, D) against the keys of all processes, times 2T.

    Chen et al. 2021 (MoCo v3, arXiv:2104.02057), algorithm 1. The factor 2T keeps the size of the
    gradient independent of the temperature T. Queries of n views, (n N, D), share the keys.
    """
    num, views = len(keys), len(queries) // len(keys)
    queries, keys = unit(queries), distributed.gather_rows(unit(keys.detach()))
    # near a logit of 10, bfloat16 has steps of 0.06
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.T / temperature  # (N, N * processes)
    # the positive of row n is row n of this process's block of the gathered keys
    labels = torch.arange(num, device=queries.device).repeat(views) + num * distributed.rank()
    with torch.no_grad():
        positive = logits.gather(1, labels[:, None])
        positive_rank = (logits > positive).sum(1)
        negatives = (logits.sum(1) - positive[:, 0]) / max(logits.shape[1] - 1, 1)
        health = torch.stack([positive.mean(), negatives.mean()])
    return Contrast(2.0 * temperature * F.cross_entropy(logits, labels), positive_rank, health)


def sum_over_views(losses: Sequence[Tensor], num_local: int) -> Tensor:
    """Return the sum of a method's losses, or with local views what keeps its size.

    Without local views `losses` are those of the pairs of a global query and a global key. With n
    of them as many follow, each the mean over the n local queries with one key. All pairs of a
    query and a key then weigh the same: (sum of the global ones + n * sum of the others) / (1 + n),
    the mean over pairs of equation 3 of arXiv:2104.14294 (DINO; SwAV, arXiv:2006.09882, section
    3.2) times the number of global pairs.
    """
    if not num_local:
        return torch.stack(list(losses)).sum()
    half = len(losses) // 2
    first, others = torch.stack(list(losses[:half])).sum(), torch.stack(list(losses[half:])).sum()
    return (first + num_local * others) / (1 + num_local)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Contrast two views (N, D) with each other and all 2N - 2 others of the process's own batch.

    Chen et al. 2020 (SimCLR, arXiv:2002.05709), equation 1, as SiT uses it.
    """
    rows = torch.cat([unit(first), unit(second)])
    with torch.autocast(rows.device.type, enabled=False):
        logits = rows @ rows.T / temperature
    # a row is no negative of itself
    logits = logits.masked_fill(
        torch.eye(len(rows), dtype=torch.bool, device=rows.device), float("-inf")
    )
    # row n of one view belongs to row n of the other
    positives = torch.arange(len(rows), device=rows.device).roll(len(first))
    return F.cross_entropy(logits, positives)


def unit(embeddings: Tensor) -> Tensor:
    """Return rows (N, D) of unit length, in float32 or better: cosines need it."""
    return F.normalize(full_precision(embeddings), dim=1, eps=1e-12)


def contrast_metrics(*contrasts: Contrast) -> dict[str, Tensor]:
    """Return how often (percent) the positive is among the best 1 and the best 5 logits."""
    ranks = torch.cat([contrast.positive_rank for contrast in contrasts])
    return {f"acc{k}": (ranks < k).float().mean() * 100.0 for k in (1, 5)}


def contrast_health(*contrasts: Contrast) -> dict[str, Tensor]:
    """Return what tells how hard the contrast is, see `Contrast.health`."""
    values = torch.stack([contrast.health for contrast in contrasts]).mean(0)
    names = ("positive_logit", "negative_logit", "synthetic_share")
    return dict(zip(names, values, strict=False))  # without synthetics two values


def full_precision(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if it has more."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def queue_contrast(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: float,
    synthetics: SyntheticConfig | None = None,
) -> Contrast:
    """Return InfoNCE of queries (B, D) and keys (B, D) against a queue (K, D), all of unit length.

    He et al. 2020 (arXiv:1911.05722), equation 1. With `synthetics` SynCo's negatives join the
    queue.
    """
    # The forward pass computes the gradient by the queries too, so nothing of size K is kept for
    # the backward pass.
    return Contrast(
        *_QueueContrast.apply(queries, keys.detach(), queue.detach(), temperature, synthetics)
    )


class _QueueContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: BackwardCFunction,
        queries: Tensor,
        keys: Tensor,
        queue: Tensor,
        temperature: float,
        synthetics: SyntheticConfig | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(queries.device.type, enabled=False):
            loss, rank, health, gradient = _contrast_and_gradient(
                full_precision(queries),
                full_precision(keys),
                full_precision(queue),
                temperature,
                synthetics,
            )
        # (B, D), where autograd would keep (B, K)
        ctx.save_for_backward(gradient.to(queries.dtype))
        ctx.mark_non_differentiable(rank, health)
        return loss, rank, health

    @staticmethod
    def backward(
        ctx: BackwardCFunction, grad_loss: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_loss * gradient, None, None, None, None


def _contrast_and_gradient(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, config: SyntheticConfig | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # One B x K buffer holds the similarities, then the exponentials, then the gradient's weights.
    buffer = queries @ queue.T
    positive = (queries * keys).sum(1, keepdim=True)
    rank = _count_larger(buffer, positive)
    forms = [] if config is None else _closed_forms(config, queries, queue, buffer)
    for form in forms:
        rank = rank + (form.logits > positive).sum(1)

    # logsumexp over positive, queue and synthetics, shifted by the largest, without concatenating
    # them
    largest = torch.maximum(buffer.amax(1, keepdim=True), positive)
    for form in forms:
        largest = torch.maximum(largest, form.logits.amax(1, keepdim=True))
    weights = [((form.logits - largest) / temperature).exp_() for form in forms]
    positive_weight = ((positive - largest) / temperature).exp_()
    # in place: B x K is the largest tensor of the step
    buffer.sub_(largest).mul_(1.0 / temperature).exp_()
    synthetic = sum(w.sum(1, keepdim=True) for w in weights)
    total = buffer.sum(1, keepdim=True) + positive_weight + synthetic
    loss = (total.log() + (largest - positive) / temperature).mean()

    # d loss / d q = sum_j p_j x_j - k, with p_j = weight_j / total; divided by T and B
    gradient = positive_weight * keys
    for form, weight in zip(forms, weights, strict=True):
        # adds the weights of queue entries to `buffer`: one product below serves all
        gradient = gradient + form.accumulate(weight, buffer, queries)
    gradient = (gradient + buffer @ queue) / total - keys
    # The mean of q . k over all pairs is the product of the means: no pass over B x K.
    negative = (queries.mean(0) * queue.mean(0)).sum()
    means = [positive.mean() / temperature, negative / temperature]
    if config is not None:
        means.append((synthetic / total).mean())
    return loss, rank, torch.stack(means), gradient / (temperature * len(queries))


def _count_larger(values: Tensor, thresholds: Tensor) -> Tensor:
    """Return how many values of each row exceed its threshold (B, 1).

    A CPU compares in chunks that stay in the cache. Comparing the whole B x K buffer at once would
    cost as much as the matrix product that filled it.
    """
    if values.device.type != "cpu":
        return (values > thresholds).sum(1)
    rows = 8
    scratch = values.new_empty(min(rows, len(values)), values.shape[1])
    counts = [
        torch.gt(part, limit, out=scratch[: len(part)]).sum(1)
        for part, limit in zip(values.split(rows), thresholds.split(rows), strict=True)
    ]
    return torch.cat(counts).long()


def _closed_forms(
    config: SyntheticConfig, queries: Tensor, queue: Tensor, similarities: Tensor
) -> list[ClosedForm]:
    refuse_short_queue(config.num_hard, queue)
    lengths = torch.linalg.vector_norm(queue, dim=1)
    draws = draw_synthetics(config, hardest(similarities, config.num_hard), queries)
    return [ClosedForm(draw, queries, queue, similarities, lengths) for draw in draws]
