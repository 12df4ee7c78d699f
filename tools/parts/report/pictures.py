"""Pictures of a run: its learning curve, and the nearest neighbours of some images."""

import importlib
import json
import logging
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from data.sources.base import Source
from utils.logger import METRICS_FILE
from utils.randomness import keyed_seed

logger = logging.getLogger("synco")

_TILE, _FRAME, _GAP = 84, 4, 6  # pixels
_RIGHT, _WRONG, _QUERY = (46, 160, 67), (207, 34, 46), (110, 119, 129)


def read_metrics(folder: Path, name: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of the metric `name` of a run; empty if it was never written."""
    file = folder / METRICS_FILE
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    rows = [
        row for row in map(_parse, lines) if isinstance(row.get(name), float) and "epoch" in row
    ]
    return [row["epoch"] for row in rows], [row[name] for row in rows]


def _parse(line: str) -> dict[str, float]:
    try:
        row = json.loads(line)
    except ValueError:  # torn by a kill
        return {}
    return row if isinstance(row, dict) else {}


def save_learning_curve(
    path: Path, folder: Path, accuracy: str, baselines: dict[str, float] | None = None
) -> bool:
    """Draw a run's loss, and its evaluation `accuracy` with `baselines` (percent), over the epochs.

    Tell whether there was something to draw with: without matplotlib this is a warning, and no
    picture.
    """
    try:
        pyplot = _pyplot()
    except ImportError:
        logger.warning(
            "no %s: matplotlib is not installed; python -m pip install matplotlib", path.name
        )
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    left.plot(*read_metrics(folder, "loss"), color="tab:blue", linewidth=1.2)
    left.set(xlabel="epoch", ylabel="training loss")
    epochs, values = read_metrics(folder, f"{accuracy}_top1")
    right.plot(
        epochs, values, color="tab:green", marker="o", markersize=3.5, label="trained backbone"
    )
    for (name, value), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="tab:gray", linestyle=style, linewidth=1.2, label=name)
    right.set(xlabel="epoch", ylabel=f"k-NN accuracy (k = {accuracy.removeprefix('knn')}), %")
    right.legend(frameon=False, loc="best")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return True


def _pyplot() -> ModuleType:
    importlib.import_module("matplotlib").use("Agg")  # a file, not a window
    return importlib.import_module("matplotlib.pyplot")


def pick_queries(labels: Tensor, num: int, seed: int) -> Tensor:
    """Draw `num` indices of `labels` (N,), of as many classes as possible, by the seed."""
    generator = torch.Generator().manual_seed(keyed_seed("neighbours", seed))
    order = torch.randperm(len(labels), generator=generator)[:1000]
    drawn = labels.cpu()[order]
    earlier = (drawn[:, None] == drawn).tril(-1).sum(1)  # how many of the same class come before
    return order[earlier.argsort(stable=True)[:num]]


def nearest(bank: Tensor, queries: Tensor, num: int) -> Tensor:
    """Return the `num` rows of `bank` (M, F) nearest to each of `queries` (Q, F), best first."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarity.topk(min(num, len(bank)), dim=1).indices


def save_neighbours(
    path: Path, queries: Source, chosen: Tensor, bank: Source, neighbours: Tensor
) -> None:
    """Draw one row a query: the image, then its neighbours, framed green if of its class, else red.

    `chosen` (Q,) are indices of `queries`, `neighbours` (Q, n) of `bank`.
    """
    cell = _TILE + _GAP
    width, height = cell * (neighbours.shape[1] + 1) + 3 * _GAP, cell * len(chosen) + _GAP
    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    for row, (index, found) in enumerate(zip(chosen.tolist(), neighbours.tolist(), strict=True)):
        canvas.paste(_tile(queries, index, _QUERY), (_GAP, row * cell + _GAP))
        for column, other in enumerate(found, start=1):
            right = int(bank.labels[other]) == int(queries.labels[index])
            tile = _tile(bank, other, _RIGHT if right else _WRONG)
            canvas.paste(tile, (column * cell + 3 * _GAP, row * cell + _GAP))
    canvas.save(path)


def _tile(source: Source, index: int, color: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(source.load(index).permute(1, 2, 0).contiguous().cpu().numpy())
    side = _TILE - 2 * _FRAME
    small = max(image.size) < side  # its pixels stay squares: a blur would hide them
    method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return ImageOps.expand(ImageOps.fit(image, (side, side), method), _FRAME, color)
