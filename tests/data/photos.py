"""A picture with smooth areas and edges, and a PNG of 16-bit colours."""

import struct
import zlib

import numpy as np


def draw_photo(height: int, width: int, seed: int) -> np.ndarray:
    """Return a photo-like uint8 (H,W,3) image: shapes, soft waves, muted colours, a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    image = np.full((height, width, 3), rng.uniform(0.35, 0.65))
    for _ in range(6):
        fx, fy, phase = rng.uniform(-9, 9), rng.uniform(-9, 9), rng.uniform(0, 6)
        image += 0.06 * rng.normal() * np.sin(6 * (fx * x + fy * y) + phase)[..., None]
    for _ in range(5):
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.25)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        image[inside] += rng.uniform(-0.25, 0.25) + 0.05 * rng.normal(size=3)
    image += 0.05 * rng.normal(size=3) * x[..., None] + rng.normal(
        scale=0.01, size=(height, width, 1)
    )
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(levels: np.ndarray) -> bytes:
    """Write uint16 (H,W,3) or (H,W,4) as a PNG of 16-bit colours, which PIL does not write."""
    height, width, channels = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
