"""Pack a data set into one file that training reads (DATA.DATASET packed).

Example: python tools/pack.py --data-path D --split train --output P/train.pack --short-side 256

The same with --split val; then main_pretrain.py --dataset packed --data-path P reads both.

Images whose shorter side is above --short-side are resized (antialiased) and encoded anew as JPEG;
smaller ones, and all with --short-side 0, keep their bytes. So do all that --channels or --range
say are not 8-bit RGB. The file appears under its name only
when it is complete and has been read back. The same command goes on where it was stopped, and
writes the same bytes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import Parser, answer_at_once


def _parser() -> Parser:
    parser = Parser(
        description=__doc__,
    )
    parser.add_argument("--data-path", default="", help="root folder of the data set")
    parser.add_argument(
        "--dataset",
        default="imagefolder",
        help="as in training, see --list datasets of main_pretrain.py",
    )
    parser.add_argument(
        "--split", choices=("train", "val"), default="train", metavar="NAME", help="train or val"
    )
    parser.add_argument("--output", type=Path, required=True, help="the pack, e.g. P/train.pack")
    parser.add_argument(
        "--channels", type=int, default=3, metavar="N", help="as DATA.CHANNELS; lists .npy too"
    )
    parser.add_argument(
        "--range", default="", metavar="RANGE", help="as DATA.RANGE: low,high or type"
    )
    parser.add_argument(
        "--short-side", type=int, default=0, help="resize larger images to it; 0: keep them"
    )
    parser.add_argument(
        "--quality", type=int, default=95, help="of the JPEGs that are encoded anew"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=0, help="as DATA.MAX_PIXELS; 0: its default"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="store pixels, not JPEGs: four times as fast to read, larger",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: this one"
    )
    parser.add_argument(
        "--skip-unreadable", action="store_true", help="leave unreadable images out"
    )
    parser.add_argument(
        "--verify", action="store_true", help="only read an existing --output and check it"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the file back before it is done"
    )
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments; exit with code 2 if a number is out of its range."""
    parser = _parser()
    args = parser.parse_args(argv)
    for flag, value, least, most in (
        ("--short-side", args.short_side, 0, 1 << 16),
        ("--quality", args.quality, 1, 100),
        ("--channels", args.channels, 1, 1 << 16),
        ("--max-pixels", args.max_pixels, 0, 1 << 40),
        ("--workers", args.workers, 0, 1024),
    ):
        if not least <= value <= most:
            parser.error(f"{flag} {value} must be from {least} to {most}")
    return args


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import io
import signal
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch.utils.data import Dataset

from data.augment.crops import shorter_side_to
from data.pixels import Pixels, parse_range
from data.sampler import Request
from data.sources import build_source
from data.sources.base import PackedStrings, Source
from data.sources.folder import FileSource
from data.sources.packed import HEAD, PackedSource, PackIndex
from data.worker_pool import LoaderError, fetch_in_order
from tools.parts.packing import SKIPPED, Partial, Settings, difference
from utils.checkpoints.atomic import sync_folder
from utils.logger import setup_logger
from utils.names import visible
from utils.progress import Counter

_TASK = 16  # images that a worker encodes at once


def main(argv: Sequence[str] | None = None) -> int:
    """Pack, or only verify; return the exit code."""
    args = parse_args(argv)
    setup_logger(None, is_main=True)  # the listing says what it leaves out
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        verify(args.output) if args.verify else pack(args)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        mended = "; free space or mend it, the same command goes on"
        again = "" if isinstance(error, ValueError) else mended
        print(f"error: {visible(str(error))}{again}", file=sys.stderr)
        return 2
    return 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# ---- the parts of the work -----------------------------------------------------------------------


def pack(args: argparse.Namespace) -> None:
    """Write `args.output`, going on with what an earlier call left."""
    pixels = _pixels(args)
    source = build_source(
        args.dataset,
        args.data_path,
        args.split,
        cache_mode="no",  # each image is read once
        index_cache="",
        arrays_too=not pixels.plain,
    )
    source.max_pixels, source.pixels = args.max_pixels or source.max_pixels, pixels
    settings = _settings(args, source)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.output.exists():
        _finished(args.output, settings, args.skip_unreadable)
        return
    partial = Partial.open(args.output, settings, len(source), args.skip_unreadable)
    try:
        _encode_rest(partial, source, args)
        left_out = [source.name(int(i)) for i in np.flatnonzero(partial.rows["length"] == SKIPPED)]
        described = {"split": args.split, "raw": args.raw, "classes": source.classes}
        partial.close_file(
            _index(partial, source), {**described, "settings": settings, "skipped": left_out}
        )
        if not args.no_verify:
            verify(partial.path)
        os.replace(partial.path, args.output)
        sync_folder(args.output.parent)
        partial.journal_path.unlink(missing_ok=True)
    finally:
        partial.close()
    size = args.output.stat().st_size
    print(f"{args.output}: {len(source) - len(left_out)} images, {_size(size)}")
    _name_left_out(left_out)


def _pixels(args: argparse.Namespace) -> Pixels:
    """Return what the images are; `ValueError` for what cannot be done to others than 8-bit RGB."""
    # A pack holds no mean and deviation: training gives them.
    neutral = (0.0,) * args.channels, (1.0,) * args.channels
    pixels = Pixels(args.channels, parse_range(args.range, "--range"), *neutral)
    if not pixels.plain and (args.raw or args.short_side):
        raise ValueError(
            "--raw and --short-side are for 8-bit RGB: with --channels or --range a pack keeps "
            "the bytes of the files"
        )
    return pixels


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 1 << 28 else f"{count / 2**20:.1f} MiB"


def _settings(args: argparse.Namespace, source: Source) -> Settings:
    """Return all that the bytes of the pack depend on."""
    if not args.raw and source.images is not None:
        raise ValueError(f"--dataset {args.dataset} holds pixels, not JPEGs: add --raw")
    settings = {name: getattr(args, name) for name in ("dataset", "split", "short_side", "raw")}
    if args.short_side and not args.raw:
        settings["quality"] = args.quality
    if args.short_side or args.raw:
        settings["codecs"] = (
            f"Pillow {PIL.__version__}, libjpeg-turbo {features.version('libjpeg_turbo')}"
        )
    if not source.pixels.plain:
        settings |= {"channels": args.channels, "range": args.range}
    return {**settings, "source": source.fingerprint(), "content": source.content()}


def _name_left_out(names: Sequence[str]) -> None:
    for name in names:
        print(f"left out, unreadable: {visible(name)}")


def _finished(output: Path, settings: Settings, skip_unreadable: bool) -> None:
    """Accept a pack of the same settings; `ValueError` for any other file."""
    header = PackedSource(output).header
    found, left_out = header.get("settings"), header.get("skipped", [])
    if isinstance(found, dict):
        found.setdefault("content", settings["content"])  # older packs lack it
    if found == settings and left_out and not skip_unreadable:
        raise ValueError(
            f"--output {output} exists and lacks {len(left_out)} unreadable images: remove it to "
            "pack all, or give --skip-unreadable"
        )
    if found != settings:
        raise ValueError(
            f"--output {output} exists and was packed otherwise "
            f"({difference(found, settings)}): choose another name or remove it"
        )
    # of a call that was killed after its last step
    Partial.journal_of(output).unlink(missing_ok=True)
    print(f"{output} is complete")
    _name_left_out(left_out)


def _encode_rest(partial: Partial, source: Source, args: argparse.Namespace) -> None:
    """Encode what is missing, in order, and append it."""
    partial.commit()  # workers that are forked now inherit no bytes that wait to be written
    first, count = partial.done, len(source)
    tasks = [Request(0, 0, np.arange(i, min(i + _TASK, count))) for i in range(first, count, _TASK)]
    encoder = Encoder(source, args.short_side, args.raw, args.quality)
    try:
        with Counter("packing", count) as counter:
            for encoded in fetch_in_order(encoder, tasks, args.workers, 600.0, torch.device("cpu")):
                _append(partial, encoded, source, args.skip_unreadable)
                counter.update(partial.done)
    except LoaderError as error:
        raise OSError(
            f"a worker ended ({error.__cause__}): memory may have run out, use fewer --workers"
        ) from error
    partial.commit()


def _append(
    partial: Partial, encoded: "list[Record]", source: Source, skip_unreadable: bool
) -> None:
    for index, (data, height, width, reason) in enumerate(encoded, start=partial.done):
        if reason and not skip_unreadable:
            partial.commit()
            raise ValueError(
                f"cannot read {source.name(index)}: {reason}. "
                "Repair or remove it, or leave such images out with --skip-unreadable"
            )
        partial.add(None if reason else data, height, width)


def _index(partial: Partial, source: Source) -> PackIndex:
    kept = np.flatnonzero(partial.rows["length"] != SKIPPED)
    if not len(kept):
        raise ValueError("no image can be read: nothing to pack")
    rows = partial.rows[kept]
    # names inside the source: the full ones would hold the path of this machine
    names = source.paths if isinstance(source, FileSource) else getattr(source, "names", None)
    packed = PackedStrings([source.name(i) if names is None else names[i] for i in kept.tolist()])
    return PackIndex(
        offsets=np.cumsum(np.concatenate([[len(HEAD)], rows["length"]]), dtype=np.int64),
        labels=source.labels.numpy()[kept],
        names_at=packed.offsets,
        sizes=np.stack([rows["height"], rows["width"]], axis=1),
        checksums=rows["checksum"],
        names=packed.blob,
    )


def verify(path: Path) -> None:
    """Read a whole pack and compare it with its checksums; `ValueError` names a damaged image."""
    source = PackedSource(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk, not from memory
    os.close(descriptor)
    with Counter("verifying", len(source)) as counter:
        for index in range(len(source)):
            try:
                source.record(index)
            except OSError as error:
                raise ValueError(f"{error}: pack it again (remove {path} first)") from error
            counter.update(index + 1)


class Record(NamedTuple):
    """An image as the pack stores it, or why it cannot be read."""

    data: bytes
    height: int
    width: int
    reason: str = ""


class Encoder(Dataset[list[Record]]):
    """Turns the image indices of a request into records, in a worker."""

    def __init__(self, source: Source, short_side: int, raw: bool, quality: int) -> None:
        self.source, self.short_side, self.raw, self.quality = source, short_side, raw, quality

    def __getitem__(self, request: Request) -> list[Record]:
        """Encode the images of a request."""
        return [self._record(int(index)) for index in request.indices]

    def _record(self, index: int) -> Record:
        try:
            return self._encode(index)
        except Exception as error:  # whatever a decoder may raise: the file is bad
            return Record(b"", 0, 0, f"{type(error).__name__}: {error}")

    def _encode(self, index: int) -> Record:
        data = self.source.encoded(index)
        if data is None and not self.raw:
            raise ValueError("only its pixels are stored: add --raw")
        # The bytes are read once: `load` would read them again.
        image = self.source.load(index) if data is None else self.source.decode(data)
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        height, width = pixels.shape[:2]
        if self.short_side and min(height, width) > self.short_side:
            height, width = shorter_side_to(self.short_side, height, width)
            smaller = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            pixels = np.asarray(smaller)
            if not self.raw:
                buffer = io.BytesIO()
                smaller.save(buffer, "JPEG", quality=self.quality)
                data = buffer.getvalue()
        if data is None or self.raw:
            data = pixels.tobytes()
        return Record(data, height, width)


if __name__ == "__main__":
    sys.exit(main())
