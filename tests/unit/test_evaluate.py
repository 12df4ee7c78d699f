"""Evaluation counts exactly and agrees with slow and obvious twins."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from rankings import weighted_knn
from torch import Tensor

from engine.collapse import effective_rank, embedding_std
from evaluation.accuracy import (
    _fit_logistic,
    class_balanced_draws,
    extract_features,
    few_label_accuracy,
    logistic_probe,
    topk_correct,
)
from evaluation.knn import knn_accuracy
from utils.batch import Batch


def make_batches(indices: Tensor, size: int) -> list[Batch]:
    """Return batches whose image i is filled with the number i and has the label i % 7."""
    parts = indices.split(size)
    return [
        Batch([part.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)], part % 7, part)
        for part in parts
    ]


def slow_knn(
    bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int, k: int, temperature: float
) -> list:
    """Vote one query at a time, in plain Python and float64."""
    result = []
    for query in queries.double():
        similarity = [
            float(query @ row / (query.norm() * row.norm()).clamp_min(1e-12))
            for row in bank.double()
        ]
        nearest = sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * num_classes
        for i in nearest:
            votes[int(labels[i])] += (
                torch.tensor(similarity[i] / temperature, dtype=torch.float64).exp().item()
            )
        result.append(sorted(range(num_classes), key=lambda c: -votes[c])[: min(5, num_classes)])
    return result


def clusters(
    num: int, dim: int, num_classes: int, noise: float, seed: int = 0, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(99)) * spread
    labels = torch.arange(num) % num_classes
    return centres[labels] + noise * torch.randn(num, dim, generator=generator), labels


def test_topk_counts_match_sorting() -> None:
    logits, labels = torch.randn(200, 9), torch.randint(9, (200,))
    order = logits.argsort(dim=1, descending=True)
    expected = [int((order[:, :k] == labels[:, None]).any(1).sum()) for k in (1, 3, 5, 9)]
    counts = topk_correct(logits, labels, (1, 3, 5, 9))
    assert counts.tolist() == expected
    assert counts.dtype == torch.int64


def test_topk_clips_k_to_the_classes() -> None:
    assert topk_correct(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), (5, 3)).tolist() == [4, 4]


def test_topk_ties_do_not_flatter() -> None:
    assert topk_correct(
        torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), (1, 2, 3)
    ).tolist() == [2, 4, 6]


def test_topk_counts_nan_and_unlabelled_as_wrong() -> None:
    logits = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [0.0, torch.nan], [3.0, 1.0]])
    assert topk_correct(logits, torch.tensor([1, 0, 0, -1]), (1,)).tolist() == [1]


def test_topk_takes_a_grid_of_heads() -> None:
    logits, labels = torch.randn(4, 30, 6), torch.randint(6, (30,))
    grid = topk_correct(logits, labels, (1, 5))
    assert grid.tolist() == [topk_correct(head, labels, (1, 5)).tolist() for head in logits]


def test_features_come_in_the_order_of_the_data_set() -> None:
    shuffled = torch.randperm(23)
    features, labels = extract_features(lambda x: x.mean((2, 3)).half(), make_batches(shuffled, 4))
    assert features[:, 0].tolist() == list(range(23))
    assert labels.tolist() == [i % 7 for i in range(23)]
    assert features.dtype == torch.float32
    assert not features.requires_grad


def test_features_of_padded_shards_count_once() -> None:
    features, labels = extract_features(
        lambda x: x.mean((2, 3)), make_batches(torch.tensor([3, 1, 3, 7, 1]), 2)
    )
    assert features[:, 0].tolist() == [1, 3, 7]
    assert labels.tolist() == [1, 3, 0]


def test_extracting_keeps_no_graph() -> None:
    layer = torch.nn.Linear(3, 2)
    features, _ = extract_features(
        lambda x: layer(x.mean((2, 3))), make_batches(torch.arange(5), 2)
    )
    assert features.grad_fn is None


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="a process has no image"):
        extract_features(lambda x: x, [])


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2
    )
    mine = torch.arange(rank, 101, 2)  # 51 and 50 of 101
    features, labels = extract_features(lambda x: x.mean((2, 3)) ** 0.5, make_batches(mine, 8))
    queries, answers = clusters(101, 6, 4, noise=1.5)
    bank, bank_labels = clusters(60, 6, 4, noise=1.5, seed=1)
    accuracy = knn_accuracy(bank, bank_labels, queries[rank::2], answers[rank::2], 4, ks=(5,))
    torch.save(
        {"features": features, "labels": labels, "accuracy": accuracy}, f"{folder}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


def test_uneven_shards_give_the_single_process_numbers(tmp_path: Path) -> None:
    mp.start_processes(_two_ranks, (str(tmp_path),), nprocs=2, start_method="spawn")
    features, labels = extract_features(
        lambda x: x.mean((2, 3)) ** 0.5, make_batches(torch.arange(101), 8)
    )
    queries, answers = clusters(101, 6, 4, noise=1.5)
    accuracy = knn_accuracy(*clusters(60, 6, 4, noise=1.5, seed=1), queries, answers, 4, ks=(5,))
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(result["features"], features)
        assert torch.equal(result["labels"], labels)
        assert result["accuracy"] == accuracy
    assert 0 < accuracy["knn5_top1"] < 100


@pytest.mark.parametrize(
    ("num_classes", "temperature"), [(10, 0.07), (10, 1.0), (3, 0.07), (10, 1e-3)]
)
def test_knn_agrees_with_the_slow_twin(num_classes: int, temperature: float) -> None:
    bank, labels = clusters(57, 8, num_classes, noise=1.0)
    queries, _ = clusters(23, 8, num_classes, noise=1.0, seed=1)
    fast = weighted_knn(bank, labels, queries, num_classes, (1, 10, 200), temperature)
    for k in (1, 10, 200):
        slow = slow_knn(
            bank, labels, queries, num_classes, k, temperature if temperature > 0.01 else 0.01
        )
        assert fast[k].shape == (23, min(5, num_classes))
        if temperature > 0.01:
            assert fast[k].tolist() == slow
        else:  # the plain form would overflow in float32 here; the nearest neighbour decides
            assert fast[k][:, 0].tolist() == [row[0] for row in fast[1].tolist()]


def test_knn_does_not_depend_on_the_chunk() -> None:
    bank, labels = clusters(50, 8, 5, noise=1.0)
    queries, _ = clusters(31, 8, 5, noise=1.0, seed=1)
    whole = weighted_knn(bank, labels, queries, 5, (7,))
    for chunk in (1, 4, 31, 100):
        assert torch.equal(weighted_knn(bank, labels, queries, 5, (7,), chunk=chunk)[7], whole[7])


def test_knn_ignores_the_lengths_of_features() -> None:
    bank, labels = clusters(50, 8, 5, noise=1.0)
    queries, _ = clusters(31, 8, 5, noise=1.0, seed=1)
    scaled = weighted_knn(bank * torch.rand(50, 1).add(0.1), labels, queries * 1e3, 5, (7,))
    assert torch.equal(scaled[7], weighted_knn(bank, labels, queries, 5, (7,))[7])


def test_knn_refuses_bad_banks() -> None:
    bank, labels = clusters(10, 4, 2, noise=1.0)
    with pytest.raises(ValueError, match="unlabelled"):
        weighted_knn(bank, labels - 1, bank, 2)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        weighted_knn(bank, labels + 1, bank, 2)
    with pytest.raises(ValueError, match="diverged"):
        weighted_knn(bank * torch.nan, labels, bank, 2)
    with pytest.raises(ValueError, match="empty"):
        weighted_knn(bank[:0], labels[:0], bank, 2)


def test_knn_accuracy_is_the_exact_share() -> None:
    bank, labels = clusters(60, 6, 8, noise=1.5)
    queries, answers = clusters(37, 6, 8, noise=1.5, seed=1)
    accuracy = knn_accuracy(bank, labels, queries, answers, 8, ks=(1, 10))
    assert list(accuracy) == ["knn1_top1", "knn1_top5", "knn10_top1", "knn10_top5"]
    for k in (1, 10):
        slow = slow_knn(bank, labels, queries, 8, k, 0.07)
        pairs = list(zip(slow, answers.tolist(), strict=True))
        assert accuracy[f"knn{k}_top1"] == pytest.approx(
            100 * sum(a == row[0] for row, a in pairs) / 37
        )
        assert accuracy[f"knn{k}_top5"] == pytest.approx(
            100 * sum(a in row for row, a in pairs) / 37
        )


def test_logistic_probe_reaches_the_optimum() -> None:
    x, y = clusters(80, 5, 3, noise=1.0)
    z = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    weight = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):  # plain gradient descent
        loss = F.cross_entropy(z @ weight + bias, y) + 0.5 * 0.1 * weight.square().sum()
        for parameter, grad in zip(
            (weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True
        ):
            parameter.data -= 0.5 * grad
    expected = (z @ weight + bias).log_softmax(1)
    torch.testing.assert_close(
        logistic_probe(x, y, x, 3, l2=0.1).log_softmax(1).double(),
        expected.detach(),
        atol=1e-4,
        rtol=0,
    )


def test_logistic_probe_has_zero_gradient_with_more_features_than_samples() -> None:
    """The shortcut through the span of the samples solves the same problem."""
    x, y = clusters(12, 40, 3, noise=1.0)
    test_x, _ = clusters(9, 40, 3, noise=1.0, seed=1)
    # 24 < 40, rank deficient
    logits = logistic_probe(torch.cat([x, x]), torch.cat([y, y]), test_x, 3)
    direct = logistic_probe(x.repeat(4, 1), y.repeat(4), test_x, 3)  # 48 > 40: no shortcut
    torch.testing.assert_close(logits.log_softmax(1), direct.log_softmax(1), atol=1e-4, rtol=0)


def test_logistic_probe_is_deterministic_and_survives_constant_features() -> None:
    x, y = clusters(30, 6, 3, noise=0.3)
    x[:, 2] = 7.0
    first = logistic_probe(x, y, x, 3)
    assert torch.equal(first, logistic_probe(x, y, x, 3))
    assert topk_correct(first, y, (1,)).item() == 30


def test_logistic_probe_works_inside_no_grad() -> None:
    x, y = clusters(30, 6, 3, noise=0.3)
    with torch.no_grad():
        assert topk_correct(logistic_probe(x, y, x, 3), y, (1,)).item() == 30


def test_draws_are_balanced_and_keyed() -> None:
    labels = torch.cat([torch.arange(60) % 3, torch.full((9,), -1)])
    draws = class_balanced_draws(labels, 3, 4, 5, seed=1)
    assert draws.shape == (5, 12)
    for row in draws:
        assert len(set(row.tolist())) == 12
        assert torch.bincount(labels[row], minlength=3).tolist() == [4, 4, 4]
    assert torch.equal(draws[:2], class_balanced_draws(labels, 3, 4, 2, seed=1))
    assert not torch.equal(draws, class_balanced_draws(labels, 3, 4, 5, seed=2))
    assert len({tuple(row.tolist()) for row in draws}) == 5


def test_draws_refuse_too_few_labels() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    with pytest.raises(ValueError, match=r"class 2 has 1"):
        class_balanced_draws(labels, 3, 2, 1, seed=0)
    with pytest.raises(ValueError, match="largest label is 2"):
        class_balanced_draws(labels, 2, 1, 1, seed=0)


def test_few_label_accuracy_matches_single_draws() -> None:
    train_x, train_y = clusters(200, 64, 4, noise=2.5)
    test_x, test_y = clusters(103, 64, 4, noise=2.5, seed=1)
    mean, std = few_label_accuracy(
        train_x, train_y, test_x, test_y, 4, per_class=3, draws=6, seed=0
    )
    scale, centre = torch.std_mean(train_x, dim=0, correction=0)
    singles = []
    for row in class_balanced_draws(train_y, 4, 3, 6, seed=0):
        x, y = (train_x[row] - centre) / scale, train_y[row]
        weight = torch.zeros(64, 4, requires_grad=True)
        bias = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

        def closure(x=x, y=y, weight=weight, bias=bias, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(x @ weight + bias, y) + 0.005 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        logits = (test_x - centre) / scale @ weight + bias
        singles.append(100 * topk_correct(logits, test_y, (1,)).item() / 103)
    assert mean == pytest.approx(torch.tensor(singles).mean().item(), abs=0.5)
    assert std == pytest.approx(torch.tensor(singles).std().item(), abs=0.5)
    assert 30 < mean < 100


def test_draws_fitted_together_equal_draws_fitted_alone() -> None:
    x, y = torch.randn(4, 15, 6, dtype=torch.float64), torch.randint(3, (4, 15))
    weights, biases = _fit_logistic(x, y, 3, l2=0.1)
    for i in range(4):
        weight, bias = _fit_logistic(x[i], y[i], 3, l2=0.1)
        torch.testing.assert_close(weights[i], weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            biases[i] - biases[i].mean(), bias - bias.mean(), atol=1e-4, rtol=0
        )


def test_few_labels_one_draw_has_no_spread() -> None:
    x, y = clusters(40, 8, 4, noise=0.1)
    assert few_label_accuracy(x, y, x, y, 4, per_class=1, draws=1, seed=0) == (100.0, 0.0)


def test_effective_rank_counts_directions() -> None:
    eye = torch.eye(6)
    assert effective_rank(eye).item() == pytest.approx(6, abs=1e-4)
    assert effective_rank(eye[:3].repeat(5, 1)).item() == pytest.approx(3, abs=1e-4)
    # the entropy of 3/4 and 1/4
    uneven = effective_rank(torch.diag(torch.tensor([3.0, 1.0]))).item()
    assert uneven == pytest.approx(4 / 3**0.75, abs=1e-4)
    assert effective_rank(torch.ones(10, 6)).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.randn(500, 32)).item() > 30


def test_effective_rank_sees_a_collapse_to_one_point_that_centring_hides() -> None:
    collapsed = torch.ones(200, 32) + 1e-3 * torch.randn(200, 32)
    assert effective_rank(collapsed).item() < 1.5
    assert effective_rank(collapsed - collapsed.mean(0)).item() > 25


def test_effective_rank_of_nothing_finite_is_nan() -> None:
    assert effective_rank(torch.full((3, 2), torch.inf)).isnan()
    assert effective_rank(torch.zeros(3, 2)).isfinite()


def test_embedding_std_is_one_when_spread_and_zero_when_collapsed() -> None:
    assert embedding_std(torch.randn(4096, 64)).item() == pytest.approx(1.0, abs=0.02)
    assert embedding_std(100 * torch.randn(4096, 64)).item() == pytest.approx(1.0, abs=0.02)
    assert embedding_std(torch.ones(50, 64) * torch.rand(50, 1)).item() == pytest.approx(
        0.0, abs=1e-4
    )


def test_alarms_stay_on_the_device_and_out_of_the_graph() -> None:
    z = torch.randn(16, 8, dtype=torch.bfloat16, requires_grad=True)
    for value in (effective_rank(z), embedding_std(z)):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert not value.requires_grad
