"""SiT's corruption of a batch, drawing included: at once, or in a loop over images."""

import argparse
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import Side, measure, ratio
from models.parts.corruption import corrupt_at_once, corrupt_plain, draw_corruption


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--batch", type=int, default=72)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare SiT's corruption of a batch, drawing included, on several image sizes."""
    device, result = torch.device(args.device), {}
    for size in args.sizes:
        torch.manual_seed(0)
        images = torch.randn(args.batch, 3, size, size, device=device)

        def side(name: str, function: Callable[..., Tensor], images: Tensor = images) -> Side:
            def once() -> None:
                drawn = draw_corruption(len(images), *images.shape[-2:])
                function(images, drawn, torch.randn_like(images))

            return Side(name, once)

        sides = [side("a loop over images", corrupt_plain), side("all at once", corrupt_at_once)]
        times = measure(sides, args.rounds, device)
        result[f"corruption_speedup_{size}"] = ratio(times, sides[0].name, sides[1].name)
        for each in sides:
            median = statistics.median(times[each.name])
            print(f"{args.batch} images of {size}: {each.name:20s} {median:9.1f} ms")
    return result
