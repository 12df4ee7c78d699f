"""Other libraries' MoCo v2 beside ours: the same backbone, batch, views, optimiser and precision.

Peers: lightly (pip install lightly). Each uses what it ships: its head, loss with memory bank,
momentum update and, end to end, its transform and DataLoader.
"""

import argparse
import copy
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.common import Side, autocast, measure, ratio, repeated, show
from benchmarks.training.step import method_step
from data.augment.recipes import build_recipe
from data.loader import GlobalLoader
from data.sources.base import ArraySource
from engine.precision import resolve_precision
from models import assemble_framework
from models.parts.backbones import build_backbone

_KEYS = 4096  # of the queue, and of lightly's memory bank
DIFFERENCES = """what differs:
- head and loss: lightly normalises and concatenates logits; both keep 4096 keys here
- target: lightly averages each parameter before the forward, ours all at once after the step
- memory format: lightly's examples keep NCHW; both sides run it channels last here
- data, end to end: lightly's transform on PIL images through a DataLoader; ours on uint8 tensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument(
        "--backbone", default="resnet8", help="resnet18 or resnet50 where there is a GPU"
    )
    parser.add_argument("--size", type=int, default=32, help="of the views, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4, help="a round")


def run(args: argparse.Namespace) -> dict[str, float]:
    """Time the step alone on fixed views, then steps with data."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    precision = resolve_precision("auto", device)
    theirs = _Lightly(args, device, precision)
    options = {"queue_size": _KEYS}
    framework = assemble_framework("moco_v2", options, _backbone(args), img_size=args.size)
    ours = method_step(framework, device, precision)
    views = [torch.randn(args.batch, 3, args.size, args.size, device=device) for _ in range(2)]
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    pixels = np.random.default_rng(0).integers(
        0, 256, (2048, args.size, args.size, 3), dtype=np.uint8
    )
    our_data, their_data = _our_views(args, pixels, device), _their_views(args, pixels, device)

    def repeat(
        name: str, step: Callable[[list[Tensor]], None], supply: Iterator[list[Tensor]]
    ) -> Side:
        return repeated(name, lambda: step(next(supply)), args.steps)

    names = ("lightly, step", "ours, step", "lightly, with its data", "ours, with our data")
    sides = [
        repeat(names[0], theirs, itertools.repeat(views)),
        repeat(names[1], ours, itertools.repeat(views)),
        repeat(names[2], theirs, their_data),
        repeat(names[3], ours, our_data),
    ]
    times = measure(sides, args.rounds, device, wall=args.workers > 0 or device.type == "cuda")
    show(times)
    print(
        f"{args.backbone}, {args.size} px, batch {args.batch}, {precision}, {args.workers} workers"
    )
    print(DIFFERENCES)
    rate = 1e3 * args.steps * args.batch / statistics.median(times[names[3]])
    return {
        "lightly_step_speedup": ratio(times, *names[:2]),
        "lightly_end_to_end_speedup": ratio(times, *names[2:]),
        "images_per_s": rate,
    }


def _backbone(args: argparse.Namespace) -> dict[str, str]:
    return {"name": args.backbone, "stem": "cifar" if args.size <= 64 else "imagenet"}


class _Lightly:
    """A step of the MoCo in lightly's examples, in the same precision, memory format, optimiser."""

    def __init__(self, args: argparse.Namespace, device: torch.device, precision: str) -> None:
        try:
            from lightly.loss import NTXentLoss
            from lightly.models.modules import MoCoProjectionHead
            from lightly.models.utils import update_momentum
        except ImportError as error:
            raise SystemExit(
                f"error: peers needs lightly ({error}): pip install lightly"
            ) from error
        self.device, self.precision = device, precision
        self.update_momentum = update_momentum
        backbone = build_backbone(**_backbone(args), img_size=args.size)  # type: ignore[arg-type]
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
    args: argparse.Namespace, pixels: np.ndarray, device: torch.device
) -> Iterator[list[Tensor]]:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    source = ArraySource("random", images, torch.zeros(len(images), dtype=torch.int64), ["0"])
    recipe = build_recipe("moco_v2", args.size)
    loader = GlobalLoader(source, recipe, global_batch=args.batch, seed=0, device=device)
    for _, batches in loader.from_step(0, 1 << 40):
        yield [view.contiguous(memory_format=torch.channels_last) for view in batches[0].views]


class _Transformed(Dataset[list[Tensor]]):
    """Pixels through lightly's own transform of PIL images."""

    def __init__(self, pixels: np.ndarray, size: int) -> None:
        from lightly.transforms import MoCoV2Transform

        self.pixels, self.transform = pixels, MoCoV2Transform(input_size=size)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> list[Tensor]:
        # lightly declares images or tensors; its transform ends with a tensor
        return cast("list[Tensor]", self.transform(Image.fromarray(self.pixels[index])))


def _their_views(
    args: argparse.Namespace, pixels: np.ndarray, device: torch.device
) -> Iterator[list[Tensor]]:
    loader = DataLoader(
        _Transformed(pixels, args.size),
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
