"""What is compared in a report: raw pixels, the random and the trained backbone, with scores."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data import evaluation_loader
from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.sources.base import Source, subset
from engine.run import Run
from evaluation.accuracy import few_label_accuracy, logistic_probe, topk_correct
from evaluation.features import compute_features, counted
from evaluation.knn import knn_accuracy
from models import online_backbone
from models.weights.load import load_network
from tools.parts.report.score_table import (
    DRAWS,
    FEW_LABELS,
    KNN_K,
    MANY_IMAGES,
    PIXEL_COMPONENTS,
    PIXEL_SIDE,
    Scores,
)
from utils.checkpoints.foreign import read_torch
from utils.randomness import keyed_seed

TRAINED, RANDOM, PIXELS = "trained backbone", "random backbone", "raw pixels"


class Split(NamedTuple):
    """One representation of both splits: features (N, F) and labels (N,), all on the CPU."""

    bank: Tensor
    bank_labels: Tensor
    queries: Tensor
    query_labels: Tensor


def representations(
    run: Run, train: Source, val: Source, path: Path, in_train: bool = False
) -> tuple[dict[str, Split], Source, Source]:
    """Return raw pixels, features of the random and of the trained backbone, and both splits.

    The splits are without the training images that cannot be read. `in_train`: val is a part of
    the training images too.
    """
    backbone = run.prepare(build_online(run.cfg))
    random, *read = extract(run, train, val, backbone, RANDOM, (True, in_train))
    train, val = (
        source if len(source) == len(kept) else subset(source, kept)
        for source, kept in zip((train, val), read, strict=True)
    )
    load_network(backbone, read_torch(path), str(path))
    splits = {
        PIXELS: pixel_split(run, train, val),
        RANDOM: random,
        TRAINED: extract(run, train, val, backbone, TRAINED)[0],
    }
    return splits, train, val


def build_online(cfg: CfgNode) -> nn.Module:
    """Build the run's backbone as pretraining does, with its weights of step 0."""
    torch.manual_seed(keyed_seed("model", cfg.SEED))  # as start_run does before anything is built
    return online_backbone(cfg)


def raw_pixels(images: Tensor) -> Tensor:
    """Turn normalised images (N, 3, S, S) into levels (N, F) in [0, 1], made small."""
    mean, std = (
        torch.tensor(v, device=images.device).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    if images.shape[-1] > PIXEL_SIDE:
        size = (PIXEL_SIDE, PIXEL_SIDE)
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    return (images * std + mean).flatten(1)


def pixel_split(run: Run, train: Source, val: Source) -> Split:
    """Return raw pixels minus the mean training image."""
    # the cosine of plain levels would compare little but brightness
    split = extract(run, train, val, raw_pixels, PIXELS)[0]
    # three equal channels would only cost time
    width = split.bank.shape[1] // 3 if _is_grey(split.bank) else split.bank.shape[1]
    bank, queries = split.bank[:, :width], split.queries[:, :width]
    mean = bank.mean(0)
    split = split._replace(bank=bank - mean, queries=queries - mean)
    return split if len(train) <= MANY_IMAGES else principal(split, PIXEL_COMPONENTS)


def principal(split: Split, num: int) -> Split:
    """Project centred features on the ``num`` principal components of the bank."""
    # eigh sorts upwards, so the largest are the last
    axes = torch.linalg.eigh(split.bank.T @ split.bank).eigenvectors[:, -num:]
    return split._replace(bank=split.bank @ axes, queries=split.queries @ axes)


def _is_grey(levels: Tensor) -> bool:
    """Tell whether the three channels of (N, 3 * S * S) are equal: one of them says it all."""
    channels = levels.unflatten(1, (3, -1))
    return bool((channels - channels[:, :1]).abs().max() < 1e-3)


def extract(
    run: Run,
    train: Source,
    val: Source,
    backbone: Callable[[Tensor], Tensor],
    name: str,
    skip: tuple[bool, bool] = (False, False),
) -> tuple[Split, Tensor, Tensor]:
    """Return the features of both splits under the evaluation view, and which images they are of.

    `name` is for people. `skip`: whether unreadable images of a split are left out, as training
    leaves them out; else they are an error.
    """
    parts: list[Tensor] = []
    read: list[Tensor] = []
    size = run.cfg.LINEAR.BATCH_SIZE
    with run.evaluating(backbone if isinstance(backbone, nn.Module) else nn.Identity()):
        for source, may_lack in zip((train, val), skip, strict=True):
            batches = evaluation_loader(run.cfg, source, run.device, size, may_lack)
            shown = counted(f"features: {name}", batches, len(source))
            features = compute_features(backbone, shown)
            parts += (tensor.cpu() for tensor in features.whole())
            read.append(features.indices)
    return Split(*parts), read[0], read[1]


def evaluate(split: Split, num_classes: int, seed: int, temperature: float) -> Scores:
    """Return the columns of a row; None where a class has too few images to draw from."""
    bank, labels, queries, answers = split
    logits = logistic_probe(bank, labels, queries, num_classes)
    scores: Scores = {
        "knn": (_knn(split, num_classes, KNN_K, temperature), None),
        "linear": (100.0 * int(topk_correct(logits, answers, (1,))) / len(answers), None),
    }
    fewest = int(labels.bincount(minlength=num_classes).min())
    for count in FEW_LABELS:
        enough = fewest >= count
        scores[f"labels{count}"] = (
            few_label_accuracy(*split, num_classes, count, DRAWS, seed) if enough else None
        )
    return scores


def knn_levels(
    splits: Mapping[str, Split], num_classes: int, k: int, temperature: float
) -> dict[str, float]:
    """Return the k-NN accuracy of each split, in percent."""
    return {name: _knn(split, num_classes, k, temperature) for name, split in splits.items()}


def _knn(split: Split, num_classes: int, k: int, temperature: float) -> float:
    return knn_accuracy(*split, num_classes, (k,), temperature)[f"knn{k}_top1"]
