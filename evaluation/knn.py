"""Weighted k-NN over a bank that no process needs to hold: exact, and read in pieces.

Wu et al. 2018, arXiv:1805.01978. Pieces are cut by the width of the features alone, and of equally
similar neighbours the earlier in the bank comes first, so neither processes nor memory change a
vote. On a GPU votes are equal only to the last bits, unless `TRAIN.DETERMINISTIC` is set.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from evaluation.features import Features, WholeFeatures, block_rows
from utils.distributed import all_reduce_sum, any_rank

KNN_KS = (10, 20, 100, 200)
_NOT_FINITE = "features for k-NN hold NaN or infinity; the backbone has diverged or lacks weights"


@torch.no_grad()
def nearest(
    queries: Sequence[Tensor], bank: Iterable[Tensor], k: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the cosines and rows (q, min(k, M)) of the nearest for each block of queries (q, D).

    The bank comes as chunks (m, D) in order. Best first; of equals the smaller row. Raises
    `ValueError` for NaN or infinity, on all processes for one's queries.
    """
    queries = [block.float() for block in queries]
    lengths = [_lengths(block) for block in queries]
    if any_rank(not all(torch.isfinite(length).all() for length in lengths)):
        raise ValueError(_NOT_FINITE)
    queries = [block / length for block, length in zip(queries, lengths, strict=True)]
    best: list[tuple[Tensor, Tensor]] = [
        (
            block.new_empty(len(block), 0),
            torch.empty(len(block), 0, dtype=torch.int64, device=block.device),
        )
        for block in queries
    ]
    seen = 0
    for chunk in bank:
        length = _lengths(chunk)
        if not torch.isfinite(length).all():
            raise ValueError(_NOT_FINITE)
        columns = (chunk / length).T
        for number, block in enumerate(queries):
            # Only the k best of each chunk can be among the k best of all.
            similarity, rows = _top(block @ columns, k)
            similarity = torch.cat([best[number][0], similarity], dim=1)
            rows = torch.cat([best[number][1], rows + seen], dim=1)
            # Earlier rows come first, so a stable sort puts the smaller row first among equals.
            similarity, order = similarity.sort(dim=1, descending=True, stable=True)
            best[number] = similarity[:, :k], rows.gather(1, order[:, :k])
        seen += len(chunk)
    return best


def _lengths(features: Tensor) -> Tensor:
    """Return the norms (n, 1)."""
    # finite where all numbers are, and never 0, by which the features are divided
    return torch.linalg.vector_norm(features, dim=1, keepdim=True).clamp_min(1e-12)


def _top(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest (q, k) and their columns, of equals the smaller column first."""
    # `topk` is free in its choice among equals. One more is asked for, to see where the last place
    # is disputed; such a row is sorted instead.
    k = min(k, similarity.shape[1])
    values, columns = similarity.topk(min(k + 1, similarity.shape[1]), dim=1)
    disputed = values[:, -1] == values[:, k - 1] if values.shape[1] > k else None
    columns, order = columns[:, :k].sort(dim=1)
    values, again = values[:, :k].gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, again)
    if disputed is not None and disputed.any():
        ordered = similarity[disputed].sort(dim=1, descending=True, stable=True)
        values[disputed], columns[disputed] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, columns


def vote(
    similarity: Tensor, classes: Tensor, num_classes: int, ks: Sequence[int], temperature: float
) -> dict[int, Tensor]:
    """Return for each k the top min(5, C) classes (q, 5); a neighbour's vote is exp(cosine / T).

    `similarity` and `classes` (q, max k) are of the neighbours, best first. Ties go to the
    smaller class.
    """
    # A common factor changes no order, and without it a small temperature overflows.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    found = {}
    for k in ks:
        # votes[q, c]: the sum of the weights of those of the k neighbours that are of class c.
        votes = weights.new_zeros(len(weights), num_classes).scatter_add_(
            1, classes[:, :k], weights[:, :k]
        )
        found[k] = votes.sort(dim=1, descending=True, stable=True).indices[:, : min(5, num_classes)]
    return found


def ranking(
    queries: Sequence[Tensor],
    bank: Features,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
    chunk: int | None = None,
) -> list[dict[int, Tensor]]:
    """Return what `vote` gives for each block of queries; `chunk` rows of the bank at a time."""
    if len(bank) == 0:
        raise ValueError("k-NN needs a bank of labelled features, but it is empty")
    low, high = int(bank.labels.min()), int(bank.labels.max())
    # A wrong label would stop `scatter_add_` in CUDA without a word about the label.
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"k-NN bank labels run from {low} to {high}, expected 0 to {num_classes - 1} (-1: "
            "unlabelled)"
        )
    labels = bank.labels.to(bank.device)
    return [
        vote(similarity, labels[rows], num_classes, ks, temperature)
        for similarity, rows in nearest(queries, bank.chunks(chunk), max(ks))
    ]


def features_knn(
    bank: Features,
    queries: Sequence[tuple[Tensor, Tensor]],
    num_classes: int,
    ks: Sequence[int] = KNN_KS,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Return {"knn10_top1": percent, ...} of the queries of all processes.

    `queries` are the blocks of `Features.blocks`. The bank passes by in chunks: beyond what it
    holds of both, a process needs at most about 0.5 GiB, whatever their sizes, and max(ks) numbers
    a query.
    """
    if not ks:
        return {}
    found = ranking([features for features, _ in queries], bank, num_classes, ks, temperature)
    right = torch.zeros(2 * len(ks) + 1, dtype=torch.int64, device=bank.device)
    for top, (_, labels) in zip(found, queries, strict=True):
        hits = torch.stack([top[k] == labels.unsqueeze(1) for k in ks])  # (K, q, 5)
        total = torch.full((1,), len(labels), device=right.device)
        # All k at once: one exchange between the processes for the whole table.
        right += torch.cat([hits[:, :, 0].sum(1), hits.any(2).sum(1), total])
    return _percent(all_reduce_sum(right), ks)


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    ks: Sequence[int] = KNN_KS,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Return what `features_knn` returns for a bank that is whole here; queries may be sharded."""
    size = block_rows(bank.shape[1])
    blocks = list(zip(queries.split(size), query_labels.split(size), strict=True))
    return features_knn(WholeFeatures.of(bank, bank_labels), blocks, num_classes, ks, temperature)


def _percent(counts: Tensor, ks: Sequence[int]) -> dict[str, float]:
    top1, top5 = (100.0 * counts[:-1].double().cpu() / counts[-1].item()).view(2, -1).tolist()
    return {
        f"knn{k}_{top}": values[i]
        for i, k in enumerate(ks)
        for top, values in (("top1", top1), ("top5", top5))
    }
