"""The photometric operations of a batch of uint8 crops: the batched operations of torch, and the fused ones.

On a GPU also how many kernels each launches, and whether both agree.
"""

import argparse
import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Side, measure, ratio
from benchmarks.step import show
from data.augment.base import sample_keys
from data.augment.pipeline import choose_backend, draw_photometric, photometric
from data.augment.recipes import build_recipe

BACKENDS = ("torch", "fused")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and its size."""
    parser.add_argument("--recipe", default="moco_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare the backends on the views of a recipe."""
    device = torch.device(args.device)
    choose_backend("fused", device)  # an error here rather than a comparison with itself
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch, 3, args.size, args.size)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    recipe = build_recipe(args.recipe, args.size)
    keys = [sample_keys(0, 0, np.arange(args.batch), number) for number in range(len(recipe))]
    draws = [draw_photometric(view, key) for view, key in zip(recipe, keys, strict=True)]

    def views(backend: str) -> list[Tensor]:
        return [
            photometric(crops, view, drawn, backend)
            for view, drawn in zip(recipe, draws, strict=True)
        ]

    plain, fused = (views(backend) for backend in BACKENDS)
    pairs = zip(plain, fused, strict=True)
    differing = max(float(((a - b).abs() > 1e-3).float().mean()) for a, b in pairs)
    sides = [Side(name, functools.partial(views, name)) for name in BACKENDS]
    times = measure(sides, args.rounds, device)
    show(times)
    result = {"augment_speedup": ratio(times, *BACKENDS), "augment_differing": differing}
    for name, run_once in sides if device.type == "cuda" else ():
        result[f"augment_kernels_{name}"] = _kernels(run_once) / len(recipe)
        print(f"{name}: {result[f'augment_kernels_{name}']:.0f} kernels a view")
    return result


def _kernels(run: Callable[[], object]) -> int:
    """Return how many kernels and copies a call launches on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events() or [])
