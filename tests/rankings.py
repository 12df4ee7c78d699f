"""The classes that k-NN ranks for queries that are whole in memory."""

import torch
from torch import Tensor

from evaluation.features import WholeFeatures, block_rows
from evaluation.knn import KNN_KS, ranking


def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    ks: tuple[int, ...] = KNN_KS,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Return for each k the top min(5, C) classes (Q, 5) of queries (Q, D), best first.

    k > M means M. `chunk` rows of either side are compared at a time, as many as fit if None.
    """
    size, whole = chunk or block_rows(bank.shape[1]), WholeFeatures.of(bank, bank_labels)
    found = ranking(list(queries.split(size)), whole, num_classes, ks, temperature, chunk)
    return {k: torch.cat([part[k] for part in found]) for k in ks}
