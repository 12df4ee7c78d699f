"""Listing a large image folder: a plain walk, our scan, our index; opening a pack as large.

The tree is of empty files in a temporary folder. Times are wall clock, since waiting for the file
system counts; imports are not in them.
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Side, measure, ratio
from data.sources import build_source
from data.sources import folder_index as listing
from data.sources.base import PackedStrings
from data.sources.packed import HEAD, PackedSource, PackIndex, closing
from data.sources.scan import IMG_EXTENSIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the size of the tree."""
    parser.add_argument("--files", type=int, default=1_280_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument(
        "--folder", help="where to build the tree, removed afterwards [the system's temporary]"
    )


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare the ways on one tree, in turns."""
    with tempfile.TemporaryDirectory(prefix="synco-index-", dir=args.folder) as made:
        root = Path(made)
        _build(root, args.files, args.classes)
        time.sleep(listing._RACY_NS / 1e9 + 0.1)  # a tree that has just been written is not trusted
        cache, pack = root / "cache", root / "train.pack"
        known = build_source("imagefolder", made, "train", index_cache=str(cache))
        labels = known.labels.numpy()
        write_pack(pack, labels, known.classes, _names_of(labels))
        scan = functools.partial(build_source, "imagefolder", made, "train")
        sides = [
            Side("plain walk", lambda: plain_walk(root / "train")),
            Side("our scan", scan),
            Side("our index", functools.partial(scan, index_cache=str(cache))),
            Side("a pack", lambda: PackedSource(pack)),
        ]
        times = measure(sides, args.rounds, torch.device("cpu"), wall=True)
        size = next(cache.iterdir()).stat().st_size
    print(f"{args.files} files in {args.classes} folders; the index has {size / 2**20:.1f} MiB")
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        print(f"{name:12s} {median:9.1f} ms")
    return {
        "index_open_ms": medians["our index"],
        "folder_scan_ms": medians["plain walk"],
        "index_speedup": ratio(times, "plain walk", "our index"),
        "our_scan_ms": medians["our scan"],
        "scan_speedup": ratio(times, "plain walk", "our scan"),
        "pack_open_ms": medians["a pack"],
    }


def plain_walk(folder: Path) -> list[tuple[str, int]]:
    """List (path, label) as torchvision's ImageFolder does: a Python object for each file."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    samples = []
    for label, name in enumerate(classes):
        for root, _, files in sorted(os.walk(folder / name, followlinks=True)):
            for file in sorted(files):
                path = os.path.join(root, file)
                if path.lower().endswith(IMG_EXTENSIONS):
                    samples.append((path, label))
    return samples


def _build(root: Path, files: int, classes: int) -> None:
    share = -(-files // classes)
    for number in range(classes):
        folder = root / "train" / f"n{number:08d}"
        folder.mkdir(parents=True)
        for index in range(number * share, min((number + 1) * share, files)):
            os.close(os.open(folder / f"n{number:08d}_{index}.JPEG", os.O_CREAT | os.O_WRONLY))


def _names_of(labels: np.ndarray) -> PackedStrings:
    return PackedStrings(f"n{label:08d}/n{label:08d}_{i}.JPEG" for i, label in enumerate(labels))


def write_pack(path: Path, labels: np.ndarray, classes: list[str], names: PackedStrings) -> None:
    """Write a pack with an index of full size over records of eight bytes."""
    count = len(labels)
    offsets = len(HEAD) + 8 * np.arange(count + 1, dtype=np.int64)
    sizes, checksums = np.full((count, 2), 500, np.uint32), np.arange(count, dtype=np.uint32)
    index = PackIndex(offsets, labels, names.offsets, sizes, checksums, names.blob)
    with path.open("wb") as file:
        # Opening a pack reads its index only, so the records may be empty.
        file.write(HEAD + bytes(8 * count))
        for part in closing(index, {"classes": classes, "raw": False, "split": "train"}):
            file.write(part)
