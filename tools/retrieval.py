"""Measure image retrieval with frozen features: mAP and mP@k on revisited Oxford and Paris.

Example: python tools/retrieval.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O

Reads D/<set>/gnd_<set>.pkl and D/<set>/jpg/*.jpg for each of --sets, with the newest weights of the
run O/<name>/<tag>, and writes O/<name>/<tag>/retrieval/<weights>-<sets>-dino<size>.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file

from utils.cli import Parser, add_which, answer_at_once, make_parser, parse, run_main

SETS = ("roxford5k", "rparis6k")
FLAGS = ("--data-path", "--output", "--tag", "--seed", "--device", "--batch-size")


def _parser() -> Parser:
    parser = make_parser(__doc__ or "", {"--batch-size": "LINEAR.BATCH_SIZE"}, FLAGS)
    parser.add_argument(
        "--pretrained", metavar="FILE", help="weights or a run's folder; none: untrained"
    )
    add_which(parser)
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="folders below --data-path")
    parser.add_argument(
        "--protocol",
        choices=("dino", "view"),
        default="dino",
        help="dino: the whole image, as published | view: the square crop of a probe",
    )
    parser.add_argument(
        "--imsize", type=int, metavar="PIXELS", help="dino: longer side at most (default: 224)"
    )
    parser.add_argument(
        "--multi-scale",
        action="store_true",
        help="mean feature over sizes: 1, 0.71, 0.5; view: five, 1 to 1/4",
    )
    parser.add_argument("--crop-queries", action="store_true", help="cut queries to their building")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from data import evaluation_loader
from data.augment.pipeline import normalise_
from data.dense import samples_in_order
from data.sources.folder import FileSource
from evaluation.accuracy import extract_features
from evaluation.retrieval import Box, GroundTruth, read_ground_truth, retrieval_scores
from models.parts.backbones import Backbone
from models.parts.resolution import at_size, dense_swin, size_multiple
from tools.parts.frozen import FrozenBackbone, open_frozen
from utils.batch import Batch
from utils.checkpoints.atomic import write_text
from utils.names import folder_name

MULTI_SCALE = {"dino": (1.0, 2**-0.5, 0.5), "view": (1.0, 2**-0.5, 0.5, 2**-1.5, 0.25)}
IMSIZE = 224  # of DINO's command for revisited Oxford (Caron et al. 2021, arXiv:2104.14294)


def main() -> int:
    """Measure every set that is asked for, print one table; return the exit code."""
    args, flags = parse(_parser())
    imsize = image_size(args.protocol, args.imsize)
    names = [folder_name(name, "--sets") for name in args.sets]
    frozen = open_frozen(args, flags)
    scales = MULTI_SCALE[args.protocol] if args.multi_scale else (1.0,)
    root = Path(frozen.run.cfg.DATA.PATH)
    view = f"dino{imsize}" if imsize else f"view{frozen.run.cfg.DATA.IMG_SIZE}"
    settings = [frozen.label, *names, view]
    settings += ["ms"] * args.multi_scale + ["crop"] * args.crop_queries
    # all, so that a missing file is found before anything is computed
    sets = {name: open_set(root / name, args.crop_queries) for name in names}
    results = {name: evaluate_set(frozen, found, scales, imsize) for name, found in sets.items()}
    file = frozen.folder("retrieval") / f"{'-'.join(settings)}.json"
    record = {"weights": frozen.label, "protocol": args.protocol}
    record |= {"imsize": imsize or frozen.run.cfg.DATA.IMG_SIZE}
    record |= {"scales": list(scales), "crop_queries": args.crop_queries}
    write_text(file, json.dumps({**record, "sets": results}, indent=1))
    print(table(results))
    print(file)
    return 0


def image_size(protocol: str, imsize: int | None) -> int:
    """Return the longest side of an image, 0 for the square view; `ValueError` for another text."""
    if protocol == "view":
        if imsize is not None:
            raise ValueError(
                f"--imsize {imsize}: --protocol view crops to DATA.IMG_SIZE; set that, or drop "
                "--protocol"
            )
        return 0
    if imsize is not None and imsize < 1:
        raise ValueError(f"--imsize {imsize}: give a number of pixels, such as {IMSIZE}")
    return imsize or IMSIZE


class RetrievalSet(NamedTuple):
    """Images to be ranked, queries, and what is right for each query."""

    images: "BoxedSource"
    queries: "BoxedSource"
    truth: GroundTruth


def open_set(folder: Path, crop: bool) -> RetrievalSet:
    """Open the set `folder.name`; `ValueError` where files are missing."""
    truth = read_ground_truth(folder / f"gnd_{folder.name}.pkl")
    boxes = truth.boxes if crop else [None] * len(truth.queries)
    images = BoxedSource(folder / "jpg", truth.images, [None] * len(truth.images))
    return RetrievalSet(images, BoxedSource(folder / "jpg", truth.queries, boxes), truth)


def evaluate_set(
    frozen: FrozenBackbone, found: RetrievalSet, scales: Sequence[float], imsize: int
) -> dict[str, float]:
    """Return the scores of a set."""
    bank, queries = (
        normalize(image_features(frozen, source, scales, imsize), dim=1)
        for source in (found.images, found.queries)
    )
    ranking = (bank @ queries.T).argsort(dim=0, descending=True, stable=True)
    return retrieval_scores(ranking.cpu().numpy(), found.truth.lists)


def image_features(
    frozen: FrozenBackbone, source: "BoxedSource", scales: Sequence[float], imsize: int
) -> Tensor:
    """Return the features (N, F) of the images, not normalised; `imsize` 0: in the square view."""
    cfg, device = frozen.run.cfg, frozen.run.device
    if imsize:
        features = photo_features(frozen.backbone, scales)
        batches: Iterator[Batch] = photos(source, imsize, cfg.DATA.NUM_WORKERS, device)
    else:
        features = scaled_features(frozen.backbone, cfg.DATA.IMG_SIZE, scales)
        batches = evaluation_loader(cfg, source, device, cfg.LINEAR.BATCH_SIZE)
    with torch.no_grad():
        return extract_features(features, batches)[0]


def photos(
    source: "BoxedSource", imsize: int, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the images one by one, since each has its own shape."""
    prepare = partial(shrink_photo, imsize=imsize)
    for index, image in samples_in_order(source, prepare, device=device, workers=workers):
        pixels = normalise_(image[None].to(device).float() / 255)
        yield Batch([pixels], torch.full((1,), -1, device=device), torch.tensor([index]))


def shrink_photo(image: Tensor, _: None, imsize: int) -> Tensor:
    """Bring the longer side of uint8 (3,H,W) down to `imsize` with PIL, as DINO does."""
    photo = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    photo.thumbnail((imsize, imsize), Image.Resampling.LANCZOS)  # never enlarges
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


def photo_features(backbone: Backbone, scales: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, 3, H, W) of any shape to their mean features (N, F)."""
    step = size_multiple(backbone)
    if isinstance(backbone, SwinTransformer):
        # also at the built size, or images of that size would meet another network
        backbone, step = cast(Backbone, dense_swin(copy.deepcopy(backbone))), 1
    body_at = lru_cache(maxsize=64)(partial(at_size, backbone))

    def features(images: Tensor) -> Tensor:
        found = []
        for scale in scales:
            x = images
            if scale != 1:
                x = interpolate(images, scale_factor=scale, mode="bilinear", align_corners=False)
            height, width = x.shape[2:]
            if min(height, width) < step:  # thinner than a patch
                x = interpolate(x, (max(height, step), max(width, step)), mode="bilinear")
            # DINO's patch embedding leaves out incomplete patches at the right and below
            height, width = (side // step * step for side in x.shape[2:])
            found.append(body_at((height, width))(x[:, :, :height, :width]))
        return torch.stack(found).float().mean(dim=0)

    return features


class BoxedSource(FileSource):
    """The images `folder`/<name>.jpg, those with a box (left, top, right, bottom) cut to it."""

    def __init__(self, folder: Path, names: list[str], boxes: Sequence[Box | None]) -> None:
        missing = [name for name in names if not (folder / f"{name}.jpg").is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} images of its set, such as {missing[0]}.jpg"
            )
        super().__init__(folder, [f"{name}.jpg" for name in names], [-1] * len(names), [])
        self.boxes = list(boxes)

    def sample(self, index: int) -> tuple[Tensor, None]:
        """Return an image and no annotation."""
        return self.load(index), None

    def load(self, index: int) -> Tensor:
        """Read, decode and cut one image: uint8 (3,H,W) RGB."""
        image, box = super().load(index), self.boxes[index]
        if box is None:
            return image
        left, top, right, bottom = (max(round(value), 0) for value in box)
        return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def scaled_features(
    backbone: Backbone, img_size: int, scales: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, 3, S, S) to their mean features (N, F) over scales of S."""
    step = size_multiple(backbone)
    # a backbone takes only multiples of its patch or window size
    sides = [
        max(step, round(img_size * scale / step) * step) if scale != 1 else img_size
        for scale in scales
    ]
    bodies = [at_size(backbone, (side, side)) for side in sides]

    def features(images: Tensor) -> Tensor:
        found = [
            body(images if side == img_size else interpolate(images, (side, side), mode="bilinear"))
            for body, side in zip(bodies, sides, strict=True)
        ]
        return torch.stack(found).float().mean(dim=0)

    return features


def table(results: dict[str, dict[str, float]]) -> str:
    """Return one aligned line a set and difficulty, in percent."""
    head = ["set", "difficulty", "mAP", "mP@1", "mP@5", "mP@10"]
    rows = [head]
    for name, scores in results.items():
        for level in ("easy", "medium", "hard"):
            figures = [f"{scores[f'{level}/{column}']:.2f}" for column in head[2:]]
            rows.append([name, level, *figures])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows
    )


if __name__ == "__main__":
    run_main(main)
