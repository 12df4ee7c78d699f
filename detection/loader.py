"""Training batches and test images of a detector: keyed flips and resizes, of different sizes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from yacs.config import CfgNode

from data.batch import Batch
from data.dense import DenseLoader, TrainingSamples, samples_in_order
from data.sampler import BatchPlan
from data.worker import Loaded
from detection.sources.annotations import DetectionData, Objects
from utils import distributed
from utils.randomness import uniform

_FLIP, _SIZE = 1, 2  # streams of draws, see utils.randomness
_FINER = 3  # odd, so that a pixel's centre is one of the finer pixels' centre

Target = dict[str, Tensor]
Samples = list[tuple[Tensor, Target]]


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


@dataclass(frozen=True)
class Augmentation:
    """Flip and resize a training image with its objects, drawn by the sample's key."""

    resizing: Resizing
    masks: bool

    def __call__(self, image: Tensor, objects: Objects, key: np.ndarray) -> tuple[Tensor, Target]:
        """Return the image, uint8, and its target."""
        old = (image.shape[1], image.shape[2])
        new = self.resizing.shape(*old, choice=float(uniform(key, _SIZE)[0]))
        flipped = bool(uniform(key, _FLIP)[0] < self.resizing.flip)
        pixels = resize(image, new)
        target = resized_target(objects, old, new, flipped, self.masks)
        return (pixels.flip(2) if flipped else pixels), target


class DetectionLoader(DenseLoader[Samples, DetectionBatch]):
    """Endless supply of a run's batches for `engine.loop.fit`: a pure function of (seed, step)."""

    def __init__(
        self, data: DetectionData, cfg: CfgNode, *, global_batch: int, device: torch.device
    ) -> None:
        augment = Augmentation(Resizing.for_training(cfg.DETECTION), cfg.MODEL.RCNN.MASKS)
        world, accumulation = distributed.world_size(), cfg.TRAIN.ACCUMULATION_STEPS
        super().__init__(
            # images of a batch differ in size: they stay a list
            TrainingSamples(data, cfg.SEED, augment, collate=list),
            BatchPlan(len(data), global_batch, cfg.SEED, world, accumulation),
            device=device,
            workers=cfg.DATA.NUM_WORKERS,
            timeout=cfg.DATA.TIMEOUT,
            max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
        )

    def finish(self, loaded: Loaded, samples: Samples) -> DetectionBatch:
        """Copy images and targets to the device."""
        images = [to_float(image, self.device) for image, _ in samples]
        targets = [
            {name: tensor.to(self.device, non_blocking=True) for name, tensor in target.items()}
            for _, target in samples
        ]
        indices = loaded["indices"]
        return DetectionBatch(images, torch.full_like(indices, -1), indices, targets)


def to_float(image: Tensor, device: torch.device) -> Tensor:
    """Return a uint8 image as float32 in [0, 1] on `device`."""
    return image.to(device, non_blocking=True).float() / 255


@dataclass(frozen=True)
class _Prepare:
    resizing: Resizing

    def __call__(self, image: Tensor, objects: Objects) -> tuple[tuple[int, int], Tensor]:
        size = (image.shape[1], image.shape[2])
        return size, resize(image, self.resizing.shape(*size))


def images_of_test(
    data: DetectionData, cfg: CfgNode, device: torch.device, count: int = 0
) -> Iterator[tuple[int, tuple[int, int], Tensor]]:
    """Yield (index, original (height, width), resized image in [0, 1]) of this rank's test images.

    `count` limits them to the first so many on rank 0 (for pictures). Raises `BadImagesError` for
    an image that cannot be read.
    """
    samples = samples_in_order(
        data,
        _Prepare(Resizing.for_test(cfg.DETECTION)),
        device=device,
        workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        count=count,
    )
    for index, (size, image) in samples:
        yield index, size, to_float(image, device)
