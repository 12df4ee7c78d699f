"""JPEGs decoded by one core: PIL, torchcodec or torchvision, simplejpeg, ours with its guards."""

import argparse
import functools
import io
import itertools
import os
import statistics
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from benchmarks.common import Side, measure, ratio
from data.decode import FORMATS, decode_rgb, fast_jpeg, torch_jpegs

CHUNK = 32  # images after which the next side takes its turn
# the first that is there: full size
_PACKS = ("imagenet-sample-64.tar", "imagenette224-subset.tar")
_SUFFIXES = (".jpg", ".jpeg")


class Photos(NamedTuple):
    """JPEG files in memory, and where they come from."""

    files: list[bytes]
    origin: str

    def megapixels(self) -> float:
        """Return the mean size of an image."""
        opened = [Image.open(io.BytesIO(file), formats=FORMATS) for file in self.files]
        return statistics.mean(image.width * image.height for image in opened) / 1e6

    def describe(self) -> str:
        """Return a line for the head of a table."""
        size = statistics.mean(map(len, self.files)) / 1e3
        mean = f"mean {self.megapixels():.2f} megapixels, {size:.0f} kB"
        return f"{len(self.files)} JPEGs ({self.origin}), {mean}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add where the images come from."""
    parser.add_argument(
        "--data", default="", help="folder of JPEGs; else a pack in SHARED_DATA; else made up"
    )
    parser.add_argument("--images", type=int, default=64)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Compare the decoders on the same bytes."""
    torch.set_num_threads(1)
    photos = load_photos(args.data, args.images)
    decoders: dict[str, Callable[[bytes], object]] = {"PIL": _pil}
    decode_files = torch_jpegs(torch.device("cpu"))
    if decode_files is not None:
        package = decode_files.func.__module__.partition(".")[0]  # torchcodec or torchvision
        decoders[package] = functools.partial(_with_torch, decode_files)
    simple = fast_jpeg()
    if simple is not None:
        decoders["simplejpeg"] = simple.decode_jpeg
    decoders["ours"] = decode_rgb
    sides = [(name, _over(decoder)) for name, decoder in decoders.items()]
    times = interleaved(sides, photos.files, args.rounds)
    print(photos.describe())
    print_rates(times, photos, "PIL")
    result = {f"decode_{name.lower()}_per_s": rate(times[name], photos) for name in decoders}
    result["decode_speedup"] = ratio(times, "PIL", "ours")
    if simple is not None:
        result["decode_guards"] = ratio(times, "ours", "simplejpeg")
    result["megapixels"] = photos.megapixels()
    result["real_images"] = float(photos.origin != _MADE_UP)
    return result


def _pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"))


def _with_torch(decode_files: Callable[[list[torch.Tensor]], object], data: bytes) -> object:
    return decode_files([torch.frombuffer(bytearray(data), dtype=torch.uint8)])


def _over(decoder: Callable[[bytes], object]) -> Callable[[int, slice, list[bytes]], None]:
    def once(_pass: int, _place: slice, files: list[bytes]) -> None:
        for file in files:
            decoder(file)

    return once


def interleaved(
    sides: list[tuple[str, Callable[[int, slice, list[bytes]], None]]],
    files: list[bytes],
    rounds: int,
) -> dict[str, list[float]]:
    """Time the sides chunk by chunk in turn; return milliseconds by side, one for each round.

    A round is a pass over all files. A side is called with the number of its
    pass, the place of the chunk and the chunk.
    """
    places = [slice(start, start + CHUNK) for start in range(0, len(files), CHUNK)]

    def side(name: str, function: Callable[[int, slice, list[bytes]], None]) -> Side:
        turns = itertools.count()

        def once() -> None:
            number, place = divmod(next(turns), len(places))
            function(number, places[place], files[places[place]])

        return Side(name, once)

    # One turn is not timed, so a pass starts one chunk late and ends in the next: and visits every
    # file.
    times = measure([side(*each) for each in sides], rounds * len(places), torch.device("cpu"))
    return {
        name: [sum(turns[i : i + len(places)]) for i in range(0, len(turns), len(places))]
        for name, turns in times.items()
    }


def rate(times: list[float], photos: Photos) -> float:
    """Return images a second from the milliseconds of passes over all files."""
    return 1e3 * len(photos.files) / statistics.median(times)


def print_rates(times: dict[str, list[float]], photos: Photos, reference: str) -> None:
    """Print a line for each side: images a second, milliseconds an image, times the reference."""
    width = max(map(len, times))
    for name, passes in times.items():
        each = statistics.median(passes) / len(photos.files)
        speedup = ratio(times, reference, name)
        print(f"{name:{width}s} {1e3 / each:8.0f} images/s {each:8.2f} ms {speedup:6.2f} x")


def load_photos(folder: str, count: int) -> Photos:
    """Read at most `count` JPEGs of `folder`, of a pack in SHARED_DATA, or make some."""
    if folder:
        files = [p for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in _SUFFIXES][
            :count
        ]
        if not files:
            raise ValueError(f"--data {folder}: no JPEGs below it")
        return Photos([file.read_bytes() for file in files], Path(folder).name)
    packs = Path(
        os.environ.get("SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
    )
    for name in _PACKS:
        if (packs / name).is_file():
            return Photos(_from_archive(packs / name, count), name)
    return Photos([_made_up(seed) for seed in range(count)], _MADE_UP)


def _from_archive(path: Path, count: int) -> list[bytes]:
    with tarfile.open(path) as archive:
        members = [m for m in archive if m.isfile() and Path(m.name).suffix.lower() in _SUFFIXES]
        # spread over the archive: its first images may be of one class
        step = max(1, len(members) // count)
        opened = [archive.extractfile(member) for member in members[::step][:count]]
        return [file.read() for file in opened if file is not None]


_MADE_UP = "made up: gradients and noise"


def _made_up(seed: int) -> bytes:
    """Return a JPEG of 500 x 375 pixels about as heavy as a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:375j, 0:1:500j]
    waves = [np.sin(12 * (a * x + b * y) + c) for a, b, c in rng.uniform(-1, 1, size=(9, 3))]
    image = 0.5 + np.stack(waves, axis=2).reshape(375, 500, 3, 3).mean(axis=3) / 3
    image += rng.normal(scale=0.03, size=image.shape)
    buffer = io.BytesIO()
    Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
