"""Training batches and test images of a detector: keyed flips and resizes, of different sizes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data import loader as batches
from data.augment.base import sample_keys
from data.batch import Batch
from data.sampler import BatchPlan, Request, RequestSampler
from data.worker import BadImages, BadImagesError, replacement
from detection.sources.annotations import DetectionData, Objects
from utils import distributed
from utils.randomness import uniform

_FLIP, _SIZE = 1, 2  # streams of draws, see utils.randomness
_FINER = 3  # odd, so that a pixel's centre is one of the finer pixels' centre
_ATTEMPTS = 20  # replacements for one image before giving up

Target = dict[str, Tensor]


@dataclass(frozen=True)
class DetectionBatch(Batch):
    """One micro-batch: `views` are the images, each float32 (3,H,W) in [0, 1], resized.

    `targets` hold boxes float32 (n,4), labels int64 (n,) and, for Mask R-CNN, masks uint8 (n,H,W).
    An image as a whole has no label: `labels` are -1.
    """

    targets: list[Target]


@dataclass(frozen=True)
class Resizing:
    """How images are resized: the shorter side to one of `sizes`, the longer at most `longest`."""

    sizes: tuple[int, ...]
    longest: int
    flip: float = 0.0

    @staticmethod
    def for_training(node: CfgNode) -> "Resizing":
        """Read a `DETECTION` section."""
        return Resizing(tuple(node.MIN_SIZES), node.MAX_SIZE, node.FLIP)

    @staticmethod
    def for_test(node: CfgNode) -> "Resizing":
        """Read a `DETECTION` section."""
        return Resizing((node.TEST_SIZE,), node.MAX_SIZE)

    def shape(self, height: int, width: int, choice: float = 0.0) -> tuple[int, int]:
        """Return (height, width) after resizing; `choice` in [0, 1) picks the size."""
        size = self.sizes[int(choice * len(self.sizes))]
        scale = min(size / min(height, width), self.longest / max(height, width))
        return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Resize uint8 (3,H,W) with antialiasing, as PIL does."""
    if tuple(image.shape[1:]) == shape:
        return image
    return F.interpolate(image[None], size=shape, mode="bilinear", antialias=True)[0]


def resized_target(
    objects: Objects, old: tuple[int, int], new: tuple[int, int], flipped: bool, masks: bool
) -> Target:
    """Return the target of an image resized from (height, width) `old` to `new`, maybe mirrored."""
    scale = np.array([new[1] / old[1], new[0] / old[0]] * 2, dtype=np.float32)
    boxes = objects.boxes * scale
    if flipped:
        boxes = np.stack(
            [new[1] - boxes[:, 2], boxes[:, 1], new[1] - boxes[:, 0], boxes[:, 3]], axis=1
        )
    target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(objects.labels)}
    if masks:
        # filled row by row: an image without objects has masks (0,H,W), which np.stack cannot make
        stacked = np.zeros((len(objects.polygons), *new), dtype=np.uint8)
        for row, polygons in zip(stacked, objects.polygons, strict=True):
            row[:] = rasterise(polygons, scale[:2], new)
        stacked = stacked[:, :, ::-1] if flipped else stacked
        target["masks"] = torch.from_numpy(np.ascontiguousarray(stacked))
    return target


def rasterise(
    polygons: tuple[tuple[float, ...], ...], scale: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Fill polygons, x and y times `scale` (2,): uint8 (H,W), 1 where a pixel's centre is inside.

    Always PIL, whatever else is installed: the same run has the same masks on every machine. PIL
    fills a polygon's border too, hence the finer grid.
    """
    mask = np.zeros(shape, dtype=np.uint8)
    for polygon in polygons:
        corners = np.array(polygon).reshape(-1, 2) * scale
        left, top = np.clip(np.floor(corners.min(axis=0)).astype(int), 0, shape[::-1])
        right, bottom = np.clip(np.ceil(corners.max(axis=0)).astype(int) + 1, 0, shape[::-1])
        if right <= left or bottom <= top:
            continue
        canvas = Image.new("1", (int(right - left) * _FINER, int(bottom - top) * _FINER))
        # a pixel spans [i, i + 1), PIL's is centred at i
        finer = (corners - (left, top)) * _FINER - 0.5
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in finer], fill=1)
        mask[top:bottom, left:right] |= np.array(canvas, dtype=np.uint8)[1::_FINER, 1::_FINER]
    return mask


class TrainingImages(Dataset[dict[str, Any]]):
    """Turn a request into images and targets; every draw is keyed by (seed, epoch, index)."""

    def __init__(self, data: DetectionData, resizing: Resizing, seed: int, masks: bool) -> None:
        self.data, self.resizing, self.seed, self.masks = data, resizing, seed, masks

    def __getitem__(self, request: Request) -> dict[str, Any]:
        """Load the images of a request; an unreadable one is replaced by one that the key fixes."""
        failures: list[tuple[str, str]] = []
        samples = [self._sample(request.epoch, int(index), failures) for index in request.indices]
        return {
            "images": [image for _, image, _ in samples],
            "targets": [target for _, _, target in samples],
            "indices": torch.tensor([index for index, _, _ in samples]),
            "epoch": request.epoch,
            "failures": failures,
        }

    def _sample(
        self, epoch: int, wanted: int, failures: list[tuple[str, str]]
    ) -> tuple[int, Tensor, Target]:
        index = wanted
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                image = self.data.load(index)
            except Exception as error:  # whatever a decoder may raise: the file is bad
                failures.append((self.data.name(index), f"{type(error).__name__}: {error}"))
                index = replacement(self.seed, epoch, wanted, attempt, len(self.data))
            else:
                return index, *self._augment(image, self.data.objects[index], epoch, wanted)
        raise BadImagesError(
            f"{_ATTEMPTS} images in a row cannot be read, the last is {failures[-1]}"
        )

    def _augment(
        self, image: Tensor, objects: Objects, epoch: int, key: int
    ) -> tuple[Tensor, Target]:
        keys = sample_keys(self.seed, epoch, np.array([key]), 0)
        old = (image.shape[1], image.shape[2])
        new = self.resizing.shape(*old, choice=float(uniform(keys, _SIZE)[0]))
        flipped = bool(uniform(keys, _FLIP)[0] < self.resizing.flip)
        pixels = resize(image, new)
        target = resized_target(objects, old, new, flipped, self.masks)
        return (pixels.flip(2) if flipped else pixels), target


class DetectionLoader:
    """Endless supply of a run's batches for `engine.loop.fit`: a pure function of (seed, step)."""

    def __init__(
        self, data: DetectionData, cfg: CfgNode, *, global_batch: int, device: torch.device
    ) -> None:
        self.device = device
        self.workers, self.timeout = cfg.DATA.NUM_WORKERS, cfg.DATA.TIMEOUT
        accumulation = cfg.TRAIN.ACCUMULATION_STEPS
        world = distributed.world_size()
        self.plan = BatchPlan(len(data), global_batch, cfg.SEED, world, accumulation)
        self.images = TrainingImages(
            data, Resizing.for_training(cfg.DETECTION), cfg.SEED, cfg.MODEL.RCNN.MASKS
        )
        seen = self.plan.steps_per_epoch * global_batch // world
        self.bad = BadImages(cfg.DATA.MAX_BAD_FRACTION, seen)

    def from_step(self, step: int, total_steps: int) -> Iterator[tuple[int, list[DetectionBatch]]]:
        """Yield (step, micro-batches) from `step` up to (not including) `total_steps`."""
        requests = RequestSampler(self.plan, distributed.rank(), step, total_steps)
        fetched = batches.fetch_in_order(
            self.images, requests, self.workers, self.timeout, self.device
        )
        with contextlib.closing(fetched):
            for current in range(step, total_steps):
                yield (
                    current,
                    [self._to_device(next(fetched)) for _ in range(self.plan.accumulation)],
                )

    def _to_device(self, item: Any) -> DetectionBatch:
        self.bad.count(item["epoch"], item["failures"])
        images = [to_float(image, self.device) for image in item["images"]]
        targets = [
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in target.items()}
            for target in item["targets"]
        ]
        indices = item["indices"]
        return DetectionBatch(images, torch.full_like(indices, -1), indices, targets)


def to_float(image: Tensor, device: torch.device) -> Tensor:
    """Return a uint8 image as float32 in [0, 1] on `device`."""
    return image.to(device, non_blocking=True).float() / 255


class _TestImages(Dataset[dict[str, Any]]):
    """Resized test images; an unreadable one is an error, since evaluations replace nothing."""

    def __init__(self, data: DetectionData, resizing: Resizing) -> None:
        self.data, self.resizing = data, resizing

    def __getitem__(self, request: Request) -> dict[str, Any]:
        (index,) = map(int, request.indices)
        try:
            image = self.data.load(index)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            return {
                "failure": f"cannot read {self.data.name(index)}: {reason}. Repair or remove it"
            }
        size = (image.shape[1], image.shape[2])
        return {"index": index, "size": size, "image": resize(image, self.resizing.shape(*size))}


def images_of_test(
    data: DetectionData, cfg: CfgNode, device: torch.device, count: int = 0
) -> Iterator[tuple[int, tuple[int, int], Tensor]]:
    """Yield (index, original (height, width), resized image in [0, 1]) of this rank's test images.

    `count` limits them to the first so many on rank 0 (for pictures). Raises `BadImagesError` for
    an image that cannot be read.
    """
    mine = range(count) if count else range(distributed.rank(), len(data), distributed.world_size())
    requests = [Request(0, 0, np.array([index])) for index in mine if index < len(data)]
    images = _TestImages(data, Resizing.for_test(cfg.DETECTION))
    fetched = batches.fetch_in_order(
        images, requests, cfg.DATA.NUM_WORKERS, cfg.DATA.TIMEOUT, device
    )
    with contextlib.closing(fetched):
        for item in fetched:
            if "failure" in item:
                raise BadImagesError(item["failure"])
            yield item["index"], item["size"], to_float(item["image"], device)
