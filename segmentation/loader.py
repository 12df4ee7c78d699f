"""Training batches and test images of a segmenter: keyed, resumable, the same for any workers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.augment.base import View, sample_keys
from data.augment.pipeline import draw_photometric, normalise_, photometric
from data.dense import DenseLoader, TrainingSamples, samples_in_order
from data.sampler import BatchPlan
from data.worker import Loaded
from segmentation.augment import (
    CropAugmentation,
    PhotometricDistortion,
    Sample,
    Size,
    resize_region,
    scaled_size,
)
from segmentation.datasets import SegmentationData
from segmentation.sources.labels import IGNORED
from utils import distributed
from utils.batch import Batch

# images uint8 (N,3,H,W), classes uint8 (N,H,W), and the (height, width) of each that is no padding
Crops = tuple[Tensor, Tensor, list[Size]]


@dataclass(frozen=True)
class Collate:
    """Put crops into the top left of canvases of one size."""

    size: Size

    def __call__(self, samples: list[Sample]) -> Crops:
        """Return the canvases; the label of padding is ignored."""
        # channels last, as images are decoded: a crop is then copied row by row
        memory = torch.zeros((len(samples), *self.size, 3), dtype=torch.uint8)
        images = memory.permute(0, 3, 1, 2)
        labels = np.full((len(samples), *self.size), IGNORED, dtype=np.uint8)
        sizes = []
        for image, canvas, sample in zip(images, labels, samples, strict=True):
            height, width = sample.label.shape
            image[:, :height, :width] = sample.image
            canvas[:height, :width] = sample.label
            sizes.append((height, width))
        return images, torch.from_numpy(labels), sizes


class SegmentationLoader(DenseLoader[Crops, Batch]):
    """Endless batches for `engine.loop.fit`: a pure function of (seed, step).

    A batch has one view, float32 (N,3,H,W), normalised, and `labels` int64 (N,H,W), 255 ignored.
    """

    def __init__(
        self, source: SegmentationData, cfg: CfgNode, *, global_batch: int, device: torch.device
    ) -> None:
        node, self.seed = cfg.SEGMENTATION, cfg.SEED
        self.view: View = (PhotometricDistortion(),) if node.PHOTOMETRIC else ()
        height, width = node.CROP
        world, accumulation = distributed.world_size(), cfg.TRAIN.ACCUMULATION_STEPS
        plan = BatchPlan(len(source), global_batch, cfg.SEED, world, accumulation)
        super().__init__(
            TrainingSamples(source, cfg.SEED, CropAugmentation.of(node), Collate((height, width))),
            plan,
            device=device,
            workers=cfg.DATA.NUM_WORKERS,
            timeout=cfg.DATA.TIMEOUT,
            max_bad_fraction=cfg.DATA.MAX_BAD_FRACTION,
            # three channels and the label map
            batch_bytes=plan.micro_batch * height * width * 4,
        )

    def finish(self, loaded: Loaded, samples: Crops) -> Batch:
        """Change the colours of uint8 crops and normalise them, on the device."""
        crops, labels, sizes = samples
        wanted, copies = loaded["wanted"].numpy(), loaded["copies"].numpy()
        keys = sample_keys(self.seed, loaded["epoch"], wanted, 0, copies)
        images = photometric(
            crops.to(self.device, non_blocking=True), self.view, draw_photometric(self.view, keys)
        )
        for image, (height, width) in zip(images, sizes, strict=True):
            # padding is 0 after normalising, whatever the colours became
            image[:, height:] = 0
            image[:, :, width:] = 0
        target = labels.to(self.device, non_blocking=True).long()
        return Batch([images], target, loaded["indices"])


def build_train_loader(
    cfg: CfgNode, source: SegmentationData, *, global_batch: int, device: torch.device
) -> SegmentationLoader:
    """Return the endless training batches of a run on this rank."""
    return SegmentationLoader(source, cfg, global_batch=global_batch, device=device)


@dataclass(frozen=True)
class _Prepare:
    """Resize a test image to each of some ratios of the scale."""

    scale: tuple[int, int]
    ratios: tuple[float, ...]

    def __call__(self, image: Tensor, label: np.ndarray) -> tuple[list[Tensor], Tensor]:
        images = []
        for ratio in self.ratios:
            size = scaled_size((image.shape[1], image.shape[2]), self.scale, ratio)
            images.append(resize_region(image, size, 0, 0, size))
        # a copy, because torch wants memory that may be written
        return images, torch.from_numpy(label.copy())


def test_images(
    source: SegmentationData,
    cfg: CfgNode,
    device: torch.device,
    ratios: Sequence[float],
    count: int,
) -> Iterator[tuple[int, list[Tensor], np.ndarray]]:
    """Yield (index, normalised images (3,h,w), classes uint8 (H,W)) of this rank's test images.

    There is an image for each of `ratios` of the test scale; the classes have the original size.
    Each image is on exactly one rank, once. `count` gives the first so many on every rank, 0 all.
    """
    longest, shortest = cfg.SEGMENTATION.SCALE
    samples = samples_in_order(
        source,
        _Prepare((longest, shortest), tuple(ratios)),
        device=device,
        workers=cfg.DATA.NUM_WORKERS,
        timeout=cfg.DATA.TIMEOUT,
        count=count,
    )
    for index, (images, label) in samples:
        yield index, [_normalised(image, device) for image in images], label.numpy()


def _normalised(image: Tensor, device: torch.device) -> Tensor:
    levels = image.to(device, non_blocking=True).float().contiguous() / 255
    return normalise_(levels[None])[0]
