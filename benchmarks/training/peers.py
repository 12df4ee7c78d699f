"""Other libraries' MoCo v2 beside ours: the same backbone, batch, views, optimiser and precision.

Peers: lightly (pip install lightly). Each uses what it ships: its head, loss with memory bank,
momentum update and, end to end, its transform and DataLoader. Images are pixels in memory, or with
`--jpegs` real JPEG files in a folder, which each side lists, reads and decodes itself.
"""

import argparse
import copy
import importlib.util
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import Side, autocast, measure, ratio, repeated, show
from benchmarks.input.decode import load_photos
from benchmarks.training.step import framework_of, method_step, stem_of
from benchmarks.training.supply import batches, random_images, views_of
from data.augment.recipes import build_recipe
from data.sources import build_source
from engine.precision import resolve_precision
from models.parts.backbones import build_backbone

_IMAGES = 2048  # in memory
_KEYS = 4096  # of the queue, and of lightly's memory bank
DIFFERENCES = """what differs:
- head and loss: lightly normalises and concatenates logits; both keep 4096 keys here
- target: lightly averages each parameter before the forward, ours all at once after the step
- memory format: lightly's examples keep NCHW; both sides run it channels last here
- data: lightly's dataset and transform of PIL images through a DataLoader; ours crops uint8, and
  augments a batch at once"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument(
        "--backbone", default="resnet8", help="resnet18 or resnet50 where there is a GPU"
    )
    parser.add_argument("--size", type=int, default=32, help="of the views, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4, help="a round")
    parser.add_argument("--jpegs", type=int, default=0, help="JPEG files; 0: pixels in memory")
    parser.add_argument(
        "--data", default="", help="folder of JPEGs; else a pack in SHARED_DATA; else made up"
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Time the step alone on fixed views, the data alone, then steps with data."""
    if importlib.util.find_spec("lightly") is None:
        print("lightly is not installed (pip install lightly): ours alone")
    if not args.jpegs:
        return _compare(args, None)
    photos = load_photos(args.data, args.jpegs)
    print(photos.describe())
    with tempfile.TemporaryDirectory(prefix="synco-peers-") as made:
        folder = Path(made) / "train" / "all"
        folder.mkdir(parents=True)
        for number, file in enumerate(photos.files):
            (folder / f"{number:05d}.jpg").write_bytes(file)
        return _compare(args, Path(made))


def _compare(args: argparse.Namespace, folder: Path | None) -> dict[str, float]:
    device = torch.device(args.device)
    torch.manual_seed(0)
    precision = resolve_precision("auto", device)
    views = [torch.randn(args.batch, 3, args.size, args.size, device=device) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    framework = framework_of("moco_v2", args.backbone, args.size, {"queue_size": _KEYS})
    steps = {"ours": method_step(framework, device, precision)}
    data = {"ours": _our_views(args, folder, device)}
    if importlib.util.find_spec("lightly") is not None:
        steps["lightly"] = _Lightly(args, device, precision)
        data["lightly"] = _their_views(args, _their_dataset(args, folder), device)
    sides = []
    for who, step in steps.items():
        sides += _sides(who, step, views, data[who], args.steps)
    times = measure(sides, args.rounds, device, wall=args.workers > 0 or device.type == "cuda")
    show(times)
    print(
        f"{args.backbone}, {args.size} px, batch {args.batch}, {precision}, {args.workers} workers"
    )
    print(DIFFERENCES)
    images = 1e3 * args.steps * args.batch
    result = {
        "images_per_s": images / statistics.median(times["ours, with data"]),
        "data_images_per_s": images / statistics.median(times["ours, data"]),
    }
    if "lightly" in steps:
        for name, part in (("step", "step"), ("data", "data"), ("end_to_end", "with data")):
            result[f"lightly_{name}_speedup"] = ratio(times, f"lightly, {part}", f"ours, {part}")
    return result


def _sides(
    who: str,
    step: Callable[[list[Tensor]], None],
    views: list[Tensor],
    data: Iterator[list[Tensor]],
    times: int,
) -> list[Side]:
    """Return one library's step on fixed views, its data, and both."""
    return [
        repeated(f"{who}, step", lambda: step(views), times),
        repeated(f"{who}, data", lambda: next(data), times),
        repeated(f"{who}, with data", lambda: step(next(data)), times),
    ]


class _Lightly:
    """A step of the MoCo in lightly's examples, in the same precision, memory format, optimiser."""

    def __init__(self, args: argparse.Namespace, device: torch.device, precision: str) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import update_momentum

        self.device, self.precision = device, precision
        self.update_momentum = update_momentum
        backbone = build_backbone(args.backbone, stem=stem_of(args.size), img_size=args.size)
        width = backbone.num_features
        online = torch.nn.Sequential(backbone, MoCoProjectionHead(width, width, 128))
        self.online = online.to(device).to(memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(_KEYS, 128)).to(device)
        parameters = self.online.parameters()
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True)

    def __call__(self, views: list[Tensor]) -> None:
        self.update_momentum(self.online, self.target, 0.999)
        with autocast(self.device, self.precision):
            queries = self.online(views[0])
            with torch.no_grad():
                keys = self.target(views[1])
            loss = self.criterion(queries, keys)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


# ---- data ----------------------------------------------------------------------------------------


def _our_views(
    args: argparse.Namespace, folder: Path | None, device: torch.device
) -> Iterator[list[Tensor]]:
    if folder is not None:
        source = build_source("imagefolder", str(folder), "train")
    else:
        source = random_images(_IMAGES, args.size)
    recipe = build_recipe("moco_v2", args.size)
    return map(views_of, batches(source, recipe, device, args.batch, workers=args.workers))


class _Transformed(Dataset[list[Tensor]]):
    """Pixels through lightly's own transform of PIL images."""

    def __init__(self, pixels: np.ndarray, transform: Callable[[Image.Image], object]) -> None:
        self.pixels, self.transform = pixels, transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> list[Tensor]:
        # lightly declares images or tensors; its transform ends with a tensor
        return cast("list[Tensor]", self.transform(Image.fromarray(self.pixels[index])))


class _Views(Dataset[list[Tensor]]):
    """The views alone of lightly's (views, label, file name)."""

    def __init__(self, dataset: Dataset[tuple[list[Tensor], int, str]], length: int) -> None:
        self.dataset, self.length = dataset, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.dataset[index][0]


def _their_dataset(args: argparse.Namespace, folder: Path | None) -> Dataset[list[Tensor]]:
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    transform = MoCoV2Transform(input_size=args.size)
    if folder is None:
        images = random_images(_IMAGES, args.size).images
        assert images is not None
        return _Transformed(images.permute(0, 2, 3, 1).numpy(), transform)
    dataset = LightlyDataset(str(folder / "train"), transform=transform)
    return _Views(dataset, len(dataset))


def _their_views(
    args: argparse.Namespace, dataset: Dataset[list[Tensor]], device: torch.device
) -> Iterator[list[Tensor]]:
    loader = DataLoader(
        dataset,
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=args.workers > 0,
    )
    for views in itertools.chain.from_iterable(itertools.repeat(loader)):
        on_device = [view.to(device, non_blocking=True) for view in views]
        yield [view.contiguous(memory_format=torch.channels_last) for view in on_device]
