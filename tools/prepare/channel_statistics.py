"""Compute the mean and deviation of each channel of a data set, for DATA.MEAN and DATA.STD.

Example: python tools/prepare/channel_statistics.py --data-path D --output five.yaml --opts ...

The file holds DATA.CHANNELS, RANGE, MEAN and STD; a yaml that names it under _BASE_ reads them.
All training images are read once, whole, in [0, 1] after DATA.RANGE.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file

from utils.cli import Parser, answer_at_once, make_parser, parse, run_main
from utils.config.flags import RUN

FLAGS = ("--data-path", "--dataset", "--workers")


def _parser() -> Parser:
    parser = make_parser(__doc__ or "", {}, FLAGS)
    parser.usage = "%(prog)s --cfg FILE --data-path DIR --output FILE [flags]"
    run = parser.group(RUN)
    run.add_argument("--output", type=Path, required=True, metavar="FILE", help="yaml to write")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

from typing import NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data.sampler import Request
from data.sources import open_split
from data.sources.base import Source
from data.worker_pool import fetch_in_order
from models import framework_options
from utils.checkpoints.atomic import removed_on_error, sync_folder, tmp_path
from utils.config.load import load_config
from utils.config.schema import declare
from utils.logger import setup_logger
from utils.progress import Counter

_IMAGES = 16  # that a worker reads at once


class Moments(NamedTuple):
    """Number of pixels, mean (C,) and sum of squared distances from it (C,), float64."""

    pixels: int
    mean: Tensor
    squares: Tensor

    def joined(self, other: "Moments") -> "Moments":
        """Return the moments of both."""
        # Chan et al. 1979: sums of squares would lose digits over millions of images
        count = self.pixels + other.pixels
        if not count:
            return self
        step = other.mean - self.mean
        squares = self.squares + other.squares + step**2 * (self.pixels * other.pixels / count)
        return Moments(count, self.mean + step * (other.pixels / count), squares)


def no_pixels(channels: int) -> Moments:
    """Return the moments of no pixel."""
    nothing = torch.zeros(channels, dtype=torch.float64)
    return Moments(0, nothing, nothing)


class Measure(Dataset[Moments]):
    """Read the images of a request and measure their pixels, in a worker."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, request: Request) -> Moments:
        """Return the moments of these images; a `ValueError` names one that cannot be read."""
        total = no_pixels(self.source.pixels.channels)
        for index in request.indices.tolist():
            try:
                image = self.source.load(index)
            except Exception as error:  # whatever a decoder may raise: the file is bad
                raise ValueError(f"cannot read {self.source.name(index)}: {error}") from error
            pixels = image.flatten(1).double()
            if image.dtype == torch.uint8:
                pixels /= 255
            mean = pixels.mean(1)
            squares = (pixels - mean[:, None]).square().sum(1)
            total = total.joined(Moments(pixels.shape[1], mean, squares))
        return total


def main() -> int:
    """Measure and write; return the exit code."""
    args, flags = parse(_parser())
    setup_logger(None, is_main=True)
    cfg = load_config(declare(framework_options()), [args.cfg], args.opts, flags)
    if cfg.DATA.MEAN or cfg.DATA.STD:
        raise ValueError("DATA.MEAN and DATA.STD are set; leave them empty to compute them")
    node = unnormalised(cfg.DATA)
    source = open_split(node, "train")
    moments = measure(source, node.NUM_WORKERS, node.TIMEOUT)
    deviation = (moments.squares / max(moments.pixels, 1)).sqrt()
    constant = (deviation < 1e-6).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"channels {constant} are constant over all images; leave them out, or check DATA.RANGE"
        )
    written = {
        "CHANNELS": node.CHANNELS,
        "RANGE": node.RANGE,
        "MEAN": _rounded(moments.mean),
        "STD": _rounded(deviation),
    }
    write(args.output, written)
    print(f"{args.output}: {len(source):,} images, mean {written['MEAN']}, std {written['STD']}")
    return 0


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def unnormalised(node: CfgNode) -> CfgNode:
    """Return the section with a mean and deviation that change nothing."""
    copy = node.clone()
    copy.defrost()
    copy.MEAN, copy.STD = [0.0] * node.CHANNELS, [1.0] * node.CHANNELS
    return copy


def measure(source: Source, workers: int, timeout: float) -> Moments:
    """Return the moments of all pixels of a source; the same whatever the workers."""
    indices = np.arange(len(source))
    starts = range(0, len(source), _IMAGES)
    requests = [Request(0, 0, indices[start : start + _IMAGES]) for start in starts]
    total, done = no_pixels(source.pixels.channels), 0
    parts = fetch_in_order(Measure(source), requests, workers, timeout, torch.device("cpu"))
    with Counter("statistics", len(source)) as counter:
        for part, request in zip(parts, requests, strict=True):
            total = total.joined(part)
            done += len(request.indices)
            counter.update(done)
    return total


def write(output: Path, section: dict[str, object]) -> None:
    """Write the yaml; it appears under its name when it is whole."""
    temporary = tmp_path(output)
    with removed_on_error(temporary):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(yaml.safe_dump({"DATA": section}, default_flow_style=None))
        os.replace(temporary, output)
    sync_folder(output.parent)


if __name__ == "__main__":
    run_main(main)
