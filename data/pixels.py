"""Images that are not 8-bit RGB: any number of channels, 16-bit and float levels, as [0,1].

An image that is 8-bit RGB takes the way of `data.decode`, as uint8.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from yacs.config import CfgNode

from data.augment.base import IMAGENET_MEAN, IMAGENET_STD
from data.decode import (
    BITS,
    MAX_PIXELS,
    NUMPY,
    SAMPLES,
    TIFF,
    TYPE,
    decode_rgb,
    open_image,
    refuse_costly,
)

BY_TYPE = "type"
ARRAY_EXTENSION = ".npy"


@dataclass(frozen=True)
class Pixels:
    """What the pixels of a data set are: channels, the range that becomes [0,1], mean and std.

    `range` is None for 8 bits, `BY_TYPE` for the range of an image's integer type ([0,1] for
    floats), or (low, high).
    """

    channels: int = 3
    range: str | tuple[float, float] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def plain(self) -> bool:
        """Tell whether images are read as uint8 RGB."""
        return self.channels == 3 and self.range is None

    @property
    def rgb(self) -> bool:
        """Tell whether the channels are colours."""
        return self.channels == 3

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of decoded images."""
        return torch.uint8 if self.plain else torch.float32


PLAIN = Pixels()


def pixels_of(node: CfgNode) -> Pixels:
    """Return what a `DATA` section says; a ValueError names the key to change."""
    channels = node.CHANNELS
    mean, std = tuple(map(float, node.MEAN)), tuple(map(float, node.STD))
    for key, values in (("MEAN", mean), ("STD", std)):
        if values and len(values) != channels:
            raise ValueError(
                f"DATA.{key} has {len(values)} numbers, DATA.CHANNELS is {channels}; give one for "
                "each channel"
            )
    if bool(mean) != bool(std):
        raise ValueError("DATA.MEAN and DATA.STD: give both or none")
    if std and min(std) <= 0:
        raise ValueError(f"DATA.STD {list(std)} must be above 0; is a channel constant?")
    if not mean:
        if channels != 3:
            raise ValueError(
                f"DATA.CHANNELS is {channels}, and the mean and deviation of these channels are "
                "not known; tools/prepare/channel_statistics.py computes DATA.MEAN and DATA.STD"
            )
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return Pixels(channels, parse_range(node.RANGE), mean, std)


def refuse_other_pixels(node: CfgNode) -> None:
    """Raise `ValueError` where a `DATA` section asks for what only reads 8-bit RGB as usual."""
    if pixels_of(node) != PLAIN:
        raise ValueError(
            "DATA.CHANNELS, RANGE, MEAN, STD: this program reads 8-bit RGB with ImageNet's mean "
            "and deviation only; docs/channels.md lists the programs that read other images"
        )


def parse_range(text: str, name: str = "DATA.RANGE") -> str | tuple[float, float] | None:
    """Read DATA.RANGE: "", "type" or "low,high"; `name` is for the message."""
    if not text:
        return None
    if text == BY_TYPE:
        return BY_TYPE
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"{name} {text!r} must be empty (8 bits), 'type', or two numbers such as 0,4095"
        )
    return low, high


def decode(data: bytes | memoryview, pixels: Pixels, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image: uint8 (3,H,W) where `pixels` are plain, else float32 (C,H,W) in [0,1]."""
    if pixels.plain:
        return decode_rgb(data, max_pixels)
    array = _read(data, pixels.channels, max_pixels)
    # a grey image among colours, as decode_rgb reads it
    if pixels.rgb and array.shape[0] == 1:
        array = np.repeat(array, 3, axis=0)
    if len(array) != pixels.channels:
        raise ValueError(f"it has {len(array)} channels, DATA.CHANNELS is {pixels.channels}")
    low, high = _limits(array.dtype, pixels.range)
    # Through float32 a 32-bit integer would lose levels before the range is taken out.
    wide = np.float64 if array.dtype.itemsize >= 4 else np.float32
    levels: np.ndarray = np.subtract(array, low, dtype=wide)
    levels /= high - low
    if not np.isfinite(levels).all():
        raise ValueError("it has pixels that are not finite; mask them out")
    return torch.from_numpy(levels.astype(np.float32)).clamp_(0.0, 1.0)


def _limits(dtype: np.dtype, wanted: str | tuple[float, float] | None) -> tuple[float, float]:
    if isinstance(wanted, tuple):
        return wanted
    if wanted is None and dtype != np.uint8:
        raise ValueError(
            f"{dtype} pixels; set DATA.RANGE to what they span, such as 0,4095, or to type"
        )
    if dtype.kind == "f":
        return 0.0, 1.0
    # A signed type has its zero in the middle of [0,1] then; a given range can do otherwise.
    limits = np.iinfo(dtype)
    return float(limits.min), float(limits.max)


def _read(data: bytes | memoryview, channels: int, max_pixels: int) -> np.ndarray:
    """Return the pixels (C,H,W) in the type in which they are stored."""
    if data[:6] == NUMPY:
        return _planes(_read_numpy(data, max_pixels), channels)
    if data[:4] in TIFF and (channels not in (1, 3) or not _pil_can(data, channels)):
        return _planes(_read_tiff(data, channels, max_pixels), channels)
    with open_image(data, max_pixels) as image:
        return _planes(_read_by_pil(data, image, channels), channels)


def _read_by_pil(data: bytes | memoryview, image: Image.Image, channels: int) -> np.ndarray:
    """Return (H,W) or (H,W,C), without the transparency that no channel asks for."""
    if image.format == "PNG" and data[24] > 8:  # the depth in a PNG's head
        if image.mode.startswith("I"):
            return np.array(image).astype(np.uint16)  # older versions of PIL give int32
        return _deep_colours(data, image.mode)[..., : max(3, channels)]
    kept = ("L", "RGB", "F", *(("RGBA",) if channels == 4 else ()))
    if image.mode not in kept and not image.mode.startswith("I"):
        image = image.convert("L" if image.mode in ("1", "LA") and channels == 1 else "RGB")
    return np.array(image)


def _deep_colours(data: bytes | memoryview, mode: str) -> np.ndarray:
    """Return the pixels (H,W,C) uint16 of a PNG of 16-bit colours."""
    if mode not in ("RGB", "RGBA"):
        raise ValueError("a PNG of 16-bit grey with transparency is not supported; remove that")
    # PIL keeps one byte of two: the first when told that the order is "B", the second with "L".
    halves = []
    for order in "BL":
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.tile = [tile._replace(args=f"{mode};16{order}") for tile in image.tile]
            halves.append(np.array(image).astype(np.uint16))
    return halves[0] << 8 | halves[1]


def _planes(array: np.ndarray, channels: int) -> np.ndarray:
    """Return (C,H,W) of an array (H,W), (H,W,C) or (C,H,W)."""
    if array.dtype.kind not in "uif":
        raise ValueError(f"an array of {array.dtype} is no image")
    if array.ndim == 2:
        return array[None]
    if array.ndim != 3:
        raise ValueError(f"an array of shape {array.shape} is no image (H,W), (H,W,C) or (C,H,W)")
    # Channels come last unless only the first axis has as many.
    if array.shape[0] == channels and array.shape[2] != channels:
        return array
    return array.transpose(2, 0, 1)


def _read_numpy(data: bytes | memoryview, max_pixels: int) -> np.ndarray:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"a NumPy array of version {version}")
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, fortran, dtype = read[version](file)
    if dtype.hasobject:  # a pickle, which may run a program
        raise ValueError("a NumPy array of objects is no image")
    # Of three axes the smallest is taken for the channels here.
    *_, height, width = (1, 1, *sorted(shape))
    refuse_costly(b"", width, height, max_pixels)
    count = math.prod(shape)
    if len(data) - file.tell() != count * dtype.itemsize:
        raise ValueError(f"a NumPy array of shape {shape} whose file is cut or too long")
    flat = np.frombuffer(data, dtype, count, offset=file.tell())
    array = flat.reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="))


def _pil_can(data: bytes | memoryview, channels: int) -> bool:
    """Tell whether PIL reads a TIFF and keeps all that is wanted of it."""
    try:
        with Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
            tags = image.tag_v2  # type: ignore[attr-defined]  # of a TIFF
            samples, kinds = tags.get(SAMPLES, 1), tags.get(TYPE, (1,))
            bits = max(tags.get(BITS, (1,)))
            # PIL reads int8 as uint8, int16 as int32 and uint32 as int32, whose range is another.
            other = bits < 32 if 2 in kinds else bits == 32 and 3 not in kinds
            # Of two samples PIL reads the first, of 16-bit colours the upper byte.
            lossy = samples not in (1, 3, 4) or (samples > 1 and bits > 8)
            pages = channels > 1 and samples == 1 and image.n_frames > 1  # type: ignore[attr-defined]
            return not (other or lossy or pages)
    except UnidentifiedImageError:
        return False


def _read_tiff(data: bytes | memoryview, channels: int, max_pixels: int) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise ValueError(
            "a TIFF of these channels or this type needs tifffile: pip install tifffile "
            "imagecodecs, or convert the images to .npy"
        ) from error
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        # Before any pixel is read: the file's head may claim any size.
        refuse_costly(b"", page.imagewidth, page.imagelength, max_pixels)
        refuse_costly(b"", page.tilewidth, page.tilelength, max_pixels)
        samples = page.samplesperpixel
        pages = list(file.pages) if samples == 1 and channels > 1 else [page]
        # Microscopes write a channel a page.
        if len(pages) > 1:
            if len(pages) != channels or {single.shape for single in pages} != {page.shape}:
                shapes = sorted({single.shape for single in pages})
                raise ValueError(
                    f"it has {len(pages)} pages of {shapes}, DATA.CHANNELS is {channels}"
                )
            return np.stack([single.asarray() for single in pages], axis=-1)
        if samples != channels and not (samples == 1 and channels == 3):
            raise ValueError(f"it has {samples} channels, DATA.CHANNELS is {channels}")
        array = page.asarray()
        # planes that stand one after another come first
        return array if page.planarconfig == 1 or array.ndim == 2 else array.transpose(1, 2, 0)
