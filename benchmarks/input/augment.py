"""Operations on a batch of images: photometric ones and SiT's corruption.

On a GPU also how many kernels the photometric operations launch.
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import Side, measure, ratio, show
from data.augment.base import sample_keys
from data.augment.pipeline import choose_backend, draw_photometric, photometric
from data.augment.recipes import build_recipe
from models.parts.corruption import corrupt_at_once, corrupt_plain, draw_corruption

BACKENDS = ("torch", "fused")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recipe and its size."""
    parser.add_argument("--recipe", default="moco_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare torch's batched operations with the fused ones on the views of a recipe."""
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

    # reported, not required: at the threshold of solarize the last bit decides
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
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in trace.events() or [])


# ---- SiT's corruption ----------------------------------------------------------------------------


def add_corruption_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--batch", type=int, default=72)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 224])


def run_corruption(args: argparse.Namespace) -> dict[str, float]:
    """Compare SiT's corruption of a batch, drawing included: at once, or image by image."""
    device, result = torch.device(args.device), {}
    for size in args.sizes:
        torch.manual_seed(0)
        images = torch.randn(args.batch, 3, size, size, device=device)
        sides = [
            Side("a loop over images", _corruption(corrupt_plain, images)),
            Side("all at once", _corruption(corrupt_at_once, images)),
        ]
        times = measure(sides, args.rounds, device)
        result[f"corruption_speedup_{size}"] = ratio(times, sides[0].name, sides[1].name)
        for name, values in times.items():
            median = statistics.median(values)
            print(f"{args.batch} images of {size}: {name:20s} {median:9.1f} ms")
    return result


def _corruption(function: Callable[..., Tensor], images: Tensor) -> Callable[[], None]:
    def once() -> None:
        drawn = draw_corruption(len(images), *images.shape[-2:])
        function(images, drawn, torch.randn_like(images))

    return once
