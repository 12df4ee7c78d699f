"""Arrays in a file's bytes, a fast checksum, and file-system detection."""

import os
import zlib
from pathlib import Path

import numpy as np

_PAGE = 4096


def checksum(data: bytes | bytearray | memoryview) -> int:
    """Return 32 bits of a buffer: the CRC of the sums of its pages.

    What a disk does to a file (truncated, zeroed, flipped, exchanged pages) changes it; it stops no
    forger.
    """
    view = memoryview(data).cast("B")
    # Sums first: ten times faster than the CRC of all bytes.
    whole = len(view) - len(view) % _PAGE
    words = np.frombuffer(view, dtype="<u8", count=whole // 8).reshape(-1, _PAGE // 8)
    return zlib.crc32(view[whole:], zlib.crc32(words.sum(axis=1, dtype="<u8").tobytes()))


def view(data: memoryview, dtype: str, start: int, count: int) -> np.ndarray:
    """Return `count` numbers from byte `start` on, without a copy."""
    return np.frombuffer(data, dtype=dtype, count=count, offset=start)


def file_systems() -> dict[int, str]:
    """Return the type of each mounted file system by device number; {} if unknown."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        major, minor = before.split()[2].split(":")
        found[os.makedev(int(major), int(minor))] = after.split()[0]
    return found
