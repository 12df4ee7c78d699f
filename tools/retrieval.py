"""Measure image retrieval with frozen features: mAP and mP@k on revisited Oxford and Paris.

Example: python tools/retrieval.py --cfg configs/moby_swin_tiny.yaml --data-path D --output O

Reads D/<set>/gnd_<set>.pkl and D/<set>/jpg/*.jpg for each of --sets, with the newest weights of the
run O/<name>/<tag>, and writes O/<name>/<tag>/retrieval/<weights>-<sets>.json.
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
        "--multi-scale", action="store_true", help="mean feature over five sizes, 1 to 1/4"
    )
    parser.add_argument("--crop-queries", action="store_true", help="cut queries to their building")
    return parser


# The command line is read before torch is, which takes seconds to import.
if __name__ == "__main__":
    answer_at_once(_parser())

import json
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from data import evaluation_loader
from data.sources.folder import FileSource
from evaluation.accuracy import extract_features
from evaluation.retrieval import Box, read_ground_truth, retrieval_scores
from models.parts.backbones import Backbone
from models.parts.resolution import at_size, size_multiple
from tools.parts.frozen import FrozenBackbone, open_frozen
from utils.checkpoints.atomic import write_text
from utils.names import folder_name

MULTI_SCALE = (1.0, 2**-0.5, 0.5, 2**-1.5, 0.25)


def main() -> int:
    """Measure every set that is asked for, print one table; return the exit code."""
    args, flags = parse(_parser())
    frozen = open_frozen(args, flags)
    scales = MULTI_SCALE if args.multi_scale else (1.0,)
    root = Path(frozen.run.cfg.DATA.PATH)
    settings = [frozen.label, *(folder_name(name, "--sets") for name in args.sets)]
    settings += ["ms"] * args.multi_scale + ["crop"] * args.crop_queries
    results = {
        name: evaluate_set(frozen, root / name, scales, args.crop_queries) for name in args.sets
    }
    file = frozen.folder("retrieval") / f"{'-'.join(settings)}.json"
    record = {"weights": frozen.label, "scales": list(scales), "crop_queries": args.crop_queries}
    write_text(file, json.dumps({**record, "sets": results}, indent=1))
    print(table(results))
    print(file)
    return 0


def evaluate_set(
    frozen: FrozenBackbone, folder: Path, scales: Sequence[float], crop: bool
) -> dict[str, float]:
    """Return the scores of the set `folder.name`; `ValueError` where files are missing."""
    truth = read_ground_truth(folder / f"gnd_{folder.name}.pkl")
    boxes = truth.boxes if crop else [None] * len(truth.queries)
    bank = image_features(frozen, folder / "jpg", truth.images, [None] * len(truth.images), scales)
    queries = image_features(frozen, folder / "jpg", truth.queries, boxes, scales)
    similarity = normalize(bank, dim=1) @ normalize(queries, dim=1).T
    ranking = similarity.argsort(dim=0, descending=True, stable=True)
    return retrieval_scores(ranking.cpu().numpy(), truth.lists)


def image_features(
    frozen: FrozenBackbone,
    folder: Path,
    names: list[str],
    boxes: Sequence[Box | None],
    scales: Sequence[float],
) -> Tensor:
    """Return the features (N, F) of `folder`/<name>.jpg in the evaluation view, not normalised."""
    cfg = frozen.run.cfg
    source = BoxedSource(folder, names, boxes)
    batches = evaluation_loader(cfg, source, frozen.run.device, cfg.LINEAR.BATCH_SIZE)
    with torch.no_grad():
        return extract_features(
            scaled_features(frozen.backbone, cfg.DATA.IMG_SIZE, scales), batches
        )[0]


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
