"""Losses of the family, in float32 whatever the autocast precision; each fast form has a plain twin."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.parts.negatives import (
    ClosedForm,
    SyntheticConfig,
    draw_synthetics,
    hardest,
    materialise,
    refuse_short_queue,
)


class Contrast(NamedTuple):
    """A contrastive loss (scalar, mean over queries) and the positive's place among the real negatives."""

    loss: Tensor
    positive_rank: Tensor  # (B,) int64: how many queue entries beat the positive; 0 is a hit


def cosine_regression(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return 1 - mean cosine of (N, D) pairs; the two directions of BYOL sum to 2 - cos - cos (spec B1).

    The paper's loss (Grill et al. 2020, equation 2) is twice this.
    """
    return 1.0 - (unit(predictions) * unit(targets)).sum(1).mean()


def unit(embeddings: Tensor) -> Tensor:
    """Return (N, D) rows of unit length, in float32 or better: half precision loses the angle."""
    return F.normalize(_full(embeddings), dim=1, eps=1e-12)


def contrast_metrics(*contrasts: Contrast) -> dict[str, Tensor]:
    """Return top-1 and top-5 accuracy (percent) of telling the positive from the queue, all directions."""
    ranks = torch.cat([contrast.positive_rank for contrast in contrasts])
    return {f"acc{k}": (ranks < k).float().mean() * 100.0 for k in (1, 5)}


def _full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def queue_contrast(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: float,
    synthetics: SyntheticConfig | None = None,
) -> Contrast:
    """InfoNCE of queries (B, D) with their keys (B, D) against a queue (K, D), all of unit length (He et al.
    2020).

    With ``synthetics`` the SynCo negatives join the queue. One B x K buffer holds similarities, then
    exponentials, then gradient weights; the gradient by the queries is ready when the forward ends, so
    nothing of size K is kept.
    """
    loss, rank = _QueueContrast.apply(queries, keys.detach(), queue.detach(), temperature, synthetics)
    return Contrast(loss, rank)


def queue_contrast_plain(
    queries: Tensor,
    keys: Tensor,
    queue: Tensor,
    temperature: float,
    synthetics: SyntheticConfig | None = None,
) -> Contrast:
    """Compute ``queue_contrast`` as the papers write it: logits, concatenation, cross entropy, autograd."""
    keys, queue = keys.detach(), queue.detach()
    negatives = queries @ queue.T
    logits = [(queries * keys).sum(1, keepdim=True), negatives]
    if synthetics is not None:
        fixed = queries.detach()
        draws = draw_synthetics(synthetics, hardest(negatives.detach(), synthetics.num_hard), fixed)
        logits.append(torch.einsum("bd,bnd->bn", queries, materialise(draws, fixed, queue)))
    labels = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    loss = F.cross_entropy(torch.cat(logits, dim=1) / temperature, labels)
    return Contrast(loss, (negatives.detach() > logits[0].detach()).sum(1))


class _QueueContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        queue: Tensor,
        temperature: float,
        synthetics: SyntheticConfig | None,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(queries.device.type, enabled=False):
            loss, rank, gradient = _contrast_and_gradient(
                _full(queries), _full(keys), _full(queue), temperature, synthetics
            )
        ctx.save_for_backward(gradient.to(queries.dtype))
        ctx.mark_non_differentiable(rank)
        return loss, rank

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return grad_loss * gradient, None, None, None, None


def _contrast_and_gradient(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, config: SyntheticConfig | None
) -> tuple[Tensor, Tensor, Tensor]:
    buffer = queries @ queue.T  # (B, K) similarities
    positive = (queries * keys).sum(1, keepdim=True)
    rank = _count_larger(buffer, positive)
    forms = [] if config is None else _closed_forms(config, queries, queue, buffer)

    # logsumexp over positive, queue and synthetics, shifted by the largest, without concatenating them
    largest = torch.maximum(buffer.amax(1, keepdim=True), positive)
    for form in forms:
        largest = torch.maximum(largest, form.logits.amax(1, keepdim=True))
    weights = [((form.logits - largest) / temperature).exp_() for form in forms]
    positive_weight = ((positive - largest) / temperature).exp_()
    buffer.sub_(largest).mul_(1.0 / temperature).exp_()
    total = buffer.sum(1, keepdim=True) + positive_weight + sum(w.sum(1, keepdim=True) for w in weights)
    loss = (total.log() + (largest - positive) / temperature).mean()

    # d loss / d q = sum_j p_j x_j - k, with p_j = weight_j / total; divided by T and B
    gradient = positive_weight * keys
    for form, weight in zip(forms, weights, strict=True):
        gradient = gradient + form.accumulate(weight, buffer, queries)
    gradient = (gradient + buffer @ queue) / total - keys
    return loss, rank, gradient / (temperature * len(queries))


def _count_larger(values: Tensor, thresholds: Tensor) -> Tensor:
    """Return how many of each row's values exceed its threshold (B, 1); on a CPU in chunks that stay in the
    cache.

    Comparing the whole B x K buffer at once would cost as much as the matrix product that filled it.
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
