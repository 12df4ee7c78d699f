"""Measure ratios in one run: both sides interleaved, medians over rounds; the last line is JSON.

python tools/benchmark.py loss         SynCo in closed form against materialised vectors and against MoCo
python tools/benchmark.py corruption   SiT's corruption of a batch at once against a loop over its images

On a CPU times are thread CPU time on one thread, so a busy neighbour changes little; on a GPU, device events.
The reference side is our own plain transcription of the published computation.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.parts.corruption import corrupt_at_once, corrupt_plain, draw_corruption
from models.parts.losses import queue_contrast
from models.parts.negatives import SyntheticConfig, Synthetics, draw_synthetics, hardest, materialise


class Side(NamedTuple):
    """One of the things that are compared."""

    name: str
    run: Callable[[], object]


def measure(sides: list[Side], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time every side once a round, in turn, after one untimed round; milliseconds by side."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            elapsed = _time_once(side.run, device)
            if number:
                times[side.name].append(elapsed)
    return times


def _time_once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    begin = time.thread_time()
    run()
    return (time.thread_time() - begin) * 1e3


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the median over rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """Return the most memory (MiB) that ``run`` held at once, beyond what existed before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


# ---- loss --------------------------------------------------------------------------------------------------


def published_loss(
    queries: Tensor, keys: Tensor, queue: Tensor, temperature: float, config: SyntheticConfig | None
) -> Tensor:
    """Compute the loss the published way: queue clone, one concatenation a type, an autograd call a
    synthetic.
    """
    queue = queue.clone().detach()
    positive = torch.einsum("nc,nc->n", queries, keys)[:, None]
    negatives = torch.einsum("nc,kc->nk", queries, queue)
    logits = torch.cat([positive, negatives], dim=1)
    if config is not None:
        fixed = queries.detach()
        for draw in draw_synthetics(config, hardest(negatives.clone().detach(), config.num_hard), fixed):
            vectors = _vectors_with_loops(draw, fixed, queue)
            logits = torch.cat([logits, torch.einsum("bd,bnd->bn", queries, vectors)], dim=1)
    labels = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    return F.cross_entropy(logits / temperature, labels)


def _vectors_with_loops(draw: Synthetics, queries: Tensor, queue: Tensor) -> Tensor:
    if not isinstance(draw.a, float) and draw.e is None:
        return materialise([draw], queries, queue)
    vectors = []
    for column in draw.first.T:  # the gradient of a dot product, asked of autograd one synthetic at a time
        negative = queue[column].clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((queries * negative).sum(), negative)
        move = draw.a * slope if isinstance(draw.a, float) else (draw.e or 0.0) * slope.sign()
        vectors.append(F.normalize(negative.detach() + move, dim=1))
    return torch.stack(vectors, dim=1)


def benchmark_loss(args: argparse.Namespace) -> dict[str, float]:
    """Compare four losses, forward and backward: MoCo and SynCo, published way and ours."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    unit = lambda *shape: F.normalize(torch.randn(*shape, device=device), dim=1)  # noqa: E731
    queries, keys, queue = (
        unit(args.batch, args.dim).requires_grad_(),
        unit(args.batch, args.dim),
        unit(args.queue, args.dim),
    )
    config = SyntheticConfig(args.num_hard, tuple(args.counts))

    def side(name: str, ours: bool, synthetics: SyntheticConfig | None) -> Side:
        def run() -> None:
            if ours:
                loss = queue_contrast(queries, keys, queue, 0.2, synthetics).loss
            else:
                loss = published_loss(queries, keys, queue, 0.2, synthetics)
            loss.backward()
            queries.grad = None

        return Side(name, run)

    sides = [
        side("MoCo, published way", False, None),
        side("MoCo, ours", True, None),
        side("SynCo, materialised", False, config),
        side("SynCo, closed form", True, config),
    ]
    times = measure(sides, args.rounds, device)
    memory = {s.name: peak_memory(s.run, device) for s in sides}
    print(
        f"B {args.batch}, K {args.queue}, D {args.dim}, hard {args.num_hard}, counts {args.counts}, {device}"
    )
    for s in sides:
        print(f"{s.name:22s} {statistics.median(times[s.name]):9.1f} ms  {memory[s.name]:8.1f} MiB")
    return {
        "moco_speedup": ratio(times, "MoCo, published way", "MoCo, ours"),
        "moco_memory_ratio": memory["MoCo, ours"] / memory["MoCo, published way"],
        "synco_speedup": ratio(times, "SynCo, materialised", "SynCo, closed form"),
        "synco_memory_ratio": memory["SynCo, closed form"] / memory["SynCo, materialised"],
        "synco_over_moco": ratio(times, "SynCo, closed form", "MoCo, ours"),
    }


# ---- corruption --------------------------------------------------------------------------------------------


def benchmark_corruption(args: argparse.Namespace) -> dict[str, float]:
    """Compare SiT's corruption of a batch, drawing included, on several image sizes."""
    device, result = torch.device(args.device), {}
    for size in args.sizes:
        torch.manual_seed(0)
        images = torch.randn(args.batch, 3, size, size, device=device)

        def side(name: str, function: Callable[..., Tensor], images: Tensor = images) -> Side:
            def run() -> None:
                drawn = draw_corruption(len(images), *images.shape[-2:])
                function(images, drawn, torch.randn_like(images))

            return Side(name, run)

        sides = [side("a loop over images", corrupt_plain), side("all at once", corrupt_at_once)]
        times = measure(sides, args.rounds, device)
        result[f"corruption_speedup_{size}"] = ratio(times, sides[0].name, sides[1].name)
        for each in sides:
            median = statistics.median(times[each.name])
            print(f"{args.batch} images of {size}: {each.name:20s} {median:9.1f} ms")
    return result


def main() -> None:
    """Run one benchmark; print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="contrastive losses, forward and backward")
    loss.add_argument("--batch", type=int, default=256)
    loss.add_argument("--queue", type=int, default=65536)
    loss.add_argument("--dim", type=int, default=128)
    loss.add_argument("--num-hard", type=int, default=1024)
    loss.add_argument("--counts", type=int, nargs=6, default=[256, 256, 256, 64, 64, 64])
    loss.set_defaults(function=benchmark_loss)
    corruption = commands.add_parser("corruption", help="SiT's corruption of a batch")
    corruption.add_argument("--batch", type=int, default=72)
    corruption.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])
    corruption.set_defaults(function=benchmark_corruption)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = args.function(args)
    machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU, 1 thread"
    print(
        json.dumps(
            {**{k: round(v, 3) for k, v in result.items()}, "machine": machine, "torch": torch.__version__}
        )
    )


if __name__ == "__main__":
    main()
