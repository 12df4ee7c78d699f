"""Augmented views from JPEGs in memory, on one core: the published pipeline and ours.

The reference is PIL's decoder and torchvision's transforms of PIL images, to normalised float32.
"For a device" is what a worker does where a GPU augments: decode once, two crops of uint8, ready to
be handed over. "All on a CPU" adds the photometric operations, to normalised float32.
"""

import argparse
import io
import resource
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data.random_erasing import RandomErasing as TimmErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.common import ratio
from benchmarks.input.decode import add_arguments as add_data_arguments
from benchmarks.input.decode import interleaved, load_photos, print_rates, rate
from data.augment.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PhotometricOp,
    Recipe,
    SpatialOp,
    View,
    sample_keys,
    view_size,
)
from data.augment.crops import CenterCrop, RandomCropPad, RandomResizedCrop, Resize
from data.augment.ops import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    RandomErasing,
    Solarize,
)
from data.augment.pipeline import (
    choose_backend,
    draw_photometric,
    photometric,
    view_interpolation,
)
from data.augment.randaugment import RandAugment, rand_augmenter
from data.augment.recipes import add_local_views, build_recipe
from data.decode import FORMATS, decode_rgb
from data.sampler import Request
from data.sources.base import Source
from data.worker import Fetcher

# torchvision and timm have no common type: of a PIL image, of its tensor after ToTensor
Transform = Callable[..., object]
Step = Callable[[int, slice, list[bytes]], None]
_SEED = 0
_LOCAL = 96  # pixels of a local view
_HAND_OVER = 32  # images of a batch that is handed over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the images, the recipe and its size."""
    add_data_arguments(parser)
    parser.add_argument("--recipe", default="moco_v2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--local-crops", type=int, default=6, help="of multi-crop, 96 pixels each")
    parser.add_argument("--backend", default="auto", help="of the CPU path: auto, torch or fused")


class _Memory(Source):
    """JPEGs in memory."""

    def __init__(self, files: list[bytes]) -> None:
        super().__init__(torch.full((len(files),), -1), [])
        self.files = files

    def load(self, index: int) -> Tensor:
        return decode_rgb(self.files[index])


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare the pipelines chunk by chunk on the same bytes; then what handing over costs."""
    torch.set_num_threads(1)
    photos = load_photos(args.data, args.images)
    recipe = build_recipe(args.recipe, args.size)
    references = [reference_transform(view) for view in recipe]
    more = add_local_views(recipe, args.local_crops, min(_LOCAL, args.size), (0.05, 0.25))
    backend = choose_backend(args.backend, torch.device("cpu"))
    for_device, on_cpu = _ours(photos.files, recipe, backend)
    more_for_device, more_on_cpu = _ours(photos.files, more, backend)

    def reference(_pass: int, _place: slice, files: list[bytes]) -> None:
        for file in files:
            image = Image.open(io.BytesIO(file), formats=FORMATS).convert("RGB")
            for transform in references:
                transform(image)

    def decode_only(_pass: int, _place: slice, files: list[bytes]) -> None:
        for file in files:
            decode_rgb(file)

    names = ("reference", "ours, for a device", f"ours, all on a CPU ({backend})", "decoding alone")
    with_local = [f"{name}, + {args.local_crops} local" for name in names[1:3]]
    sides = (reference, for_device, on_cpu, decode_only, more_for_device, more_on_cpu)
    named = list(zip((*names, *with_local), sides, strict=True))
    times = interleaved(named, photos.files, args.rounds)
    views = f"{len(recipe)} views of {args.size}, recipe {args.recipe}"
    print(f"{photos.describe()}; {views}, one core")
    print_rates(times, photos, "reference")
    return {
        "views_speedup": ratio(times, names[0], names[1]),
        "views_cpu_speedup": ratio(times, names[0], names[2]),
        "multi_crop_cost": ratio(times, with_local[0], names[1]),
        "multi_crop_cpu_cost": ratio(times, with_local[1], names[2]),
        "decode_fraction": ratio(times, names[3], names[1]),
        "views_per_s": rate(times[names[1]], photos),
        "views_cpu_per_s": rate(times[names[2]], photos),
        "views_reference_per_s": rate(times[names[0]], photos),
        "megapixels": photos.megapixels(),
        "real_images": float(not photos.origin.startswith("made up")),
        **_hand_over(len(recipe), args.size),
    }


def _ours(files: list[bytes], recipe: Recipe, backend: str) -> tuple[Step, Step]:
    """Return what makes the crops of a chunk of files, and what also augments them."""
    fetcher = Fetcher(_Memory(files), recipe, _SEED)

    def crops(number: int, place: slice) -> tuple[Request, list[Tensor]]:
        request = Request(number, number, np.arange(len(files))[place])
        fetched = fetcher[request]
        assert not fetched["failures"]
        return request, fetched["views"]

    def for_device(number: int, place: slice, _files: list[bytes]) -> None:
        crops(number, place)

    def on_cpu(number: int, place: slice, _files: list[bytes]) -> None:
        request, views = crops(number, place)
        for index, (view, images) in enumerate(zip(recipe, views, strict=True)):
            keys = sample_keys(_SEED, number, request.indices, index)
            photometric(images, view, draw_photometric(view, keys), backend)

    return for_device, on_cpu


class _Ready(Dataset[list[Tensor]]):
    """Views of one type that cost nothing but to be handed over."""

    def __init__(self, views: int, size: int, dtype: torch.dtype) -> None:
        self.views = [torch.zeros((_HAND_OVER, 3, size, size), dtype=dtype) for _ in range(views)]

    def __getitem__(self, index: int) -> list[Tensor]:
        # New memory each time, as a worker that makes views has.
        return [view.clone() for view in self.views]


def _hand_over(views: int, size: int) -> dict[str, float]:
    """Return the processor's milliseconds, on both sides, to hand over an image, by type."""
    result = {}
    for name, dtype in (("uint8", torch.uint8), ("float32", torch.float32)):
        dataset = _Ready(views, size, dtype)
        # The difference leaves out what it costs to start a worker.
        few, many = (_processor_time(dataset, batches) for batches in (2, 18))
        result[f"hand_over_{name}_ms"] = (many - few) / (16 * _HAND_OVER) * 1e3
        print(f"hand-over of {name:8s} {result[f'hand_over_{name}_ms']:8.2f} ms an image")
    return result


def _processor_time(dataset: Dataset[list[Tensor]], batches: int) -> float:
    """Return the seconds of this process and of a worker that hands `batches` over."""
    before = _used()
    for batch in DataLoader(dataset, sampler=range(batches), batch_size=None, num_workers=1):
        for view in batch:
            view[:, :, ::64].sum()  # touch it, as a consumer does
    return _used() - before


def _used() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ---- the published pipeline ----------------------------------------------------------------------


def reference_transform(view: View) -> transforms.Compose:
    """Build the pipeline from PIL images to normalised (3,S,S) that `view` stands for.

    It draws from the global generators of torch, `random` and NumPy, as the originals do.
    """
    # Erasing works on normalised tensors, all else on PIL images.
    normalise = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    before = [_reference_op(op, view) for op in view if not isinstance(op, RandomErasing)]
    after = [_reference_op(op, view) for op in view if isinstance(op, RandomErasing)]
    return transforms.Compose([*before, *normalise, *after])


def _reference_op(op: SpatialOp | PhotometricOp, view: View) -> Transform:
    modes = transforms.InterpolationMode
    match op:
        case RandomResizedCrop():
            return transforms.RandomResizedCrop(
                op.size, op.scale, op.ratio, modes(op.interpolation)
            )
        case Resize():
            return transforms.Resize(op.size, modes(op.interpolation))
        case CenterCrop():
            return transforms.CenterCrop(op.size)
        case RandomCropPad():
            return transforms.RandomCrop(op.size, padding=op.padding)
        case HorizontalFlip():
            return transforms.RandomHorizontalFlip(op.p)
        case ColorJitter():
            jitter = transforms.ColorJitter(op.brightness, op.contrast, op.saturation, op.hue)
            return transforms.RandomApply([jitter], op.p)
        case Grayscale():
            return transforms.RandomGrayscale(op.p)
        case GaussianBlur():
            return transforms.RandomApply([_PILBlur(op.sigma)], op.p)
        case Solarize():
            return transforms.RandomSolarize(op.threshold, op.p)
        case RandAugment():
            return rand_augmenter(op.config, view_size(view), view_interpolation(view))
        case RandomErasing():
            return _erasing(op.p)
    raise TypeError(f"torchvision and timm have no {type(op).__name__}")


def _erasing(p: float) -> Transform:
    return TimmErasing(p, mode="pixel", max_count=1, num_splits=0, device="cpu")


class _PILBlur:
    """Blur a PIL image with radius = sigma, as every published pipeline of this family does."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        radius = float(torch.empty(1).uniform_(*self.sigma))
        return image.filter(ImageFilter.GaussianBlur(radius=radius))
