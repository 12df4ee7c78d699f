"""Synthetic hard negatives of six types, made from the hardest queue entries (arXiv:2410.02401).

Each synthetic is `s = norm(a q + b n + c n' + d eps + e sign(q))`, where q is the query and n, n'
are hard queue entries. It is a constant: the gradient of its logit `q . s` by the query is s. So
neither the vectors nor autograd are needed. The logit and the length follow from the similarities
`u = q . n`, which the contrastive loss has computed already, and the gradient is a weighted sum of
queue entries, the query, its sign and the noise. `materialise` is the slow, plain form that builds
the vectors.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_EPS = 1e-12  # of the published normalisation x / max(|x|, eps)
_LEGACY_STEP = 1e-5  # finite difference of types 5 and 6 before October 2024
_PAIRS_PER_CHUNK = 2048


@dataclass(frozen=True)
class SyntheticConfig:
    """Numbers and strengths of the six types of synthetics (arXiv:2410.02401, section 3)."""

    num_hard: int = 1024
    counts: tuple[int, ...] = (256, 256, 256, 64, 64, 64)
    sigma: float = 0.01
    delta: float = 0.01
    eta: float = 0.01
    legacy_gradients: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for counts that cannot be drawn."""
        if len(self.counts) != 6 or min(self.counts) < 0:
            raise ValueError(
                f"NUM_SYNTHETIC: {list(self.counts)} must be six counts >= 0, one for each type"
            )
        if self.num_hard < max(self.counts):
            raise ValueError(
                f"NUM_HARD: {self.num_hard} is below the largest of NUM_SYNTHETIC "
                f"{list(self.counts)}"
            )


def refuse_short_queue(num_hard: int, queue: Tensor) -> None:
    """Raise `ValueError` if a queue (K, D) has fewer than `num_hard` keys to choose from."""
    if num_hard > len(queue):
        raise ValueError(f"NUM_HARD: {num_hard} exceeds QUEUE_SIZE {len(queue)}; lower it")


class Synthetics(NamedTuple):
    """Draws of one type: `a q + b n[first] + c n[second] + d noise + e sign(q)`; None: absent."""

    first: Tensor  # (B, N) queue rows
    b: Tensor | float
    a: Tensor | float | None = None
    second: Tensor | None = None
    c: Tensor | None = None
    noise: Tensor | None = None  # (B, N, D)
    d: Tensor | float = 0.0
    e: float | None = None


def hardest(similarities: Tensor, num_hard: int) -> Tensor:
    """Return the queue rows (B, num_hard) most similar to each query of (B, K).

    The draws are positions in this set, so its order matters. The published code has the same call
    of `topk`: equal seeds give equal losses.
    """
    return similarities.topk(num_hard, dim=1, sorted=False).indices


def draw_synthetics(config: SyntheticConfig, hard: Tensor, queries: Tensor) -> list[Synthetics]:
    """Draw the synthetics of all types with a count, in the published order of random numbers.

    `hard` (B, num_hard) are queue rows; positions in it are drawn uniformly, with replacement.
    """
    # u is uniform in [0, 1), so the negative always weighs more than the query.
    n1, n2, n3, n4, n5, n6 = config.counts
    draws: list[Synthetics] = []
    if n1:  # interpolation towards the query
        first, u = _pick(hard, n1), _uniform(queries, n1)
        draws.append(Synthetics(first, b=1 - 0.5 * u, a=0.5 * u))
    if n2:  # extrapolation away from the query: n + (beta - 1)(n - q), beta in [1, 1.5)
        first, u = _pick(hard, n2), _uniform(queries, n2)
        draws.append(Synthetics(first, b=1 + 0.5 * u, a=-0.5 * u))
    if n3:  # mixture of two hard negatives
        first, second = _pick_two(hard, n3)
        u = _uniform(queries, n3)
        draws.append(Synthetics(first, b=u, second=second, c=1 - u))
    if n4:  # Gaussian noise
        first = _pick(hard, n4)
        noise = torch.randn(
            *first.shape, queries.shape[1], dtype=queries.dtype, device=queries.device
        )
        draws.append(Synthetics(first, b=1.0, noise=noise, d=config.sigma))
    if n5:  # along the gradient of q . n with respect to n, which is q
        first = _pick(hard, n5)
        if config.legacy_gradients:
            noise, slope = _legacy_slope(queries, n5)
            draws.append(
                Synthetics(first, b=1.0, noise=noise, d=_LEGACY_STEP * config.delta * slope)
            )
        else:
            draws.append(Synthetics(first, b=1.0, a=config.delta))
    if n6:  # along the sign of that gradient
        first = _pick(hard, n6)
        if config.legacy_gradients:
            noise, slope = _legacy_slope(queries, n6)
            draws.append(
                Synthetics(first, b=1.0, noise=noise, d=_LEGACY_STEP * config.eta * slope.sign())
            )
        else:
            draws.append(Synthetics(first, b=1.0, e=config.eta))
    return draws


def materialise(draws: list[Synthetics], queries: Tensor, queue: Tensor) -> Tensor:
    """Return the unit vectors (B, sum N, D): the slow, plain form of `ClosedForm`, for tests."""
    vectors = []
    for s in draws:
        vector = _column(s.b) * queue[s.first]
        if s.a is not None:
            vector = vector + _column(s.a) * queries[:, None]
        if s.second is not None and s.c is not None:
            vector = vector + _column(s.c) * queue[s.second]
        if s.noise is not None:
            vector = vector + _column(s.d) * s.noise
        if s.e is not None:
            vector = vector + s.e * queries.sign()[:, None]
        vectors.append(torch.nn.functional.normalize(vector, dim=2, eps=_EPS))
    return torch.cat(vectors, dim=1)


class ClosedForm:
    """Logits of one type's synthetics and their gradient by the query, without the vectors."""

    def __init__(
        self,
        synthetics: Synthetics,
        queries: Tensor,
        queue: Tensor,
        similarities: Tensor,
        lengths: Tensor,
    ) -> None:
        """Take queries (B, D), queue (K, D), similarities (B, K) and lengths (K,) of its rows."""
        s = self.synthetics = synthetics
        # No type has more than two terms. So the length needs the square of each and one product.
        u = similarities.gather(1, s.first)
        square = queries.square().sum(1, keepdim=True)
        top = s.b * u
        norm2 = (s.b * lengths[s.first]) ** 2
        if s.a is not None:
            top = top + s.a * square
            norm2 = norm2 + s.a * s.a * square + 2 * s.a * s.b * u
        if s.second is not None and s.c is not None:
            top = top + s.c * similarities.gather(1, s.second)
            norm2 = norm2 + (s.c * lengths[s.second]) ** 2
            norm2 = norm2 + 2 * s.b * s.c * _pair_dots(queue, s.first, s.second)
        if s.noise is not None:
            top = top + s.d * torch.einsum("bnd,bd->bn", s.noise, queries)
            norm2 = norm2 + s.d * s.d * s.noise.square().sum(2)
            norm2 = norm2 + 2 * s.b * s.d * (_rows(queue, s.first) * s.noise).sum(2)
        if s.e is not None:
            sign = queries.sign()
            top = top + s.e * (queries * sign).sum(1, keepdim=True)
            norm2 = norm2 + s.e * s.e * sign.square().sum(1, keepdim=True)
            norm2 = norm2 + 2 * s.b * s.e * torch.einsum("bnd,bd->bn", _rows(queue, s.first), sign)
        # rounding may make a small square negative
        self.norm = norm2.clamp_min(0).sqrt().clamp_min(_EPS)
        self.logits = top / self.norm  # (B, N), before the temperature

    def accumulate(self, weights: Tensor, queue_weights: Tensor, queries: Tensor) -> Tensor:
        """Return the part of sum_j weights_j s_j that is not made of queue entries, (B, D).

        The weights of queue entries are added to `queue_weights` (B, K) in place: one matrix
        product with the queue then serves all negatives. `weights` (B, N) are derivatives by the
        logits.
        """
        # A synthetic is a constant, so the gradient of its logit is the unit vector itself.
        s, w = self.synthetics, weights / self.norm
        # a queue entry may be drawn several times: its weights add up
        queue_weights.scatter_add_(1, s.first, w * s.b)
        direct = torch.zeros_like(queries)
        if s.a is not None:
            direct = direct + (w * s.a).sum(1, keepdim=True) * queries
        if s.second is not None and s.c is not None:
            queue_weights.scatter_add_(1, s.second, w * s.c)
        if s.noise is not None:
            direct = direct + torch.einsum("bn,bnd->bd", w * s.d, s.noise)
        if s.e is not None:
            direct = direct + s.e * w.sum(1, keepdim=True) * queries.sign()
        return direct


def _pick(hard: Tensor, num: int) -> Tensor:
    position = torch.randint(0, hard.shape[1], (hard.shape[0], num), device=hard.device)
    return hard.gather(1, position)


def _pick_two(hard: Tensor, num: int) -> tuple[Tensor, Tensor]:
    position = torch.randint(0, hard.shape[1], (2, hard.shape[0], num), device=hard.device)
    return hard.gather(1, position[0]), hard.gather(1, position[1])


def _uniform(queries: Tensor, num: int) -> Tensor:
    return torch.rand(queries.shape[0], num, 1, dtype=queries.dtype, device=queries.device).squeeze(
        2
    )


def _legacy_slope(queries: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Return random directions (B, N, D) and the slope (B, N) of q . n along them."""
    # a draw for each synthetic, as published: one large draw would give other numbers
    noise = torch.stack([torch.randn_like(queries) for _ in range(num)], dim=1)
    return noise, torch.einsum("bnd,bd->bn", noise, queries)


def _column(value: Tensor | float) -> Tensor | float:
    return value[..., None] if isinstance(value, Tensor) else value


def _rows(queue: Tensor, indices: Tensor) -> Tensor:
    """Return queue rows (B, N, D). `index_select` is several times faster than indexing."""
    return queue.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def _pair_dots(queue: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return dot products (B, N) of pairs of queue rows, in chunks that fit the cache."""
    # A GPU has no such cache and wants few, large calls.
    chunk = _PAIRS_PER_CHUNK if queue.device.type == "cpu" else 128 * _PAIRS_PER_CHUNK
    pairs = zip(first.flatten().split(chunk), second.flatten().split(chunk), strict=True)
    dots = [queue.index_select(0, a).mul_(queue.index_select(0, b)).sum(1) for a, b in pairs]
    return torch.cat(dots).view(first.shape)
