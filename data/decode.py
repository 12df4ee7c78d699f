"""Decode encoded images to RGB pixels."""

import contextlib
import functools
import io
import logging
import math
import multiprocessing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger("synco")


def decode_rgb(data: bytes | memoryview) -> Tensor:
    """Decode an encoded image to uint8 (3,H,W) RGB like PIL's `.convert("RGB")`; raise on any defect.

    EXIF orientation is not applied, truncated files and decompression bombs are refused (PIL's limits).
    JPEGs take the fastest decoder there is, bit-identical to PIL; what it will not read is PIL's to judge.
    """
    simple = fast_jpeg()
    if simple is not None and data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(ValueError):  # damaged; some damage PIL reads past
            height, width, colours, _ = simple.decode_jpeg_header(data)
            if colours in _PLAIN_COLOURS and height * width <= (Image.MAX_IMAGE_PIXELS or math.inf):
                return torch.from_numpy(simple.decode_jpeg(data)).permute(2, 0, 1)
    try:
        opened = Image.open(io.BytesIO(data))  # reads the header only; refuses bombs
    except UnidentifiedImageError:
        raise OSError(f"not an image ({len(data)} bytes)") from None
    with opened as image:
        decode = _torchvision_jpeg() if simple is None else None
        if decode is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
            return decode(data)
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


_PLAIN_COLOURS = ("YCbCr", "RGB", "Gray")  # not those of four channels, which PIL converts its own way


@functools.cache
def fast_jpeg() -> Any:
    """Return the module simplejpeg, or None; its absence is logged once, by the main process."""
    try:
        import simplejpeg
    except ImportError:
        if multiprocessing.parent_process() is None:
            logger.info("simplejpeg is not installed: JPEGs are decoded more slowly without it")
        return None
    return simplejpeg


@functools.cache
def _torchvision_jpeg() -> Callable[[bytes | memoryview], Tensor] | None:
    """Return torchvision's decoder: the same libjpeg result as PIL's, a little faster; None if it has none.

    From 0.29 on torchvision announces that its decoders will go.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None

    def decode(data: bytes | memoryview) -> Tensor:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_jpeg(encoded, mode=ImageReadMode.RGB)

    return decode
