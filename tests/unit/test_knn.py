"""k-NN in pieces is k-NN at once, equals included, and needs no more memory for a larger bank."""

import pytest
import torch
import torch.nn.functional as F
from rankings import weighted_knn
from torch import Tensor

import evaluation.features
from benchmarks.common import peak_memory
from evaluation.features import WholeFeatures
from evaluation.knn import features_knn, knn_accuracy, nearest


def plain(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compare everything with everything and sort: of equals the smaller row first."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    ordered = similarity.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def on_a_grid(count: int, dim: int, seed: int) -> Tensor:
    """Return features of which many are parallel or equal, with exact cosines: entries of unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.randint(dim, (count,), generator=generator)
    sign = torch.randint(2, (count, 1), generator=generator) * 2.0 - 1
    return F.one_hot(axis, dim) * sign


@pytest.mark.parametrize("chunk", [1, 3, 7, 40, 1000])
@pytest.mark.parametrize("k", [1, 7, 39, 60, 500])
def test_pieces_give_the_plain_neighbours_with_equals_in_order(chunk: int, k: int) -> None:
    bank, queries = on_a_grid(60, 4, seed=0), on_a_grid(23, 4, seed=1)
    blocks = queries.split(5)
    found = nearest(blocks, bank.split(chunk), k)
    expected = plain(queries, bank, k)
    assert torch.equal(torch.cat([rows for _, rows in found]), expected[1])
    assert torch.equal(torch.cat([similarity for similarity, _ in found]), expected[0])


@pytest.mark.parametrize("chunk", [16, 100])
def test_pieces_give_the_plain_neighbours_of_real_numbers(chunk: int) -> None:
    bank, queries = torch.randn(211, 12), torch.randn(50, 12)
    bank[100:150] = bank[:50]  # images that stand in the set twice
    ((similarity, rows),) = nearest([queries], bank.split(chunk), 20)
    expected = plain(queries, bank, 20)
    torch.testing.assert_close(similarity, expected[0])
    twin = torch.arange(211)
    twin[100:150] = torch.arange(50)
    assert torch.equal(twin[rows], twin[expected[1]])


def test_accuracy_is_the_same_through_features_and_tensors() -> None:
    bank, labels, queries, answers = (
        torch.randn(90, 8),
        torch.randint(4, (90,)),
        torch.randn(31, 8),
        torch.randint(4, (31,)),
    )
    whole = knn_accuracy(bank, labels, queries, answers, 4, (1, 9))
    blocks = WholeFeatures.of(queries, answers).blocks()
    assert features_knn(WholeFeatures.of(bank, labels), blocks, 4, (1, 9)) == whole
    ranking = weighted_knn(bank, labels, queries, 4, (1, 9))
    assert whole["knn9_top1"] == pytest.approx(
        100 * (ranking[9][:, 0] == answers).float().mean().item()
    )


def test_a_selection_votes_as_a_bank_of_its_own() -> None:
    bank, labels = torch.randn(90, 8), torch.randint(4, (90,))
    queries = WholeFeatures.of(torch.randn(31, 8), torch.randint(4, (31,))).blocks()
    chosen = torch.arange(0, 90, 7)
    part = WholeFeatures.of(bank, labels).select(chosen)
    assert part.indices.tolist() == chosen.tolist()
    assert torch.equal(part.at(torch.tensor([2, 0])), bank[[14, 0]])
    alone = WholeFeatures.of(bank[chosen], labels[chosen])
    assert features_knn(part, queries, 4, (3,)) == features_knn(alone, queries, 4, (3,))


def test_a_larger_bank_needs_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation.features, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(evaluation.features, "_TILE_ELEMENTS", 1 << 14)
    queries = WholeFeatures.of(torch.randn(64, 16), torch.randint(4, (64,))).blocks()
    peaks = []
    for size in (1 << 13, 1 << 16):
        bank = WholeFeatures.of(torch.randn(size, 16), torch.randint(4, (size,)))
        peaks.append(
            peak_memory(
                lambda bank=bank: features_knn(bank, queries, 4, (10,)), torch.device("cpu")
            )
        )
    assert peaks[1] <= peaks[0] * 1.1
    assert peaks[1] < (1 << 16) * 16 * 4 / 2**20 / 4  # MiB: a quarter of the bank


def test_no_k_gives_no_accuracy() -> None:
    bank = WholeFeatures.of(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))
    assert features_knn(bank, [(torch.randn(2, 4), torch.zeros(2))], 1, ks=()) == {}


def test_one_processes_bad_queries_are_refused() -> None:
    bank = WholeFeatures.of(torch.randn(9, 4), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="diverged"):
        features_knn(bank, [(torch.full((2, 4), torch.inf), torch.zeros(2))], 2)
