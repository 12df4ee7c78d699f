"""The linear probe (a grid of learning rates over a single one) and k-NN in pieces or at once."""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Side, autocast, measure, peak_memory, ratio, show
from engine.guards import FiniteGuard
from engine.loop import forward_and_backward, set_rates, update
from engine.optim import build_optimizer
from engine.plan import make_plan
from engine.state import TrainState
from evaluation.features import WholeFeatures
from evaluation.knn import features_knn, vote
from evaluation.probe import grid_points, head_accuracies
from models import framework_options
from models.classifier import LinearHeads, freeze, grid_loss
from models.parts.backbones import build_backbone
from utils.batch import Batch
from utils.config.load import load_config
from utils.config.schema import declare

_EVALUATED = 5  # training images for each of the val split: CIFAR's share, ImageNet's is 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a probe and its k-NN are measured on."""
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rates", type=int, default=13, help="learning rates of the grid")
    parser.add_argument("--steps", type=int, default=2, help="of an epoch")
    parser.add_argument("--bank", type=int, default=100_000, help="features of the k-NN's bank")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=512, help="of the k-NN's features")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare grids, on images and on features that are there already, then two k-NNs."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    return {**_grids(args, device), **_neighbours(args, device)}


# ---- grids ---------------------------------------------------------------------------------------


def _grids(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    backbone = freeze(build_backbone(name=args.backbone, img_size=args.size))
    backbone = backbone.to(device).to(memory_format=torch.channels_last)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    kept = torch.randn(args.batch, backbone.num_features, device=device)

    precision = "bf16" if device.type == "cuda" else "fp32"

    def look() -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            return backbone(images).float()

    counts = {"one rate": 1, f"{args.rates} rates": args.rates}
    sides = [
        Side(f"{name}, {what}", _epoch(args, count, backbone.num_features, features, device))
        for what, features in (("images", look), ("features", lambda: kept))
        for name, count in counts.items()
    ]
    times = measure(sides, args.rounds, device)
    print(
        f"{args.backbone}, {args.size} px, {precision}, {args.classes} classes, epochs of "
        f"{args.steps} steps of {args.batch} images, one evaluated for {_EVALUATED} trained on"
    )
    show(times)
    one, grid = counts
    return {
        "grid_cost": ratio(times, f"{grid}, images", f"{one}, images"),
        "grid_cost_cached": ratio(times, f"{grid}, features", f"{one}, features"),
    }


def _epoch(
    args: argparse.Namespace,
    rates: int,
    width: int,
    look: Callable[[], Tensor],
    device: torch.device,
) -> Callable[[], None]:
    """Return an epoch of main_linear.py but for the images: heads, steps and evaluation."""
    lrs = [0.01 * 1.5**number for number in range(rates)]
    linear = load_config(declare(framework_options()), flags={"LINEAR.LRS": lrs}).LINEAR
    points, total = grid_points(linear), args.steps * args.batch
    heads = LinearHeads(width, args.classes, rates).to(device)
    groups = [
        {"params": list(pair), "rate": point.rate, "weight_decay": point.weight_decay}
        for pair, point in zip(heads.pairs(), points, strict=True)
    ]
    optimizer = build_optimizer(linear.OPTIM, groups)
    state = TrainState(heads, optimizer, heads, clip_groups=heads.pairs())
    plan = make_plan(
        linear.OPTIM,
        linear.SCHEDULE,
        epochs=1,
        steps_per_epoch=args.steps,
        global_batch=args.batch,
        base_rates=lrs,
    )
    labels = torch.randint(args.classes, (args.batch,), device=device)
    batch = Batch([], labels, torch.arange(args.batch))
    queries = torch.randn(max(1, total // _EVALUATED), width, device=device)
    blocks = [(queries, torch.randint(args.classes, (len(queries),), device=device))]

    def step(batch: Batch, progress: object) -> dict[str, Tensor]:
        return {"loss": grid_loss(state.model(look()), batch.labels).sum()}

    def epoch() -> None:
        guard = FiniteGuard()
        for number in range(args.steps):
            set_rates(optimizer, plan, number)
            forward_and_backward(state, [batch], step, plan.progress(number))
            update(state, plan, guard, [batch])
        head_accuracies(heads, blocks, dict(enumerate(points)))

    return epoch


# ---- k-NN ----------------------------------------------------------------------------------------


def knn_at_once(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, num_classes: int, k: int
) -> float:
    """Return percent top-1 with the whole bank on the device."""
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    right = 0
    size = max(1, (1 << 26) // len(bank))  # 2**26 similarities at a time
    for part, target in zip(queries.split(size), labels.split(size), strict=True):
        similarity, rows = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        ranking = vote(similarity, bank_labels[rows], num_classes, (k,), 0.07)[k]
        right += int((ranking[:, 0] == target).sum())
    return 100.0 * right / len(queries)


def _neighbours(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    host, labels = torch.randn(args.bank, args.width), torch.randint(args.classes, (args.bank,))
    queries = torch.randn(args.queries, args.width, device=device)
    answers = torch.randint(args.classes, (args.queries,), device=device)
    shared = WholeFeatures(host, labels, torch.arange(args.bank), device)
    blocks = WholeFeatures.of(queries, answers).blocks()

    def at_once() -> float:  # as features come from a network: on the device
        return knn_at_once(host.to(device), labels.to(device), queries, answers, args.classes, 200)

    def in_pieces() -> float:
        return features_knn(shared, blocks, args.classes, (200,))["knn200_top1"]

    # both must find the same; the last digit of a similarity may differ
    assert abs(at_once() - in_pieces()) < 0.5
    sides = [Side("k-NN at once", at_once), Side("k-NN in pieces", in_pieces)]
    times = measure(sides, args.rounds, device)
    memory = {side.name: peak_memory(side.run, device) for side in sides}
    print(f"{args.queries} queries, a bank of {args.bank} x {args.width}, k 200")
    for name, values in times.items():
        print(f"{name:20s} {statistics.median(values):9.1f} ms  {memory[name]:8.1f} MiB")
    first, second = (side.name for side in sides)
    return {
        "knn_speedup": ratio(times, first, second),
        "knn_memory_ratio": memory[second] / memory[first],
    }
