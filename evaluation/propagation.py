"""Carry masks through a video by the similarity of features, and score them (DAVIS 2017).

The label propagation of Jabri et al. 2020 (arXiv:2006.14613) with the settings of DINO (Caron et
al. 2021, section 4.2.3), and the measures J and F of Perazzi et al. 2016.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 25  # affinities held at a time: 128 MiB of float32


class PropagationConfig(NamedTuple):
    """How labels are carried on: from the first and the last `context` frames, from near cells."""

    context: int = 7
    radius: int = 12  # cells up, down, left and right
    topk: int = 5
    temperature: float = 0.1


def propagate(
    features: Iterable[Tensor], first: Tensor, config: PropagationConfig | None = None
) -> Iterator[Tensor]:
    """Yield the soft labels (C, h, w) of the second frame and those after it.

    `features` gives a map (F, h, w) a frame, the first frame's included; `first` (C, h, w) are
    its labels. What is carried on is soft.
    """
    config = config or PropagationConfig()
    frames = iter(features)
    start = F.normalize(next(frames).float(), dim=0)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=config.context)
    for raw in frames:
        frame = F.normalize(raw.float(), dim=0)
        maps, labels = zip((start, first), *recent, strict=True)
        carried = carry_labels(frame, torch.stack(maps), torch.stack(labels), config)
        recent.append((frame, carried))
        yield carried


def carry_labels(
    target: Tensor, sources: Tensor, labels: Tensor, config: PropagationConfig
) -> Tensor:
    """Return the labels (C, h, w) of a frame from those of T others.

    `target` (F, h, w) and `sources` (T, F, h, w) have features of length 1, `labels` are (T,
    C, h, w). A cell takes the mean of the labels of the cells within `radius` that are among its
    `topk` most similar (ties included), weighted by exp(cosine / temperature).
    """
    height, width = target.shape[1:]
    cells = height * width
    bank = sources.flatten(2).transpose(0, 1).flatten(1)  # (F, T * cells)
    values = labels.float().flatten(2).transpose(0, 1).flatten(1)  # (C, T * cells)
    near = _near(height, width, config.radius, target.device)
    parts = []
    step = max(1, _CHUNK_ELEMENTS // bank.shape[1])
    for begin in range(0, cells, step):
        queries = target.flatten(1)[:, begin : begin + step]
        affinity = (queries.T @ bank / config.temperature).exp_()  # (n, T * cells)
        affinity *= near[begin : begin + step].repeat(1, len(sources))
        weakest = affinity.topk(min(config.topk, affinity.shape[1]), dim=1).values[:, -1:]
        affinity = torch.where(affinity >= weakest, affinity, 0.0)
        parts.append(values @ (affinity / affinity.sum(dim=1, keepdim=True)).T)
    return torch.cat(parts, dim=1).unflatten(1, (height, width))


def _near(height: int, width: int, radius: int, device: torch.device) -> Tensor:
    """Return (cells, cells) of 0 and 1: which cells lie within `radius` both ways."""
    row, col = (torch.arange(n, device=device) for n in (height, width))
    rows, cols = ((axis[:, None] - axis).abs() <= radius for axis in (row, col))
    return (rows[:, None, :, None] & cols[None, :, None, :]).reshape(height * width, -1).float()


def shrink_mask(mask: Tensor, size: tuple[int, int], num_labels: int) -> Tensor:
    """Return the labels (C, h, w), one-hot, of an index mask (H, W) at the cells' centres."""
    small = _sampled(mask, size).long()
    return F.one_hot(small, num_labels).permute(2, 0, 1).float()


def enlarge_labels(labels: Tensor, frame_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return the index mask of `size` (H, W) from soft labels (C, h, w).

    Labels are enlarged to the frame that the network saw, each stretched to [0, 1], the largest
    wins; the result is then brought to `size` without interpolation.
    """
    soft = F.interpolate(labels[None], size=frame_size, mode="bilinear", align_corners=False)[0]
    low = soft.amin(dim=(1, 2), keepdim=True)
    span = soft.amax(dim=(1, 2), keepdim=True) - low
    soft = torch.where(span > 0, (soft - low) / span.clamp(min=1e-12), soft)
    return _sampled(soft.argmax(dim=0), size).to(torch.uint8)


def _sampled(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return an index mask (H, W) at `size`, as float32."""
    # not "nearest": that reads the corner of a cell and shifts masks by half a cell
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest-exact")[0, 0]


def region_similarity(mask: Tensor, truth: Tensor) -> float:
    """Return J, the intersection over union of two boolean masks (H, W); 1 where both are empty."""
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 1.0


def contour_accuracy(mask: Tensor, truth: Tensor, tolerance: float = 0.008) -> float:
    """Return F, the harmonic mean of precision and recall of the contours of boolean masks (H, W).

    A contour pixel is right if the other contour comes within `tolerance` diagonals of the image,
    rounded up.
    """
    reach = math.ceil(tolerance * math.hypot(*mask.shape))
    contours = contour(mask), contour(truth)
    drawn, real = (int(line.sum()) for line in contours)
    if not drawn and not real:
        return 1.0
    if not drawn or not real:
        return 0.0
    precision = int((contours[0] & _widened(contours[1], reach)).sum()) / drawn
    recall = int((contours[1] & _widened(contours[0], reach)).sum()) / real
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(mask: Tensor) -> Tensor:
    """Return the pixels (H, W) of a mask that differ from the one right, below, or right below."""
    line = torch.zeros_like(mask)
    line[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    line[:-1] |= mask[:-1] != mask[1:]
    line[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return line


def _widened(line: Tensor, reach: int) -> Tensor:
    """Return the pixels within a distance of `reach` of a line (H, W)."""
    offset = torch.arange(-reach, reach + 1)
    disk = (offset[:, None] ** 2 + offset**2 <= reach**2).float()
    near = F.conv2d(line[None, None].float(), disk[None, None], padding=reach)
    return near[0, 0] > 0.5


class Measure(NamedTuple):
    """An object's J or F over frames, as the table of DAVIS has it."""

    mean: float
    recall: float  # share of the frames above 0.5
    decay: float  # mean of the first quarter of the frames minus that of the last

    @classmethod
    def of(cls, values: Sequence[float]) -> "Measure":
        """Sum up the values of an object's frames."""
        # DAVIS's quarters share the frame between them, and round its place half up
        second, last = ((len(values) - 1) * quarter + 2 for quarter in (1, 3))
        decay = _mean(values[: second // 4 + 1]) - _mean(values[last // 4 :])
        return cls(_mean(values), _mean([float(value > 0.5) for value in values]), decay)


class Quality(NamedTuple):
    """J and F of one object."""

    region: Measure
    contour: Measure


def video_quality(masks: Tensor, truth: Tensor, void: str = "skip") -> dict[int, Quality]:
    """Return the quality of every object of index masks (T, H, W); 255 in `truth` is void.

    `void` is `skip`, or `background`: an object found there is then wrong, as DAVIS 2017 counts it.
    The first frame is given and the last not counted, as in the benchmark, where there are more
    than two.
    """
    counted = slice(1, -1) if len(truth) > 2 else slice(1, None)
    objects = [int(label) for label in truth[0].unique() if label not in (0, 255)]
    quality = {}
    for label in objects:
        pairs = [
            ((mask == label) & ((real != 255) | (void == "background")), real == label)
            for mask, real in zip(masks[counted], truth[counted], strict=True)
        ]
        regions = Measure.of([region_similarity(*pair) for pair in pairs])
        contours = Measure.of([contour_accuracy(*pair) for pair in pairs])
        quality[label] = Quality(regions, contours)
    return quality


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
