"""Judge features: exact top-k counts, weighted k-NN, few-label probes, and two alarms for collapse.

Accuracies are percentages. Counts are summed before they are divided, so that the number of ranks, the size
of the last batch and the chunking change nothing.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import all_reduce_sum, gather_uneven, keyed_seed, rank, world_size

logger = logging.getLogger("synco")

KNN_KS = (10, 20, 100, 200)
_CHUNK_ELEMENTS = 1 << 26  # similarities held at a time: 256 MiB of float32


class LabelledBatch(Protocol):
    """Describe what evaluation needs of a batch: one view, labels, and places in the data set."""

    @property
    def views(self) -> Sequence[Tensor]:
        """Return the views, (N, 3, S, S) each; only the first is used."""

    @property
    def labels(self) -> Tensor:
        """Return the labels, (N,) int64."""

    @property
    def indices(self) -> Tensor:
        """Return the indices into the data set, (N,) int64."""


def topk_correct(logits: Tensor, labels: Tensor, ks: Sequence[int]) -> Tensor:
    """Count the rows of logits (..., N, C) whose label (N,) is among the k largest: int64 (..., len(ks)).

    Ties go to the smaller class index, NaN ranks above all, a label of -1 is never right; k > C means C.
    """
    known = labels >= 0
    places = labels.clamp(min=0).expand(logits.shape[:-1]).unsqueeze(-1)
    own = logits.gather(-1, places)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    better = (logits > own) | ((logits == own) & (classes < places)) | logits.isnan()
    position = better.sum(-1).masked_fill(~known, logits.shape[-1])
    return torch.stack([(position < min(k, logits.shape[-1])).sum(-1) for k in ks], dim=-1)


def held_out_losses(
    forward: Callable[[list[Tensor]], dict[str, Tensor]], batches: Iterable[list[Tensor]], seed: int
) -> dict[str, float]:
    """Return a method's scalars as ``held_out_<name>``, means over batches of views and over processes.

    Each batch draws from a key of its own, so that two evaluations compare.
    """
    rows: list[dict[str, Tensor]] = []
    for number, views in enumerate(batches):
        torch.manual_seed(keyed_seed("held out", seed, number, rank()))
        rows.append({name: value.float() for name, value in forward(views).items() if value.ndim == 0})
    names = sorted(rows[0])
    means = torch.stack([torch.stack([row[name] for name in names]) for row in rows]).mean(0)
    means = all_reduce_sum(means) / world_size()
    return {f"held_out_{name}": value for name, value in zip(names, means.tolist(), strict=True)}


@torch.no_grad()
def extract_features(
    backbone: Callable[[Tensor], Tensor], batches: Iterable[LabelledBatch]
) -> tuple[Tensor, Tensor]:
    """Return float32 features (M, F) and labels (M,) of all ranks' batches in the order of the data set.

    Samples that several ranks got to fill up their shards count once. The caller sets the eval mode.
    """
    features, labels, indices = [], [], []
    for batch in batches:
        features.append(backbone(batch.views[0]).float())
        labels.append(batch.labels)
        indices.append(batch.indices)
    if not features:
        raise ValueError("no evaluation batch on this rank; use at most as many ranks as there are images")
    device = features[0].device
    order = gather_uneven(torch.cat(indices).to(device))
    order, rows = torch.sort(order, stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = order[1:] != order[:-1]
    rows = rows[first]
    return gather_uneven(torch.cat(features))[rows], gather_uneven(torch.cat(labels).to(device))[rows]


@torch.no_grad()
def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    num_classes: int,
    ks: Sequence[int] = KNN_KS,
    temperature: float = 0.07,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Return for each k the top min(5, C) classes (Q, 5) of queries (Q, D) among the bank (M, D), best first.

    Each of the k nearest by cosine votes exp(similarity / temperature) for its class (Wu et al. 2018,
    arXiv:1805.01978). k > M means M. `chunk` queries are compared at a time, as many as fit if None.
    """
    _check_bank(bank, bank_labels, queries, num_classes)
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    chunk = chunk or max(1, _CHUNK_ELEMENTS // len(bank))
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in queries.split(chunk):
        similarity, nearest = (part @ bank.T).topk(min(max(ks), len(bank)), dim=1)
        # A common factor changes no order, and without it a small temperature overflows.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = bank_labels[nearest]
        for k in ks:
            votes = weights.new_zeros(len(part), num_classes).scatter_add_(1, classes[:, :k], weights[:, :k])
            ranking = votes.sort(dim=1, descending=True, stable=True).indices
            found[k].append(ranking[:, : min(5, num_classes)])
    return {k: torch.cat(parts) for k, parts in found.items()}


def _check_bank(bank: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> None:
    if len(bank) == 0:
        raise ValueError("k-NN needs a bank of labelled features, but it is empty")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"k-NN bank labels run from {low} to {high}, expected 0 to {num_classes - 1} (-1: unlabelled)"
        )
    if not (torch.isfinite(bank).all() and torch.isfinite(queries).all()):
        raise ValueError("features for k-NN hold NaN or infinity; the backbone has diverged or lacks weights")


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    ks: Sequence[int] = KNN_KS,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Return {"knn10_top1": percent, "knn10_top5": percent, ...}; queries may be sharded over ranks."""
    ranking = weighted_knn(bank, bank_labels, queries, num_classes, ks, temperature)
    right = torch.stack([classes == query_labels.unsqueeze(1) for classes in ranking.values()])  # (K, Q, 5)
    total = torch.full((1,), len(queries), device=queries.device)
    counts = all_reduce_sum(torch.cat([right[:, :, 0].sum(1), right.any(2).sum(1), total]))
    top1, top5 = (100.0 * counts[:-1].double().cpu() / counts[-1].item()).view(2, -1).tolist()
    return {
        f"knn{k}_{top}": values[i]
        for i, k in enumerate(ranking)
        for top, values in (("top1", top1), ("top5", top5))
    }


def logistic_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, num_classes: int, l2: float = 1e-2
) -> Tensor:
    """Return logits (Q, C) for test_x (Q, D) of a logistic regression on train_x (N, D), train_y (N,).

    Minimises mean cross-entropy + l2/2 |W|^2, features standardised by train_x; full batch, deterministic.
    """
    mean, scale = _moments(train_x)
    weight, bias = _fit_logistic((train_x.double() - mean) / scale, train_y, num_classes, l2)
    return ((test_x.double() - mean) / scale @ weight + bias).float()


def few_label_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    num_classes: int,
    per_class: int,
    draws: int,
    seed: int,
    l2: float = 1e-2,
) -> tuple[float, float]:
    """Return mean and standard deviation (percent) over `draws` of a probe with `per_class` labels a class.

    Features are standardised by all of train_x, which needs no labels. A draw is a function of
    (seed, per_class, draw).
    """
    mean, scale = _moments(train_x)
    chosen = class_balanced_draws(train_y, num_classes, per_class, draws, seed).to(train_x.device)  # (R, n)
    weight, bias = _fit_logistic((train_x[chosen].double() - mean) / scale, train_y[chosen], num_classes, l2)
    queries = (test_x.double() - mean) / scale
    counts = torch.stack(
        [topk_correct(queries @ w + b, test_y, (1,)) for w, b in zip(weight, bias, strict=True)]
    )
    accuracy = 100.0 * counts.double() / len(test_y)
    return accuracy.mean().item(), accuracy.std().item() if draws > 1 else 0.0


def class_balanced_draws(labels: Tensor, num_classes: int, per_class: int, draws: int, seed: int) -> Tensor:
    """Return indices (draws, num_classes * per_class), `per_class` of each class; ValueError if too few."""
    labels = labels.cpu()
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
    if len(counts) > num_classes or counts.min() < per_class:
        raise ValueError(
            f"cannot draw {per_class} labels of each of {num_classes} classes: class {int(counts.argmin())}"
            f" has {int(counts.min())}, the largest label is {len(counts) - 1}; draw fewer or use more data"
        )
    rows = []
    for draw in range(draws):
        generator = torch.Generator().manual_seed(keyed_seed(seed, per_class, draw))
        order = torch.randperm(len(labels), generator=generator)
        rows.append(torch.cat([order[labels[order] == c][:per_class] for c in range(num_classes)]))
    return torch.stack(rows)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) in float64; a constant feature, which says nothing, gets 1."""
    scale, mean = torch.std_mean(x.double(), dim=0, correction=0)
    return mean, torch.where(scale > 1e-6, scale, torch.ones_like(scale))


def _fit_logistic(x: Tensor, y: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Fit (..., n, D), (..., n) for all leading dimensions at once: weights (..., D, C), biases (..., 1, C).

    With fewer samples than features the solution lies in their span, so that n coordinates are enough.
    """
    x = x.detach()
    basis = torch.linalg.qr(x.mT).Q if x.shape[-2] < x.shape[-1] else None  # (..., D, n)
    inputs = x if basis is None else x @ basis
    weight = inputs.new_zeros(*x.shape[:-2], inputs.shape[-1], num_classes, requires_grad=True)
    bias = inputs.new_zeros(*x.shape[:-2], 1, num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=300,
        tolerance_grad=1e-6,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight + bias
        fit = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum") / x.shape[-2]
        loss = fit + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    step: Any = optimizer.step
    step(closure)
    weight, bias = weight.detach(), bias.detach()
    return (weight if basis is None else basis @ weight), bias


@torch.no_grad()
def effective_rank(embedding: Tensor) -> Tensor:
    """Return the uncentred effective rank of (N, D), a scalar on its device: 1 collapsed, min(N, D) at best.

    RankMe (Garrido et al. 2023, arXiv:2210.02885): the exponential of the entropy of the singular values. Not
    centred, since centring hides a collapse to one point. NaN if the input is not finite. On CUDA the
    decomposition itself waits for the device, so call it when logging.
    """
    values = torch.linalg.svdvals(embedding.float().nan_to_num())
    share = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank = torch.special.entr(share).sum().exp()
    return torch.where(torch.isfinite(embedding).all(), rank, torch.nan)


@torch.no_grad()
def embedding_std(embedding: Tensor) -> Tensor:
    """Return the mean over dimensions of std(z/|z|) * sqrt(D) of (N, D), a scalar on its device.

    About 1 when spread over the sphere, 0 when collapsed (Chen & He 2020, arXiv:2011.10566, section 4.1).
    """
    unit = F.normalize(embedding.float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * embedding.shape[1] ** 0.5


def measure_throughput(
    backbone: Callable[[Tensor], Tensor],
    img_size: int,
    batch_size: int,
    device: torch.device,
    seconds: float = 5.0,
) -> float:
    """Log and return the images/s of ``backbone`` on random images, after a warm-up, in inference."""
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    rate = 0.0
    with torch.inference_mode():
        for budget in (seconds / 5, seconds):  # the first round warms up
            batches, start = 0, time.perf_counter()
            while time.perf_counter() - start < budget:
                backbone(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                batches += 1
            rate = batches * batch_size / (time.perf_counter() - start)
    logger.info("throughput: %.1f images/s at batch size %d, %d px", rate, batch_size, img_size)
    return rate
