"""Judge networks: exact top-k counts, losses on held-out images, throughput.

Accuracies are percentages. Counts are summed before they are divided, so that the number of ranks,
the size of the last batch and the chunking change nothing.
"""

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.precision import Precision
from evaluation.features import compute_features
from utils.batch import Batch
from utils.distributed import all_reduce_sum, rank, world_size
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")


def topk_correct(logits: Tensor, labels: Tensor, ks: Sequence[int]) -> Tensor:
    """Count the rows of logits (..., N, C) whose label (N,) is among the k largest.

    Returns int64 (..., len(ks)). Ties go to the smaller class index, NaN ranks above all, a label
    of -1 is never right; k > C means C.
    """
    known = labels >= 0
    # `gather` has no place -1; those rows are masked below.
    places = labels.clamp(min=0).expand(logits.shape[:-1]).unsqueeze(-1)
    own = logits.gather(-1, places)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    # The classes before the label in the ranking; NaN compares as False, so it is named apart.
    better = (logits > own) | ((logits == own) & (classes < places)) | logits.isnan()
    position = better.sum(-1).masked_fill(~known, logits.shape[-1])
    return torch.stack([(position < min(k, logits.shape[-1])).sum(-1) for k in ks], dim=-1)


def held_out_losses(
    forward: Callable[[list[Tensor]], dict[str, Tensor]], batches: Iterable[list[Tensor]], seed: int
) -> dict[str, float]:
    """Return a method's scalars as `held_out_<name>`: means over batches and processes."""
    rows: list[dict[str, Tensor]] = []
    for number, views in enumerate(batches):
        # Two evaluations draw the same, so that their losses compare.
        torch.manual_seed(keyed_seed("held out", seed, number, rank()))
        rows.append(
            {name: value.float() for name, value in forward(views).items() if value.ndim == 0}
        )
    names = sorted(rows[0])
    means = torch.stack([torch.stack([row[name] for name in names]) for row in rows]).mean(0)
    # All processes have equally many batches of one size: the mean of means is the mean.
    means = all_reduce_sum(means) / world_size()
    return {f"held_out_{name}": value for name, value in zip(names, means.tolist(), strict=True)}


def held_out_names(names: Iterable[str]) -> frozenset[str]:
    """Return the names that `held_out_losses` gives to a method's scalars."""
    return frozenset(f"held_out_{name}" for name in names)


@torch.no_grad()
def extract_features(
    backbone: Callable[[Tensor], Tensor], batches: Iterable[Batch]
) -> tuple[Tensor, Tensor]:
    """Return features (M, F) and labels (M,) of all ranks, in the order of the data set.

    Samples that several ranks got to fill up their shards count once. The caller sets the eval
    mode.
    """
    return compute_features(backbone, batches).whole()


def logistic_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, num_classes: int, l2: float = 1e-2
) -> Tensor:
    """Return logits (Q, C) for test_x (Q, D) of a logistic regression on train_x (N, D).

    Minimises mean cross-entropy + l2/2 |W|^2, features standardised by train_x; full batch,
    deterministic.
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
    """Return mean and standard deviation (percent) of probes with `per_class` labels a class.

    There are `draws` of them; a draw is a function of (seed, per_class, draw).
    """
    # Standardised by all of train_x, which needs no labels.
    mean, scale = _moments(train_x)
    # (R, n)
    chosen = class_balanced_draws(train_y, num_classes, per_class, draws, seed).to(train_x.device)
    weight, bias = _fit_logistic(
        (train_x[chosen].double() - mean) / scale, train_y[chosen], num_classes, l2
    )
    queries = (test_x.double() - mean) / scale
    counts = torch.stack(
        [topk_correct(queries @ w + b, test_y, (1,)) for w, b in zip(weight, bias, strict=True)]
    )
    accuracy = 100.0 * counts.double() / len(test_y)
    return accuracy.mean().item(), accuracy.std().item() if draws > 1 else 0.0


def class_balanced_draws(
    labels: Tensor, num_classes: int, per_class: int, draws: int, seed: int
) -> Tensor:
    """Return indices (draws, num_classes * per_class); `ValueError` if a class has too few."""
    labels = labels.cpu()
    counts = torch.bincount(labels[labels >= 0], minlength=num_classes)
    if len(counts) > num_classes or counts.min() < per_class:
        raise ValueError(
            f"cannot draw {per_class} labels of each of {num_classes} classes: class "
            f"{int(counts.argmin())} has {int(counts.min())}, the largest label is "
            f"{len(counts) - 1}; draw fewer or use more data"
        )
    rows = []
    for draw in range(draws):
        # A generator for each draw: the number of draws changes none of them.
        generator = torch.Generator().manual_seed(keyed_seed(seed, per_class, draw))
        # One order of all images; the first of each class are drawn.
        order = torch.randperm(len(labels), generator=generator)
        rows.append(torch.cat([order[labels[order] == c][:per_class] for c in range(num_classes)]))
    return torch.stack(rows)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (D,) in float64."""
    scale, mean = torch.std_mean(x.double(), dim=0, correction=0)
    # a constant feature says nothing: it is not divided by its deviation of 0
    return mean, torch.where(scale > 1e-6, scale, torch.ones_like(scale))


def _fit_logistic(x: Tensor, y: Tensor, num_classes: int, l2: float) -> tuple[Tensor, Tensor]:
    """Fit (..., n, D), (..., n) for all leading dimensions at once.

    Returns weights (..., D, C) and biases (..., 1, C).
    """
    # With fewer samples than features the solution lies in their span: n coordinates are enough.
    x = x.detach()
    basis = torch.linalg.qr(x.mT).Q if x.shape[-2] < x.shape[-1] else None  # (..., D, n)
    inputs = x if basis is None else x @ basis
    weight = inputs.new_zeros(*x.shape[:-2], inputs.shape[-1], num_classes, requires_grad=True)
    bias = inputs.new_zeros(*x.shape[:-2], 1, num_classes, requires_grad=True)
    # The problem is convex: L-BFGS ends at the optimum, without a rate to choose.
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
        # The sum over all fits of the mean of each: they share a step but not a gradient.
        fit = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum") / x.shape[-2]
        loss = fit + 0.5 * l2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach(), bias.detach()
    return (weight if basis is None else basis @ weight), bias


def measure_throughput(
    run: Precision,
    backbone: nn.Module,
    img_size: int,
    batch_size: int,
    channels: int = 3,
    seconds: float = 5.0,
) -> float:
    """Log and return the images/s of `backbone` on random images, after a warm-up, in inference.

    In the precision of `run`.
    """
    images = torch.randn(batch_size, channels, img_size, img_size, device=run.device)
    rate = 0.0
    with run.evaluating(backbone), torch.inference_mode():
        for budget in (seconds / 5, seconds):  # the first round warms up
            batches, start = 0, time.perf_counter()
            while time.perf_counter() - start < budget:
                backbone(images)
                # Kernels are only queued: without this their launch would be timed.
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                batches += 1
            rate = batches * batch_size / (time.perf_counter() - start)
    logger.info("throughput: %.1f images/s at batch size %d, %d px", rate, batch_size, img_size)
    return rate
