"""Contrastive losses with and without synthetic negatives: the published computation and ours."""

import argparse
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Side, measure, peak_memory, ratio
from models.parts.losses import queue_contrast
from models.parts.negatives import (
    SyntheticConfig,
    Synthetics,
    draw_synthetics,
    hardest,
    materialise,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--queue", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--num-hard", type=int, default=1024)
    parser.add_argument("--counts", type=int, nargs=6, default=[256, 256, 256, 64, 64, 64])


def published_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, config: SyntheticConfig | None
) -> Tensor:
    """Compute the loss the published way: clone, concatenate, ask autograd for each synthetic."""
    # as published: the queue changes after the step, so the graph needs a copy
    queue = queue.clone().detach()
    positive = torch.einsum("nc,nc->n", queries, keys)[:, None]
    negatives = torch.einsum("nc,kc->nk", queries, queue)
    logits = torch.cat([positive, negatives], dim=1)
    if config is not None:
        fixed = queries.detach()
        hard = hardest(negatives.clone().detach(), config.num_hard)
        for draw in draw_synthetics(config, hard, fixed):
            vectors = _vectors_with_loops(draw, fixed, queue)
            logits = torch.cat([logits, torch.einsum("bd,bnd->bn", queries, vectors)], dim=1)
    labels = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(logits / temperature, labels)


def _vectors_with_loops(draw: Synthetics, queries: Tensor, queue: Tensor) -> Tensor:
    if not isinstance(draw.a, float) and draw.e is None:
        return materialise([draw], queries, queue)
    vectors = []
    # the gradient of a dot product, asked of autograd one synthetic at a time
    for column in draw.first.T:
        negative = queue[column].clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((queries * negative).sum(), negative)
        move = draw.a * slope if isinstance(draw.a, float) else (draw.e or 0.0) * slope.sign()
        vectors.append(F.normalize(negative.detach() + move, dim=1))
    return torch.stack(vectors, dim=1)


def _unit(rows: int, dim: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(rows, dim, device=device), dim=1)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare four losses, forward and backward: MoCo and SynCo, published way and ours."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    queries = _unit(args.batch, args.dim, device).requires_grad_()
    keys = _unit(args.batch, args.dim, device)
    queue = _unit(args.queue, args.dim, device)
    config = SyntheticConfig(args.num_hard, tuple(args.counts))

    def side(name: str, ours: bool, synthetics: SyntheticConfig | None) -> Side:
        def once() -> None:
            if ours:
                loss = queue_contrast(queries, keys, queue, 0.2, synthetics).loss
            else:
                loss = published_loss(queries, keys, queue, 0.2, synthetics)
            loss.backward()
            # Else the next backward would add to it.
            queries.grad = None

        return Side(name, once)

    sides = [
        side("MoCo, published way", False, None),
        side("MoCo, ours", True, None),
        side("SynCo, materialised", False, config),
        side("SynCo, closed form", True, config),
    ]
    times = measure(sides, args.rounds, device)
    memory = {s.name: peak_memory(s.run, device) for s in sides}
    sizes = f"B {args.batch}, K {args.queue}, D {args.dim}, hard {args.num_hard}"
    print(f"{sizes}, counts {args.counts}, {device}")
    for s in sides:
        print(f"{s.name:22s} {statistics.median(times[s.name]):9.1f} ms  {memory[s.name]:8.1f} MiB")
    return {
        "moco_speedup": ratio(times, "MoCo, published way", "MoCo, ours"),
        "moco_memory_ratio": memory["MoCo, ours"] / memory["MoCo, published way"],
        "synco_speedup": ratio(times, "SynCo, materialised", "SynCo, closed form"),
        "synco_memory_ratio": memory["SynCo, closed form"] / memory["SynCo, materialised"],
        "synco_over_moco": ratio(times, "SynCo, closed form", "MoCo, ours"),
    }
