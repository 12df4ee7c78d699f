"""JPEGs decoded where the networks run (`DATA.DECODE` device): workers only read files.

On a GPU torchcodec or torchvision hands a batch to nvJPEG, a separate unit of the GPU. Its levels
differ from libjpeg's by a few, and damage that only a decoder notices may pass. Elsewhere the same
code decodes on the CPU. Crops have the draws of `data.worker`, and within one level its pixels.
"""

import contextlib
import functools
import logging
from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augment.base import Recipe, needs_pil, sample_keys, send, spatial_ops
from data.augment.crops import RandomResizedCrop
from data.augment.resample import crop_resize
from data.decode import (
    MAX_PIXELS,
    decode_rgb,
    fast_jpeg,
    hide_orientation,
    refuse_costly,
    torch_jpegs,
)
from data.sampler import Request
from data.sources.base import Source
from data.worker import Fetched, Fetcher, Loaded, loaded_as

logger = logging.getLogger("synco")

_PIXELS_AT_ONCE = 1 << 24  # of a padded batch of crops: 200 MB of floats


class Encoded(Loaded):
    """A micro-batch as a worker read it."""

    blob: Tensor  # uint8: the files one after another; few tensors, because each costs a descriptor
    ends: Tensor  # (N,) where each file ends in it
    # uint8 (3,H,W) of the places that only the host decodes: PNG, CMYK, damage
    pixels: dict[int, Tensor]


def check_decodable(recipe: Recipe, source: Source) -> None:
    """Refuse what cannot be decoded on the device, with a ValueError that names the key."""
    if not source.pixels.plain:
        raise ValueError("DATA.DECODE 'device' decodes 8-bit RGB only; use 'worker'")
    crops_first = all(isinstance(spatial_ops(view)[0], RandomResizedCrop) for view in recipe)
    if needs_pil(recipe) or not crops_first:
        raise ValueError(
            "DATA.DECODE 'device' runs views that start with a random resized crop and have no "
            "RandAugment; use 'worker'"
        )
    if fast_jpeg() is None:
        remedy = "pip install simplejpeg, or use 'worker'"
        raise ValueError(f"DATA.DECODE 'device' needs simplejpeg: {remedy}")
    if not source.holds_files:
        raise ValueError("DATA.DECODE 'device' needs a data set of encoded images; use 'worker'")


class FileReader(Dataset[Encoded]):
    """Turn a request into encoded images; what the device will not decode comes as pixels.

    Bad images are replaced by the rule of `host`.
    """

    def __init__(self, host: Fetcher) -> None:
        self.host = host

    def __getitem__(self, request: Request) -> Encoded:
        """Read the images of a request."""
        failures: list[tuple[str, str]] = []
        files: list[Tensor] = []
        pixels: dict[int, Tensor] = {}
        loaded: list[int] = []
        for place, wanted in enumerate(request.indices.tolist()):
            index, image = self.host.load(request.epoch, wanted, failures, self.read)
            assert image is not None  # there is a seed: bad images are replaced
            loaded.append(index)
            if image.ndim == 3:
                pixels[place] = image
            files.append(image if image.ndim == 1 else image.new_empty(0))
        return {
            "blob": torch.cat(files),
            "ends": torch.tensor([len(file) for file in files]).cumsum(0),
            "pixels": pixels,
            **loaded_as(request, loaded, failures),
        }

    def read(self, index: int) -> Tensor:
        """Return a whole, plain JPEG as uint8 (bytes,), another image as uint8 (3,H,W)."""
        data = self.host.source.encoded(index)
        assert data is not None
        max_pixels = self.host.source.max_pixels
        file = bytearray(data)
        if is_plain_jpeg(data, max_pixels) and hide_orientation(file):
            return torch.frombuffer(file, dtype=torch.uint8)
        return decode_rgb(data, max_pixels)


def is_plain_jpeg(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> bool:
    """Tell whether a file is a whole grey or YCbCr JPEG: the host decodes all others."""
    if data[:3] != b"\xff\xd8\xff" or data[-2:] != b"\xff\xd9":
        return False
    simple = fast_jpeg()
    assert simple is not None  # check_decodable
    try:
        height, width, colours, _ = simple.decode_jpeg_header(data)
        refuse_costly(data, width, height, max_pixels)
    except ValueError:
        return False
    return colours in ("YCbCr", "Gray") and height * width <= _PIXELS_AT_ONCE


def decode(item: Encoded, host: Fetcher, device: torch.device) -> list[Tensor]:
    """Decode a micro-batch: uint8 (3,H,W) each, on `device`.

    If the batch fails, `host` decodes each of it, and replaces a bad one as a worker would: `item`
    gets the failure, and the index of what was taken.
    """
    files = torch.tensor_split(item["blob"], item["ends"][:-1])
    images = dict(item["pixels"])
    encoded = [place for place in range(len(files)) if place not in images]
    try:
        decoded = _decode_jpegs([files[place] for place in encoded], device)
        images |= zip(encoded, decoded, strict=True)
    except torch.OutOfMemoryError:  # a RuntimeError too, but no image is to blame
        raise
    except RuntimeError as error:
        _report(str(error).splitlines()[0])
        for place in encoded:
            index, image = host.load(item["epoch"], int(item["wanted"][place]), item["failures"])
            assert image is not None  # there is a seed
            item["indices"][place], images[place] = index, image
    return [images[place].to(device, non_blocking=True) for place in range(len(files))]


@functools.cache
def _report(reason: str) -> None:
    """Log each reason once: one bad file fails a batch, a missing decoder every batch."""
    logger.warning(
        "DATA.DECODE: the device cannot decode a batch (%s); the host decodes such batches", reason
    )


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor]:
    if not files:
        return []
    decode_files = torch_jpegs(device if device.type == "cuda" else torch.device("cpu"))
    if decode_files is None:
        raise RuntimeError(f"neither torchcodec nor torchvision decodes JPEGs on {device}")
    if device.type != "cuda":
        return decode_files(files)
    # A stream of its own. torchcodec waits for its stream, which must not be that of the training.
    # torchvision does not wait for the current stream, and would write into memory that a running
    # step still reads: the pool of this stream holds none.
    current, stream = torch.cuda.current_stream(device), _decoding_stream(device)
    with torch.cuda.stream(stream):
        images = decode_files(files)
    current.wait_stream(stream)
    for image in images:
        image.record_stream(current)  # not to be reused before the crops are cut
    return images


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def decode_in_order(
    items: Generator[Encoded, None, None], host: Fetcher, device: torch.device
) -> Generator[Fetched, None, None]:
    """Decode and crop what workers read, with the recipe and the seed of `host`."""
    with contextlib.closing(items):
        for item in items:
            images = decode(item, host, device)  # may note failures in `item`
            yield {
                "views": crops(images, item, host.recipe, host.seed or 0),
                "epoch": item["epoch"],
                "wanted": item["wanted"],
                "copies": item["copies"],
                "indices": item["indices"],
                "failures": item["failures"],
            }


def crops(images: Sequence[Tensor], item: Encoded, recipe: Recipe, seed: int) -> list[Tensor]:
    """Cut and resize every view of uint8 images (3,H,W) of any size: uint8 (N,3,S,S) each."""
    heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
    views = []
    for number, view in enumerate(recipe):
        op = spatial_ops(view)[0]
        assert isinstance(op, RandomResizedCrop)
        wanted, copies = item["wanted"].numpy(), item["copies"].numpy()
        keys = sample_keys(seed, item["epoch"], wanted, number, copies)
        views.append(_crop_ragged(images, op.draw(keys, heights, widths), op))
    return views


def _crop_ragged(images: Sequence[Tensor], boxes: np.ndarray, op: RandomResizedCrop) -> Tensor:
    """Resize the windows `boxes` (N,4) of images of different sizes."""
    device = images[0].device
    out = torch.empty((len(images), 3, op.size, op.size), dtype=torch.uint8, device=device)
    for group in _groups(boxes[:, 2], boxes[:, 3]):
        height, width = boxes[group, 2:].max(axis=0).tolist()
        padded = torch.zeros((len(group), 3, height, width), dtype=torch.uint8, device=device)
        for target, place in zip(padded, group.tolist(), strict=True):
            top, left, h, w = boxes[place].tolist()
            target[:, :h, :w] = images[place][:, top : top + h, left : left + w]
        whole = boxes[group]
        whole[:, :2] = 0  # the windows lie at the corners of the padded batch
        out[send(group, device)] = crop_resize(padded, whole, op.size, op.interpolation)
    return out


def _groups(heights: np.ndarray, widths: np.ndarray) -> list[np.ndarray]:
    """Return the places in groups of like height whose padded batch is not too large."""
    groups, start = [], 0
    order = np.argsort(-heights, kind="stable")
    for stop in range(1, len(order) + 1):
        following = order[start : stop + 1]
        pixels = len(following) * int(heights[following].max()) * int(widths[following].max())
        if stop == len(order) or pixels > _PIXELS_AT_ONCE:
            groups.append(order[start:stop])
            start = stop
    return groups
