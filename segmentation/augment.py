"""Training augmentation of segmentation, as mmsegmentation's: resize, crop, flip, photometric.

Every draw is keyed by the sample. Image and label map move together.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.augment.base import BatchOp, Draws, send
from data.augment.fused.opcodes import BRIGHTNESS, CPU_ONLY, HUE, OFFSET, VIVID, WRITERS, Writer
from data.augment.ops import adjust_hue
from segmentation.sources.labels import IGNORED
from utils.randomness import uniform, uniform_between

# Streams of draws, see utils.randomness: numbers that no operation of pretraining has.
_RATIO, _FLIP, _TOP, _LEFT = 810, 811, 820, 840  # a crop draws from 820 and 840 on
_EXAMINED = 10  # crops that are looked at; the next one is taken unseen

Size = tuple[int, int]


class Sample(NamedTuple):
    """A crop, uint8 (3,h,w), and its classes, uint8 (h,w), which may be smaller than asked."""

    image: Tensor
    label: np.ndarray


def scaled_size(size: Size, scale: tuple[int, int], ratio: float = 1.0) -> Size:
    """Return the (height, width) at which an image fits the box (long, short side) `scale`.

    The box is first multiplied by `ratio`. The image's ratio is kept.
    """
    longest, shortest = (int(side * ratio) for side in scale)
    factor = min(longest / max(size), shortest / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


def resize_region(image: Tensor, size: Size, top: int, left: int, region: Size) -> Tensor:
    """Resize uint8 (3,H,W) to `size` and cut out the region (height, width) at (top, left).

    What lies below and to the right of the region is neither read nor computed.
    """
    height, width = image.shape[1:]
    if size == (height, width):
        return image[:, top : top + region[0], left : left + region[1]]
    bottom, right = top + region[0], left + region[1]
    # the filter reaches over so many rows, and one more for rounding
    rows = min(height, int(bottom * height / size[0] + max(1.0, height / size[0])) + 2)
    columns = min(width, int(right * width / size[1] + max(1.0, width / size[1])) + 2)
    # channels last, as images are decoded: the kernel is twice as fast if its result is so too
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    memory = torch.empty((1, bottom, right, 3), dtype=torch.uint8)
    resized = memory.permute(0, 3, 1, 2)
    # with the scale of the whole image: F.interpolate takes none beside a size
    torch.ops.aten._upsample_bilinear2d_aa.out(
        image[None, :, :rows, :columns],
        [bottom, right],
        False,
        size[0] / height,
        size[1] / width,
        out=resized,
    )
    return resized[0, :, top:, left:]


def nearest(label: np.ndarray, size: Size, top: int, left: int, region: Size) -> np.ndarray:
    """Resize classes (H,W) to `size` by the nearest pixel centre and cut out a region."""
    # whole numbers: a float would round some centres to the wrong side
    rows, columns = (
        (2 * np.arange(first, first + count) + 1) * old // (2 * new)
        for first, count, old, new in zip((top, left), region, label.shape, size, strict=True)
    )
    return label[rows].take(columns, axis=1)


def varied(label: np.ndarray, cat_max_ratio: float) -> bool:
    """Tell whether classes (h,w) hold more than one, none of `cat_max_ratio` of the pixels."""
    # torch counts bytes as they are, NumPy copies them to 64 bits first
    counts = torch.from_numpy(label).flatten().bincount(minlength=256).numpy()[:IGNORED]
    return int((counts > 0).sum()) > 1 and bool(counts.max() < cat_max_ratio * counts.sum())


@dataclass(frozen=True)
class CropAugmentation:
    """Resize by a drawn ratio, cut a crop that is not of one class, flip; all for one image."""

    scale: tuple[int, int]
    ratios: tuple[float, float]
    crop: Size
    cat_max_ratio: float
    flip: float

    @staticmethod
    def of(node: CfgNode) -> "CropAugmentation":
        """Read a `SEGMENTATION` section."""
        return CropAugmentation(
            tuple(node.SCALE),
            tuple(node.RATIO_RANGE),
            tuple(node.CROP),
            node.CAT_MAX_RATIO,
            node.FLIP,
        )

    def __call__(self, image: Tensor, label: np.ndarray, key: np.ndarray) -> Sample:
        """Return the crop of uint8 (3,H,W) and its classes (H,W), as the key (1,) draws it."""
        ratio = float(uniform_between(key, _RATIO, *self.ratios)[0])
        size = scaled_size((image.shape[1], image.shape[2]), self.scale, ratio)
        region = min(size[0], self.crop[0]), min(size[1], self.crop[1])
        top, left, cut = self._choose(label, size, region, key)
        pixels = resize_region(image, size, top, left, region)
        if uniform(key, _FLIP)[0] < self.flip:
            return Sample(pixels.flip(2), cut[:, ::-1])
        return Sample(pixels, cut)

    def _choose(
        self, label: np.ndarray, size: Size, region: Size, key: np.ndarray
    ) -> tuple[int, int, np.ndarray]:
        """Draw the crop's corner until its classes are varied, and return it with the classes."""
        attempts = np.arange(_EXAMINED + 1)
        tops = np.floor(uniform(key, _TOP + attempts) * (size[0] - region[0] + 1)).astype(int)
        lefts = np.floor(uniform(key, _LEFT + attempts) * (size[1] - region[1] + 1)).astype(int)
        examined = _EXAMINED if self.cat_max_ratio < 1 else 0
        if region == size:
            examined = 0  # there is one crop only
        for attempt in range(examined + 1):
            top, left = int(tops[attempt]), int(lefts[attempt])
            cut = nearest(label, size, top, left, region)
            if attempt == examined or varied(cut, self.cat_max_ratio):
                break
        return top, left, cut


@dataclass(frozen=True)
class PhotometricDistortion(BatchOp):
    """Change brightness, contrast, saturation and hue, each with probability `p`.

    As mmsegmentation's PhotoMetricDistortion, but in float: nothing is cut to whole levels between
    the steps. Contrast comes before or after the other two, and has no mean: it multiplies.
    """

    name: ClassVar[str] = "distort"
    # each of the four has a coin and an amount; the last number is the place of contrast
    streams: ClassVar[tuple[int, ...]] = (800, 801, 802, 803, 804, 805, 806, 807, 808)
    p: float = 0.5
    brightness: float = 32 / 255
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18  # of 180 half degrees

    def draw(self, keys: np.ndarray, size: int) -> Draws:
        """Draw offset (N,), factors early, late and saturation (N,), and hue (N,) in turns."""
        changed = [uniform(keys, stream) < self.p for stream in (800, 802, 804, 806)]
        offset = uniform_between(keys, 801, -self.brightness, self.brightness)
        factor = np.where(changed[1], uniform_between(keys, 803, *self.contrast), 1.0)
        steps = np.floor(uniform_between(keys, 807, -self.hue, self.hue))
        changed[3] &= steps != 0
        early = uniform(keys, 808) < 0.5
        return {
            "distort": np.any(changed, axis=0),
            "offset": np.where(changed[0], offset, 0.0),
            "early": np.where(early, factor, 1.0),
            "saturation": np.where(changed[2], uniform_between(keys, 805, *self.saturation), 1.0),
            "hue": np.where(changed[3], steps / 180, 0.0),
            "late": np.where(early, 1.0, factor),
        }

    def apply(self, x: Tensor, draws: Draws) -> Tensor:
        """Change levels in [0,1]; a step that no sample of the batch draws is left out."""
        amounts = {name: send(values, x.device) for name, values in draws.items()}
        if draws["offset"].any():
            x = (x + amounts["offset"][:, None, None, None]).clamp_(0.0, 1.0)
        x = _multiplied(x, draws["early"], amounts["early"])
        if draws["hue"].any():
            x = adjust_hue(x, amounts["hue"], amounts["saturation"])
        elif (draws["saturation"] != 1.0).any():
            x = _saturated(x, amounts["saturation"][:, None, None, None])
        return _multiplied(x, draws["late"], amounts["late"])


def _distort(op: BatchOp, draws: Draws, writer: Writer) -> None:
    """Write the same steps for the fused kernel; one with a neutral amount is left out."""
    for name, code, neutral in (
        ("offset", OFFSET, 0.0),
        # the factor of a brightness without a mean is what mmsegmentation calls contrast
        ("early", BRIGHTNESS, 1.0),
        ("saturation", VIVID, 1.0),
        ("hue", HUE, 0.0),
        ("late", BRIGHTNESS, 1.0),
    ):
        writer.add(draws[name] != neutral, code, draws[name])


WRITERS[PhotometricDistortion] = _distort
CPU_ONLY.add(PhotometricDistortion)


def _multiplied(x: Tensor, drawn: np.ndarray, factors: Tensor) -> Tensor:
    if (drawn == 1.0).all():
        return x
    return (x * factors[:, None, None, None]).clamp_(max=1.0)


def _saturated(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the S of HSV by `factors` (N,1,1,1), S at most 1, and leave H and V."""
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # S = chroma / value is at most 1, so value / chroma is the largest factor; grey has chroma 0
    return torch.lerp(value, x, torch.minimum(value / chroma.clamp_(min=1e-8), factors))
