"""Training batches and test images of a detector, which differ in size."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from yacs.config import CfgNode

from data.dense import DenseLoader, TrainingSamples, samples_in_order
from data.sampler import BatchPlan
from data.worker import Loaded
from detection.augment import Augmentation, Cropping, Resizing, Target, resize
from detection.sources.annotations import DetectionData, Objects
from utils import distributed
from utils.batch import Batch

PADDED_TO = 32  # the largest stride of a pyramid's maps but the last

Samples = list[tuple[Tensor, Target]]
TestImage = tuple[int, tuple[int, int], Tensor]  # index, original (height, width), resized image


@dataclass(frozen=True)
class DetectionBatch(Batch):
    """One micro-batch: `views` are the images, each float32 (3,H,W) in [0, 1], resized.

    `targets` hold boxes float32 (n,4), labels int64 (n,) and, for Mask R-CNN, masks uint8 (n,H,W).
    An image as a whole has no label: `labels` are -1.
    """

    targets: list[Target]


class DetectionLoader(DenseLoader[Samples, DetectionBatch]):
    """Endless supply of a run's batches for `engine.loop.fit`: a pure function of (seed, step)."""

    def __init__(
        self, data: DetectionData, cfg: CfgNode, *, global_batch: int, device: torch.device
    ) -> None:
        augment = Augmentation(
            Resizing.for_training(cfg.DETECTION),
            Cropping.for_training(cfg.DETECTION),
            cfg.MODEL.RCNN.MASKS,
        )
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


def batches_of_test(
    data: DetectionData, cfg: CfgNode, device: torch.device, count: int = 0
) -> Iterator[list[TestImage]]:
    """Yield this rank's test images in batches of `TRAIN.BATCH_SIZE` that are padded alike.

    So each image is padded as it would be alone, and its result does not depend on which others
    come with it. `count` limits them to the first so many on rank 0 (for pictures). Raises
    `BadImagesError` for an image that cannot be read.
    """
    samples = samples_in_order(
        data,
        _Prepare(Resizing.for_test(cfg.DETECTION)),
        device=device,
        workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        count=count,
    )
    waiting: dict[tuple[int, ...], list[TestImage]] = {}  # as uint8, in the host's memory
    for index, (size, image) in samples:
        padded = tuple(-(-side // PADDED_TO) for side in image.shape[1:])
        group = waiting.setdefault(padded, [])
        group.append((index, size, image))
        if len(group) == cfg.TRAIN.BATCH_SIZE:
            yield _on_device(waiting.pop(padded), device)
    # groups that never became full
    for group in waiting.values():
        yield _on_device(group, device)


def _on_device(group: list[TestImage], device: torch.device) -> list[TestImage]:
    return [(index, size, to_float(image, device)) for index, size, image in group]
