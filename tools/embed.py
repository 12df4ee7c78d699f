"""Write the features and file names of images to one .npz or .csv file.

Example: python tools/embed.py --pretrained output/demo/demo1 --data-path photos --output photos.npz

--pretrained names the folder of a run, of which the newest checkpoint is taken, or any file of
weights that main_linear.py reads; weights from outside a run need --cfg or --backbone.
--data-path is any folder: all images below it are read, or those of its folder train (--split val:
of val). --dataset imagefolder keeps the class of each image too, and any other data set of --list
datasets is read as in training. Images come in the order of the data set.

A .npz file holds features (N, F) float32, names (N,) and, where there are classes, labels (N,) and
classes; a .csv file has one line an image: name, label, f0, f1, ...
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file

from utils.cli import Parser, add_which, answer_at_once, make_parser, parse, run_main
from utils.config.flags import DATA, RUN

FLAGS = (
    "--data-path",
    "--dataset",
    "--img-size",
    "--workers",
    "--batch-size",
    "--backbone",
    "--device",
    "--precision",
)
FORMATS = (".npz", ".csv")


def _parser() -> Parser:
    parser = make_parser(__doc__ or "", {"--batch-size": "LINEAR.BATCH_SIZE"}, FLAGS)
    parser.usage = "%(prog)s --pretrained RUN --data-path DIR --output FILE [flags]"
    run = parser.group(RUN)
    run.add_argument("--output", type=_output, required=True, metavar="FILE", help="*.npz or *.csv")
    run.add_argument(
        "--pretrained", metavar="FILE", help="weights or a run's folder; none: untrained"
    )
    add_which(run)
    data = parser.group(DATA)
    data.add_argument(
        "--split", choices=("train", "val"), metavar="NAME", default="train", help="train or val"
    )
    data.add_argument("--skip-unreadable", action="store_true", help="leave unreadable images out")
    return parser


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text} must end in {' or '.join(FORMATS)}")
    return path


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import csv
import io
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np

from data import evaluation_loader
from data.sources import open_split
from data.sources.base import Source
from data.worker import BadImagesError
from evaluation.features import Features, compute_features, counted, refuse_non_finite
from tools.parts.frozen import FrozenBackbone, open_frozen
from utils.checkpoints.atomic import removed_on_error, sync_folder, tmp_path
from utils.config.key import Value

_CSV_ROWS = 1000  # that are made into text at a time


def main() -> int:
    """Write the features that the command line asks for; return the exit code."""
    args, flags = parse(_parser())
    args.cfg = args.cfg or config_of_run(args, flags)
    flags |= any_folder(args.opts, flags)
    # Some data sets are bundled and have no path.
    frozen = open_frozen(args, flags, needs_path=False, any_pixels=True)
    source = open_split(frozen.run.cfg.DATA, args.split)
    temporary = tmp_path(args.output)
    with removed_on_error(temporary):
        # opened before the work: a folder that cannot be written is found out at once
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            features = image_features(frozen, source, args.skip_unreadable)
            write(file, args.output.suffix, features, source)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, args.output)
    sync_folder(args.output.parent)
    print(f"{args.output}: {len(features):,} images x {features.width} features, {frozen.label}")
    if args.output.suffix == ".npz":
        print(f'data = numpy.load("{args.output}"); data["features"], data["names"]')
    return 0


def config_of_run(args: argparse.Namespace, flags: Mapping[str, Value]) -> str | None:
    """Return the configuration of the run that `--pretrained` belongs to; None: the defaults."""
    place = Path(args.pretrained or ".")
    config = (place if place.is_dir() else place.parent) / "config.yaml"
    if args.pretrained and config.is_file():
        return str(config)
    if "MODEL.BACKBONE.NAME" not in flags:
        raise ValueError(
            "--pretrained: name the folder of a run or, with weights of elsewhere, their network: "
            "--backbone NAME (see --list backbones) or --cfg FILE"
        )
    return None


def any_folder(opts: Sequence[str], flags: Mapping[str, Value]) -> dict[str, Value]:
    """Return what makes `--data-path` without `--dataset` a folder of images."""
    named = "DATA.DATASET" in flags or any(word.startswith("DATA.DATASET") for word in opts)
    return {"DATA.DATASET": "folder"} if "DATA.PATH" in flags and not named else {}


def image_features(frozen: FrozenBackbone, source: Source, skip_unreadable: bool) -> Features:
    """Return the features of all images in the evaluation view, in the order of the source."""
    run, size = frozen.run, frozen.run.cfg.LINEAR.BATCH_SIZE
    batches = evaluation_loader(run.cfg, source, run.device, size, skip_unreadable)
    try:
        with run.evaluating(frozen.backbone):
            return compute_features(frozen.backbone, counted("features", batches, len(source)))
    except BadImagesError as error:
        raise BadImagesError(f"{error}; --skip-unreadable leaves such images out") from error


def write(file: BinaryIO, suffix: str, features: Features, source: Source) -> None:
    """Write features, names and labels in the format of the `suffix`."""
    names = [source.name(index) for index in features.indices.tolist()]
    if suffix == ".csv":
        write_csv(file, names, features, source.classes)
        return
    rows = features.whole()[0].cpu()
    refuse_non_finite(rows)
    arrays = {"features": rows.numpy(), "names": np.array(names)}
    if source.classes:
        arrays["labels"] = features.labels.numpy()
        arrays["classes"] = np.array(source.classes)
    np.savez(file, allow_pickle=False, **arrays)


def write_csv(
    file: BinaryIO, names: Sequence[str], features: Features, classes: Sequence[str]
) -> None:
    """Write a head line, then one line an image; the label is the name of the class."""
    head = ["name", *(["label"] if classes else []), *(f"f{i}" for i in range(features.width))]
    file.write(_lines([head]))
    first = 0
    for chunk in features.chunks(_CSV_ROWS):
        refuse_non_finite(chunk)
        rows = []
        for number, row in enumerate(chunk.tolist(), start=first):
            label = int(features.labels[number])
            named = [classes[label] if label >= 0 else ""] if classes else []
            # nine digits bring back the same float32
            rows.append([names[number], *named, *(f"{value:.9g}" for value in row)])
        file.write(_lines(rows))
        first += len(chunk)


def _lines(rows: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    # the name of a file may hold bytes that are no UTF-8
    return text.getvalue().encode(errors="surrogateescape")


if __name__ == "__main__":
    run_main(main)
