"""Carry the masks of a video's first frame through it with frozen features, as DAVIS 2017 does.

Example: python tools/propagate.py --cfg configs/byol_vit_small.yaml --data-path DAVIS --output O

Reads ImageSets/2017/val.txt, JPEGImages/480p/<video> and Annotations/480p/<video> with the newest
weights of the run, writes indexed PNGs to O/<name>/<tag>/propagation/<weights>/<video>/ and, where
later frames are annotated too, prints J and F.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file

from utils.cli import Parser, add_which, answer_at_once, make_parser, parse, run_main

FLAGS = ("--data-path", "--output", "--tag", "--seed", "--device")


def _parser() -> Parser:
    parser = make_parser(__doc__ or "", flags=FLAGS)
    parser.add_argument(
        "--pretrained", metavar="FILE", help="weights or a run's folder; none: untrained"
    )
    add_which(parser)
    parser.add_argument(
        "--list", default="ImageSets/2017/val.txt", help="names of the videos, one a line"
    )
    parser.add_argument("--resolution", default="480p", help="folder of frames and annotations")
    parser.add_argument(
        "--short-side", type=int, default=480, help="frames are brought to this many pixels"
    )
    parser.add_argument(
        "--frames",
        choices=("smooth", "dino"),
        default="smooth",
        help="smooth: antialiased, as training | dino: as DINO's code, for its exact figures",
    )
    parser.add_argument(
        "--void",
        choices=("skip", "background"),
        default="skip",
        help="unlabelled pixels: do not count | are background, as in DAVIS's own evaluation",
    )
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from data.augment.base import IMAGENET_MEAN
from data.augment.crops import resize_one
from data.augment.pipeline import normalise_
from data.decode import decode_rgb, open_image
from data.sources.scan import PassedOver, is_folder, read_folder
from evaluation.propagation import (
    Quality,
    enlarge_labels,
    propagate,
    shrink_mask,
    video_quality,
)
from models.parts.resolution import at_size, dense_features, size_multiple
from tools.parts.frozen import FrozenBackbone, open_frozen
from utils.checkpoints.atomic import write_text
from utils.names import folder_name
from utils.reading import read_text

logger = logging.getLogger("synco")

ReadFrame: TypeAlias = Callable[[Path, tuple[int, int]], Tensor]  # (path, size) to (1, 3, *size)

_DINO_STD = (0.228, 0.224, 0.225)  # red is 0.229 elsewhere
SIDE_MULTIPLE = 64  # the longer side is rounded down to a multiple of this


def main() -> int:
    """Carry the masks through every video of the list, print the quality; return the exit code."""
    args, flags = parse(_parser())
    frozen = open_frozen(args, flags)
    root = Path(frozen.run.cfg.DATA.PATH)
    names = read_list(root / args.list)
    settings = f"{frozen.label}-{args.resolution}-{args.short_side}-{Path(args.list).stem}"
    settings += "-dino" * (args.frames == "dino")
    read = read_frame if args.frames == "smooth" else read_frame_of_dino
    folder = frozen.folder(f"propagation/{folder_name(settings, '--resolution')}")
    pictures, annotations = (
        root / kind / args.resolution for kind in ("JPEGImages", "Annotations")
    )
    # all, so that a video that cannot be used is found before anything is computed
    videos = {name: open_video(pictures / name, annotations / name) for name in names}
    quality = {}
    for name, video in videos.items():
        masks = carry(frozen, video, folder / name, args.short_side, read)
        found = judge(masks, annotations / name, args.void)
        quality.update({f"{name}/{label}": scores for label, scores in found.items()})
    summary = summarise(quality)
    content = {**summary, "void": args.void, "objects": quality}
    write_text(folder / "quality.json", json.dumps(content, indent=1))
    lines = [f"{key:12}{value:7.2f}" for key, value in summary.items()]
    print("\n".join(lines or ["no quality: only first frames are annotated"]))
    print(folder)
    return 0


def read_list(path: Path) -> list[str]:
    """Return the videos of a list; `ValueError` if it is missing, empty or leaves its folder."""
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: --data-path must be the folder of DAVIS; see --list"
        )
    names = read_text(path).split()
    if not names:
        raise ValueError(f"{path} names no video")
    return [folder_name(name, str(path)) for name in names]


class Video(NamedTuple):
    """The frames of a video, and the objects of the first one."""

    paths: list[Path]
    first: Tensor  # uint8 (H, W): the numbers of the objects, 0 is none
    palette: list[int] | None


def open_video(frames: Path, truth: Path) -> Video:
    """List a video's frames and read its first mask.

    Raises `ValueError` if frames or the mask are missing, or if it marks no object.
    """
    passed = PassedOver()
    names = read_folder(frames, passed).images if is_folder(frames) else []
    passed.say(frames)
    paths = [frames / name for name in sorted(names) if name.endswith(".jpg")]
    if not paths or not (truth / f"{paths[0].stem}.png").is_file():
        missing = truth / (f"{paths[0].stem}.png" if paths else "")
        raise ValueError(f"a video needs frames in {frames} and the first one's mask, {missing}")
    mask = truth / f"{paths[0].stem}.png"
    first, palette = read_mask(mask)
    first[first == 255] = 0  # void: DAVIS marks pixels so that belong to no object
    if not first.any():
        raise ValueError(
            f"{mask} marks no object (255 is void): number its objects from 1, also a single one"
        )
    return Video(paths, first, palette)


def carry(
    frozen: FrozenBackbone, video: Video, target: Path, short_side: int, read: ReadFrame
) -> list[Path]:
    """Write a video's masks <frame>.png to `target`, the first as it is given; return their paths.

    Raises `ValueError` for a size that the backbone cannot take.
    """
    paths, first, palette = video
    masks = [target / f"{path.stem}.png" for path in paths]
    height, width = first.shape
    size = frame_size(height, width, short_side)
    step = size_multiple(frozen.backbone)
    if size[0] % step or size[1] % step:
        raise ValueError(
            f"--short-side {short_side}: frames would be {size}, not multiples of {step} pixels"
        )
    target.mkdir(parents=True, exist_ok=True)
    write_mask(masks[0], first, palette)
    labels = soft_labels(frozen, paths, first, size, read)
    for mask, soft in zip(masks[1:], labels, strict=True):
        write_mask(mask, enlarge_labels(soft, size, (height, width)), palette)
    logger.info("%s: %d frames of %d x %d", target.name, len(paths), *size)
    return masks


def soft_labels(
    frozen: FrozenBackbone,
    paths: list[Path],
    first: Tensor,
    size: tuple[int, int],
    read: ReadFrame,
) -> Iterator[Tensor]:
    """Yield soft labels (C, h, w) from the second frame on; `first` (H, W) is the first mask."""
    body, device = at_size(frozen.backbone, size), frozen.run.device
    with torch.no_grad():
        # one at a time: the maps of a long video do not fit in memory
        maps = (dense_features(body, read(path, size).to(device))[0] for path in paths)
        begin = next(maps)
        cells = (begin.shape[1], begin.shape[2])
        labels = shrink_mask(first.to(device), cells, int(first.max()) + 1)
        yield from propagate(itertools.chain([begin], maps), labels)


def frame_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return (height, width) of a resized frame: the longer side is a multiple of 64."""
    longer = max(height, width) * short_side // min(height, width) // SIDE_MULTIPLE * SIDE_MULTIPLE
    longer = max(longer, short_side)
    return (short_side, longer) if height <= width else (longer, short_side)


def read_frame(path: Path, size: tuple[int, int]) -> Tensor:
    """Return a frame as a normalised batch (1, 3, *size)."""
    image = resize_one(decode_rgb(path.read_bytes()), size, "bilinear")
    return normalise_(image[None].float() / 255)


def read_frame_of_dino(path: Path, size: tuple[int, int]) -> Tensor:
    """Return a frame as DINO's `eval_video_segmentation.py` makes it."""
    image = decode_rgb(path.read_bytes())[None].float()
    # OpenCV's linear resize: no antialiasing, rounded to whole levels
    image = interpolate(image, size, mode="bilinear", align_corners=False).round() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, _DINO_STD))
    return (image - mean) / std


def read_mask(path: Path) -> tuple[Tensor, list[int] | None]:
    """Return a mask (H, W) uint8 and its palette; `ValueError` for a PNG of colours."""
    with open_image(path.read_bytes()) as image:
        if image.mode not in ("P", "L"):
            raise ValueError(f"{path} is of mode {image.mode}; a mask is an indexed or a grey PNG")
        return torch.from_numpy(np.array(image)), image.getpalette()


def write_mask(path: Path, mask: Tensor, palette: list[int] | None) -> None:
    """Write an index mask (H, W) as PNG with `palette`, that of the first frame."""
    image = Image.fromarray(mask.cpu().numpy())
    if palette:
        image.putpalette(palette)
    image.save(path)


def judge(masks: list[Path], truth: Path, void: str = "skip") -> dict[str, dict[str, float]]:
    """Return mean, recall and decay of every object's J and F, in percent.

    Nothing if later frames have no annotation.
    """
    real = [truth / path.name for path in masks]
    if len(masks) < 2 or not all(path.is_file() for path in real):
        return {}
    found_masks, true_masks = (
        torch.stack([read_mask(path)[0] for path in paths]) for paths in (masks, real)
    )
    found = video_quality(found_masks, true_masks, void)
    return {str(label): _percent(scores) for label, scores in found.items()}


def _percent(scores: Quality) -> dict[str, float]:
    named = {"J": scores.region, "F": scores.contour}
    found = {name: 100 * measure.mean for name, measure in named.items()}
    for name, measure in named.items():
        found[f"{name} recall"] = 100 * measure.recall
        found[f"{name} decay"] = 100 * measure.decay
    return found


def summarise(quality: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the table of DAVIS: means over all objects; empty without objects."""
    if not quality:
        return {}
    means = {
        key: sum(scores[key] for scores in quality.values()) / len(quality)
        for key in ("J", "J recall", "J decay", "F", "F recall", "F decay")
    }
    table = {"J&F mean": (means["J"] + means["F"]) / 2}
    for key, value in means.items():
        table[key if " " in key else f"{key} mean"] = value
    return table


if __name__ == "__main__":
    run_main(main)
