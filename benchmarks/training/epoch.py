"""Images a second of real steps, data included, over those of bare steps on ready batches.

Without --data: CIFAR-10 (--cifar FOLDER, or random images), ResNet-18, images resident on the
device. With --data FOLDER of class folders: ResNet-50 (or --backbone) on JPEGs through workers,
against the published pipeline as well: PIL transforms in workers, float32, NCHW, loops.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import Side, autocast, measure, ratio, repeated, show
from benchmarks.input.views import reference_transform
from benchmarks.training.loss import published_loss
from benchmarks.training.step import average_in_a_loop, stem_of
from benchmarks.training.supply import batches, images_of, views_of
from data.augment.base import Recipe
from data.augment.recipes import build_recipe
from data.decode import FORMATS
from data.sources.base import Source
from engine.loop import forward_and_backward
from engine.precision import resolve_precision
from engine.state import TrainState
from models import assemble_framework
from models.moco import MoCoV2
from utils.batch import Batch
from utils.schedules import Progress

_EPOCHS = 200  # of which the time is derived for CIFAR-10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add data and sizes."""
    parser.add_argument("--cifar", metavar="FOLDER", help="that holds cifar-10-batches-py")
    parser.add_argument("--data", metavar="FOLDER", help="of class folders, with train/ inside")
    parser.add_argument(
        "--backbone", default="", help="default: resnet18 for CIFAR-10, resnet50 for --data"
    )
    parser.add_argument(
        "--size", type=int, default=0, help="of the views; default 32, or 224 with --data"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--queue", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=2, help="a round")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--decode", default="worker", help="DATA.DECODE of --data: worker or device"
    )
    parser.add_argument("--backend", default="auto", help="AUG.BACKEND: auto, torch or fused")
    parser.add_argument(
        "--compile", choices=("", "kernels", "graphs"), default="", help="the backbones"
    )
    parser.add_argument(
        "--symmetric", action="store_true", help="MoCo v2's loss in both directions"
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Measure the bare step, the real one and, with `--data`, the published pipeline."""
    device = torch.device(args.device)
    size = args.size or (224 if args.data else 32)
    recipe = build_recipe("moco_v2" if args.data else "cifar", size)
    source = images_of(args.data, args.cifar, 5000, size)
    name = args.backbone or ("resnet50" if args.data else "resnet18")
    backbone = {"name": name, "stem": stem_of(size)}
    ours = _Ours(args, backbone, device)
    kinds = {"workers": args.workers, "decode": args.decode, "backend": args.backend}
    supply = batches(source, recipe, device, args.batch, **kinds)
    ready = next(supply)  # one batch, used again and again
    sides = [
        repeated("bare step", lambda: ours.step(ready), args.steps),
        repeated("real step, data included", lambda: ours.step(next(supply)), args.steps),
    ]
    if args.data:
        sides.append(_published(args, backbone, source, recipe, device))
    # with workers the thread's own time leaves out what the loader costs
    times = measure(sides, args.rounds, device, wall=args.workers > 0 or device.type == "cuda")
    supply.close()  # ends the workers
    show(times)
    network = f"{backbone['name']}, {size} px"
    print(f"{len(source)} images, {network}, batch {args.batch}, {ours.precision}")
    bare, real, *published = (side.name for side in sides)
    rate = 1e3 * args.steps * args.batch / statistics.median(times[real])
    result = {"epoch_over_step": ratio(times, bare, real), "images_per_s": rate}
    result["data_wait_share"] = max(0.0, 1.0 - result["epoch_over_step"])
    if published:
        result["epoch_speedup"] = ratio(times, published[0], real)
    else:
        result["cifar_minutes_200_epochs"] = _EPOCHS * 50_000 / rate / 60.0
    return result


class _Ours:
    """MoCo v2's step as the engine does it, in the precision that suits the device."""

    def __init__(
        self, args: argparse.Namespace, backbone: dict[str, str], device: torch.device
    ) -> None:
        options = {"queue_size": args.queue, "symmetric": args.symmetric}
        self.device, self.precision = device, resolve_precision("auto", device)
        module = assemble_framework("moco_v2", options, backbone).to(device)
        self.module = module.to(memory_format=torch.channels_last)
        if args.compile:
            module.compile_backbones(cuda_graphs=args.compile == "graphs")
        optimizer = torch.optim.SGD(module.online.parameters(), lr=1e-3, momentum=0.9, fused=True)
        self.state = TrainState(self.module, optimizer, self.module)

    def step(self, batch: Batch) -> None:
        progress = Progress(0, 100, 1000)
        forward_and_backward(self.state, [batch], self._forward, progress)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        self.module.after_step(progress)

    def _forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        with autocast(self.device, self.precision):
            return self.module(views_of(batch), progress)


# ---- the published side --------------------------------------------------------------------------


class _TwoViews(Dataset[list[Tensor]]):
    """An image file as two float views, through PIL and torchvision's transforms."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self.names = [source.name(index) for index in range(len(source))]
        self.transforms = [reference_transform(view) for view in recipe]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.open(self.names[index], formats=FORMATS).convert("RGB")
        return [transform(image) for transform in self.transforms]


def _published(
    args: argparse.Namespace,
    backbone: dict[str, str],
    source: Source,
    recipe: Recipe,
    device: torch.device,
) -> Side:
    """Return MoCo v2 in float32 with the published loader, loss, average and optimiser."""
    loader = DataLoader(
        _TwoViews(source, recipe),
        batch_size=args.batch,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        pin_memory=device.type == "cuda",
        persistent_workers=args.workers > 0,
    )
    supply: Iterator[list[Tensor]] = itertools.chain.from_iterable(itertools.repeat(loader))
    framework = assemble_framework("moco_v2", {"queue_size": args.queue}, backbone).to(device)
    assert isinstance(framework, MoCoV2)
    # only its networks and queue: loss and average are the published ones below
    online, target, queue = framework.online, framework.target, framework.queue
    optimizer = torch.optim.SGD(online.parameters(), lr=1e-3, momentum=0.9, foreach=False)

    def once() -> None:
        query_view, key_view = (view.to(device, non_blocking=True) for view in next(supply))
        queries = nn.functional.normalize(online(query_view), dim=1)
        with torch.no_grad():
            average_in_a_loop(online, target)
            keys = nn.functional.normalize(target(key_view), dim=1)
        loss = published_loss(queries, keys, queue.keys, 0.2, None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.hold(keys)
        queue.flush()
        loss.item()  # the published loop reads the loss at every step

    return repeated("published pipeline and step", once, args.steps)
