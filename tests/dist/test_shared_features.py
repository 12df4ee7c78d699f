"""Features that processes share give bit-identical neighbours, blocks and files whatever their number."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Pool
from torch import Tensor

import evaluation.feature_cache
import evaluation.features
from utils.distributed import rank, world_size
from utils.batch import Batch
from evaluation.feature_cache import cached_features
from evaluation.features import SharedFeatures, WholeFeatures, compute_features
from evaluation.knn import features_knn, nearest

TOTAL, QUERIES, WIDTH = 203, 61, 24


def images(total: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(total, WIDTH, generator=generator)
    values[total // 2 : total // 2 + 20] = values[:20]  # equals
    return values, torch.randint(5, (total,), generator=generator)


def share(total: int, seed: int, unreadable: int = -1) -> SharedFeatures:
    """Compute this process's features as an evaluation loader deals out images, but for an unreadable one."""
    values, labels = images(total, seed)
    mine = torch.arange(rank(), total, world_size())
    mine = mine[mine != unreadable]
    batches = [Batch([values[part]], labels[part], part) for part in mine.split(16) if len(part)]
    return compute_features(lambda view: view, batches)


def refused_share() -> str:
    with pytest.raises(ValueError, match="a process has no image") as error:
        share(1, 0)
    return str(error.value)


def test_fewer_images_than_processes_are_an_error_of_all(ranks: Pool) -> None:
    """Where one process raised and the others went on, they would wait for it for ever."""
    first, second = ranks.run(refused_share)
    assert first == second


@contextmanager
def small_pieces() -> Iterator[None]:
    saved = evaluation.features._CHUNK_BYTES, evaluation.features._TILE_ELEMENTS
    evaluation.features._CHUNK_BYTES = 4 * WIDTH * 32  # 32 rows
    evaluation.features._TILE_ELEMENTS = 32 * 7  # 7 queries
    try:
        yield
    finally:
        evaluation.features._CHUNK_BYTES, evaluation.features._TILE_ELEMENTS = saved


@small_pieces()
def neighbours() -> tuple[list[int], list[Tensor], dict[str, float], dict[str, float]]:
    bank, blocks = share(TOTAL, 0), share(QUERIES, 1).blocks()
    found = [
        torch.stack([part[0], part[1].float()])
        for part in nearest([b for b, _ in blocks], bank.chunks(), 9)
    ]
    few = bank.select(torch.arange(0, TOTAL, 3))
    accuracies = [features_knn(features, blocks, 5, (1, 9)) for features in (bank, few)]
    return [len(bank.rows), len(blocks)], found, *accuracies


def test_neighbours_are_bit_identical_on_one_and_two_processes(ranks: Pool) -> None:
    (_, alone, *accuracies), pair = neighbours(), ranks.run(neighbours)
    assert [held for held, *_ in pair] == [[102, 5], [101, 4]]  # nobody holds the whole bank
    assert all(torch.equal(mine, pair[i % 2][1][i // 2]) for i, mine in enumerate(alone))
    assert all(other == accuracies for _, _, *other in pair)
    assert 0 < accuracies[0]["knn9_top1"] < 100
    whole = WholeFeatures.of(*images(TOTAL, 0))
    queries = WholeFeatures.of(*images(QUERIES, 1)).blocks()
    assert features_knn(whole, queries, 5, (1, 9)) == accuracies[0]


def stored(folder: Path) -> tuple[Tensor, Tensor]:
    _, labels = images(TOTAL, 0)
    features = cached_features(
        folder, "train", {}, labels, torch.device("cpu"), lambda: share(TOTAL, 0, 77)
    )
    assert isinstance(features, WholeFeatures)
    return features.rows.clone(), features.indices


def test_two_processes_write_the_file_that_one_writes(ranks: Pool, tmp_path: Path) -> None:
    alone = stored(tmp_path / "one")
    for rows, indices in ranks.run(stored, tmp_path / "two"):
        assert torch.equal(rows, alone[0])
        assert torch.equal(indices, alone[1])
    one, two = (next((tmp_path / name).glob("*.npy")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert 77 not in alone[1]


@small_pieces()
def failing(folder: Path) -> str:
    def full(file: Any, features: Any, chunks: Any) -> None:
        next(chunks)
        raise OSError(28, "No space left on device")

    original, evaluation.feature_cache._fill = evaluation.feature_cache._fill, full
    try:
        stored(folder)
    except OSError as error:
        return str(error)
    finally:
        evaluation.feature_cache._fill = original
    return "no error"


def test_a_full_disk_ends_all_processes(ranks: Pool, tmp_path: Path) -> None:
    assert all("No space" in text for text in ranks.run(failing, tmp_path))
    assert not list(tmp_path.glob("*.npy*"))
