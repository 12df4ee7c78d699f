"""A table for one machine: images a second, waiting for data and memory of each method.

A step is that of a training run: two views, the target's average, SGD, channels last, the precision
that suits the device. `bare` repeats one batch that is ready; `with data` takes the next one.
"""

import argparse
import statistics
from typing import NamedTuple

import torch

from benchmarks.common import measure, peak_memory, ratio, repeated
from benchmarks.training.step import framework_of, method_step
from benchmarks.training.supply import batches, images_of, views_of
from data.augment.recipes import build_recipe
from data.sources.base import Source
from engine.precision import resolve_precision
from models import FRAMEWORKS


class Cell(NamedTuple):
    """What was measured of one method over one backbone."""

    images_per_s: float
    bare_images_per_s: float
    wait_share: float
    peak_gib: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add methods, backbones, data and sizes."""
    add = parser.add_argument
    add("--methods", nargs="+", choices=list(FRAMEWORKS), default=list(FRAMEWORKS))
    add("--backbones", nargs="+", default=["resnet50", "vit_small", "swin_tiny"])
    add("--data", default="", metavar="FOLDER", help="of class folders, with train/ inside")
    add("--size", type=int, default=224, help="of the views, in pixels")
    add("--batch", type=int, default=128)
    add("--steps", type=int, default=2, help="a round")
    add("--workers", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Measure cell by cell; bare and real steps take turns within a cell."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    source = images_of(args.data, "", 4 * args.batch, args.size)
    result: dict[str, float] = {}
    precision = resolve_precision("auto", device)
    print(f"{len(source)} images, {args.size} px, batch {args.batch}, {precision}")
    print(f"{'backbone':12s} {'method':12s}  images/s  bare  waiting  GiB")
    for backbone in args.backbones:
        for method in args.methods:
            cell = _cell(args, source, backbone, method)
            print(
                f"{backbone:12s} {method:12s} {cell.images_per_s:9.1f} "
                f"{cell.bare_images_per_s:5.0f} {100 * cell.wait_share:6.0f} % "
                f"{cell.peak_gib:4.1f}",
                flush=True,  # a call that is cut off keeps what it has measured
            )
            name = f"{backbone}_{method}"
            result[f"{name}_images_per_s"] = cell.images_per_s
            result[f"{name}_wait_share"] = cell.wait_share
            result[f"{name}_peak_gib"] = cell.peak_gib
    return result


def _cell(args: argparse.Namespace, source: Source, backbone: str, method: str) -> Cell:
    device = torch.device(args.device)
    framework = framework_of(method, backbone, args.size)
    step = method_step(framework, device, resolve_precision("auto", device))
    recipe = build_recipe("moco_v2", args.size)
    supply = batches(source, recipe, device, args.batch, workers=args.workers)
    ready = views_of(next(supply))
    sides = [
        repeated("bare", lambda: step(ready), args.steps),
        repeated("with data", lambda: step(views_of(next(supply))), args.steps),
    ]
    # by the clock: what a step waits for is not this thread's time
    times = measure(sides, args.rounds, device, wall=True)
    peak = _weights(framework) + peak_memory(lambda: step(ready), device)
    supply.close()  # ends the workers
    images = 1e3 * args.steps * args.batch
    return Cell(
        images / statistics.median(times["with data"]),
        images / statistics.median(times["bare"]),
        max(0.0, 1.0 - ratio(times, "bare", "with data")),
        peak / 1024,
    )


def _weights(framework: torch.nn.Module) -> float:
    """Return the MiB of weights and buffers, and of SGD's average of the trained ones."""
    parameters = list(framework.parameters())
    held = [*parameters, *framework.buffers(), *(p for p in parameters if p.requires_grad)]
    return sum(tensor.nbytes for tensor in held) / 2**20
