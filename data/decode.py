"""Decode encoded images to RGB pixels. Images may come from strangers: none runs a program."""

import contextlib
import functools
import importlib
import io
import logging
import multiprocessing
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

logger = logging.getLogger("synco")

# The default of DATA.MAX_PIXELS: room for the photos of 108 megapixels that telephones make. Their
# pixels take 0.4 GB, and a worker holds up to four times that for a moment.
MAX_PIXELS = 1 << 27
# Pillow would try all its formats: it hands an EPS to Ghostscript, which runs it as a program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

_JPEG = b"\xff\xd8\xff"
_SCAN = b"\xff\xda"  # the marker that begins a scan
# libraries with a function `decode_jpeg`; torchvision announces that it will drop its own
_TORCH_DECODERS = ("torchcodec.decoders", "torchvision.io")
_DARK = 64  # levels of 256: what 14 bits in 16 fill, the most that cameras and scanners leave
_MAX_SCANS = 100  # libtiff's limit; encoders write about ten
_FULL_SCANS = 16  # of an image of `max_pixels`: with 100 it would take 20 seconds
# TIFF's tags of: a tile's width and height, bits and number of samples, their layout and type
_TILE_SIDES = (322, 323)
BITS, SAMPLES, PLANAR, TYPE = 258, 277, 284, 339
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
NUMPY = b"\x93NUMPY"
# Huffman and quantisation tables, restart interval, comment, application data
_TABLES = frozenset((0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)))
_FRAMES = range(0xC0, 0xD0)  # starts of frames, and tables
_EXIF, _UNUSED = 0xE1, 0xEF  # kinds of application data
# not those of four channels, which PIL converts its own way
_PLAIN_COLOURS = ("YCbCr", "RGB", "Gray")

# Pillow's limit is one for the whole process; `open_image` checks each image's size instead.
Image.MAX_IMAGE_PIXELS = None


def decode_rgb(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image to uint8 (3,H,W) RGB like PIL's `.convert("RGB")`; raise on any defect.

    EXIF orientation is not applied, and transparency is dropped. Refused are truncated files,
    formats not in `FORMATS`, pixels that PIL would clip or tear or whose channels it would drop,
    and what takes memory or time beyond `max_pixels`. JPEGs take the fastest decoder there is,
    bit-identical to PIL; what it will not read is PIL's to judge.
    """
    simple = fast_jpeg()
    if simple is not None and data[:3] == _JPEG:
        with contextlib.suppress(ValueError):  # damaged; some damage PIL reads past
            height, width, colours, _ = simple.decode_jpeg_header(data)
            refuse_costly(data, width, height, max_pixels)
            if colours in _PLAIN_COLOURS:
                return torch.from_numpy(simple.decode_jpeg(data)).permute(2, 0, 1)
    with open_image(data, max_pixels) as image:
        decode = torch_jpegs(torch.device("cpu")) if simple is None else None
        if decode is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
            encoded = bytearray(data)
            if hide_orientation(encoded):
                return decode([torch.frombuffer(encoded, dtype=torch.uint8)])[0]
        _refuse_other_pixels(image)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        # PIL keeps the upper byte, and of 12 bits in 16 that is next to nothing
        if _is_deep_colour(data, image) and 0 < (brightest := int(pixels.max())) < _DARK:
            bits = 8 + brightest.bit_length()
            raise ValueError(
                f"16-bit colours of which none needs more than {bits} bits would be too dark; "
                f"set DATA.RANGE to what they span, such as 0,{2**bits - 1}, or convert to 8 bit"
            )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _refuse_other_pixels(image: Image.Image) -> None:
    """Raise `ValueError` for pixels of which PIL's `convert("RGB")` would make others."""
    if image.mode == "F" or image.mode.startswith("I"):  # it would clip the levels
        bits = {"F": "float", "I": "32-bit"}.get(image.mode, "16-bit")
        raise ValueError(
            f"{bits} image (mode {image.mode}) is not supported; convert to 8 bit or, where the "
            "program has the key, set DATA.RANGE"
        )
    if not isinstance(image, TiffImageFile):
        return
    tags = image.tag_v2
    # PIL would read the first channel alone (grey with alpha is LA). Another channel beside RGB is
    # dropped too, but that is where editors keep selections and masks.
    if image.mode == "L" and tags.get(SAMPLES, 1) != 1:
        raise ValueError(
            f"a TIFF of {tags[SAMPLES]} channels is not supported; convert to 8-bit RGB"
        )
    if tags.get(PLANAR, 1) != 1 and max(tags.get(BITS, (1,))) > 8:  # PIL mixes the two bytes up
        raise ValueError("a 16-bit TIFF of separate planes is not supported; convert to 8 bit")
    if 2 in tags.get(TYPE, ()):  # PIL reads -1 as 255
        raise ValueError("a TIFF of signed pixels is not supported; convert to unsigned 8 bit")


def _is_deep_colour(data: bytes | memoryview, image: Image.Image) -> bool:
    """Tell whether a colour image stores 16 bits a channel."""
    if isinstance(image, TiffImageFile):
        return max(image.tag_v2.get(BITS, (1,))) > 8
    return image.format == "PNG" and data[24] > 8  # the depth in a PNG's head


def open_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header with PIL; refuse other formats and what would cost too much to decode."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(_unknown(data)) from None
    refuse_costly(data, image.width, image.height, max_pixels)
    if isinstance(image, TiffImageFile):
        # libtiff takes memory for a whole tile, however small the image
        width, height = (int(image.tag_v2.get(side, 0)) for side in _TILE_SIDES)
        refuse_costly(data, width, height, max_pixels)
    return image


def _unknown(data: bytes | memoryview) -> str:
    """Say what a file is that PIL does not know."""
    if data[:4] in TIFF:
        return "a TIFF that is damaged, or of more or other channels; convert to 8-bit RGB"
    if data[:6] == NUMPY:
        return f"a NumPy array, not an image; convert to one of {', '.join(FORMATS)}"
    return f"not an image of {', '.join(FORMATS)} ({len(data)} bytes)"


def refuse_costly(data: bytes | memoryview, width: int, height: int, max_pixels: int) -> None:
    """Raise `ValueError` for more than `max_pixels`, or for a JPEG of too many scans.

    A scan is a pass over all pixels that costs few bytes. Compressed data never holds its marker; a
    preview or a colour profile may, a few at most.
    """
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels are more than DATA.MAX_PIXELS ({max_pixels})")
    if data[:3] != _JPEG or _has_one_scan(data):
        return  # counting all would take a twelfth of the time of decoding
    most = min(_MAX_SCANS, _FULL_SCANS * max_pixels // max(width * height, 1))
    scans = bytes(data).count(_SCAN)
    if scans > most:
        raise ValueError(f"a JPEG of {scans} scans; more than {most} would take too long")


def _has_one_scan(data: bytes | bytearray | memoryview) -> bool:
    """Tell whether a JPEG is sequential and its first scan holds all channels.

    Then libjpeg refuses further scans. False where libjpeg might skip segments in another way than
    `_segments` does.
    """
    channels = 0
    for at, marker in _segments(data):
        if marker == 0xDA:  # start of scan
            return data[at + 4] == channels
        if marker in (0xC0, 0xC1):  # start of a sequential frame
            channels = data[at + 9]
        elif marker not in _TABLES:
            return False
    return False


def _segments(data: bytes | bytearray | memoryview) -> Iterator[tuple[int, int]]:
    """Yield the place and the marker of a JPEG's segments, as if each stated its length."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        yield at, data[at + 1]
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")


def hide_orientation(data: bytearray) -> bool:
    """Make a JPEG's EXIF data, in place, a segment that all decoders skip.

    torchcodec turns the pixels by the orientation in EXIF and cannot be told not to; PIL,
    simplejpeg and torchvision leave them as stored. False where libjpeg might find other segments.
    """
    for at, marker in _segments(data):
        if marker == 0xDA:  # start of scan
            # torchcodec finds EXIF between scans too, where a search cannot tell it from a table
            return _has_one_scan(data) or data.find(b"\xff\xe1", at) < 0
        if marker == _EXIF:
            data[at + 1] = _UNUSED
        elif marker not in _TABLES and marker not in _FRAMES:
            return False
    return False


@functools.cache
def fast_jpeg() -> ModuleType | None:
    """Return the module simplejpeg, or None; its absence is logged once, by the main process."""
    try:
        import simplejpeg
    except ImportError:
        if multiprocessing.parent_process() is None:
            logger.info("simplejpeg is not installed: JPEGs are decoded more slowly without it")
        return None
    return simplejpeg


@functools.cache
def torch_jpegs(device: torch.device) -> functools.partial[list[Tensor]] | None:
    """Return torchcodec's decoder of JPEGs, else torchvision's, else None if neither can do it.

    It takes files as uint8 (bytes,) and returns uint8 (3,H,W) each on `device`. On a CPU the pixels
    are PIL's, a little faster. Prepare the files by `hide_orientation`.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    sample = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    for package in _TORCH_DECODERS:
        # a build for another torch, or without libjpeg or nvJPEG, fails when it loads or decodes
        with contextlib.suppress(ImportError, AttributeError, OSError, RuntimeError):
            decode_jpeg = importlib.import_module(package).decode_jpeg
            decode = functools.partial(decode_jpeg, mode="RGB", device=device)
            decode([sample])
            return decode
    return None
