"""Labels of a whole image: in one piece, by windows, and averaged over scales and mirroring."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segmentation.heads import resize

# Rows of the result at a time: few enough that all classes of them stay in a processor's cache. A
# GPU gets more work at once.
_ROWS_CPU, _ROWS_GPU = 8, 256

# Maps images (1,3,H,W) to logits (G,C,h,w) of G heads, float32.
Network = Callable[[Tensor], Tensor]
Size = tuple[int, int]


@dataclass(frozen=True)
class Inference:
    """How a network sees a test image: in one piece, or by overlapping windows of `crop`."""

    crop: Size
    stride: Size
    slide: bool = False
    # a ViT takes windows of this size only, so smaller images are enlarged
    fixed: bool = False

    def logits(self, network: Network, image: Tensor) -> Tensor:
        """Return logits (G,C,h,w) of a normalised image (3,H,W), at any size."""
        if self.slide:
            image = at_least(image, self.crop) if self.fixed else image
            return slide(network, image, self.crop, self.stride)
        return network(image[None])


def predict(network: Network, image: Tensor, size: Size, how: Inference) -> Tensor:
    """Return the labels (G,H,W) that G heads give an image (3,h,w), at the original `size`."""
    logits = how.logits(network, image)
    # max() finds the place of the largest class twice as fast as argmax()
    rows = [band.max(dim=1)[1] for _, band in in_bands(logits, image.shape[1:], size)]
    return torch.cat(rows, dim=1)


def predict_scales(
    network: Network, images: Sequence[Tensor], size: Size, how: Inference, flip: bool = True
) -> Tensor:
    """Return the labels (G,H,W) of one image at several scales, plain and mirrored.

    What is averaged are the probabilities at the original `size`.
    """
    total = None
    for image in images:
        for mirrored in (False, True) if flip else (False,):
            logits = how.logits(network, image.flip(2) if mirrored else image)
            # turned back while the map is small
            logits = logits.flip(3) if mirrored else logits
            if total is None:
                # One running sum: a map for each pass would be gigabytes.
                total = logits.new_zeros(*logits.shape[:2], *size)
            for rows, band in in_bands(logits, image.shape[1:], size):
                total[:, :, rows] += band.softmax(dim=1)
    assert total is not None
    return total.max(dim=1)[1]


def slide(network: Network, image: Tensor, crop: Size, stride: Size) -> Tensor:
    """Return logits (G,C,H,W) of an image (3,H,W): the mean over the windows that hold a pixel."""
    height, width = image.shape[1:]
    total: Tensor | None = None
    count = image.new_zeros(height, width)
    for top in starts(height, crop[0], stride[0]):
        for left in starts(width, crop[1], stride[1]):
            rows, columns = slice(top, top + crop[0]), slice(left, left + crop[1])
            window = image[:, rows, columns]
            # summed at the input's size: windows do not meet on the cells of a smaller map
            logits = resize(network(window[None]), window.shape[1:])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, rows, columns] += logits
            count[rows, columns] += 1
    assert total is not None
    return total / count


def starts(side: int, crop: int, stride: int) -> list[int]:
    """Return where windows begin along a side; the last one ends with it."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    return [max(min(number * stride + crop, side) - crop, 0) for number in range(count)]


def at_least(image: Tensor, crop: Size) -> Tensor:
    """Enlarge an image (3,H,W), its ratio kept, until no side is below the crop's."""
    height, width = image.shape[1:]
    scale = max(crop[0] / height, crop[1] / width)  # the shorter side decides
    if scale <= 1.0:
        return image
    size = max(crop[0], round(height * scale)), max(crop[1], round(width * scale))
    return resize(image[None], size)[0]


def in_bands(logits: Tensor, *sizes: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Resize logits (G,C,h,w) to each of `sizes` in turn; yield rows, and these rows of the result.

    The published evaluation resizes to the network's input first, then to the original image.
    """
    height = logits.shape[2]
    weights = torch.eye(height, device=logits.device)
    for rows, columns in sizes:
        # Bilinear resizing treats rows and columns apart. Columns are resized here; for the rows,
        # the identity matrix goes through the same resizing and becomes the matrix of its weights.
        logits = resize(logits, (height, columns))
        weights = resize(weights[None, None], (rows, height))[0, 0]
    step = _ROWS_CPU if logits.device.type == "cpu" else _ROWS_GPU
    for first in range(0, len(weights), step):
        band = weights[first : first + step]
        used = band.any(dim=0).nonzero().flatten().tolist()
        source = slice(used[0], used[-1] + 1)  # a band needs a few rows of the source only
        with torch.autocast(logits.device.type, enabled=False):
            yield slice(first, first + len(band)), band[:, source] @ logits[:, :, source]
