"""Pictures of a run: its learning curve, and the nearest neighbours of some images."""

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from data.sources.base import Source
from utils.logger import METRICS_FILE
from utils.randomness import keyed_seed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("synco")

_TILE, _FRAME, _GAP = 84, 4, 6  # pixels
_FONT, _LINE = 15, 24  # of the captions
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
    path: Path,
    folder: Path,
    accuracy: str,
    baselines: Mapping[str, float] | None = None,
    events: Sequence[tuple[float, str]] = (),
) -> bool:
    """Draw a run's loss, and its evaluation `accuracy` with `baselines` (percent), over the epochs.

    `events` (epoch, name) are marked. Tell whether there was something to draw with: without
    matplotlib this is a warning, and no picture.
    """
    try:
        pyplot = _pyplot()
    except ImportError:
        logger.warning(
            "no %s: matplotlib is not installed; python -m pip install matplotlib", path.name
        )
        return False
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    left.plot(*read_metrics(folder, "loss"), color="tab:blue", linewidth=1.2)
    left.set(xlabel="epoch", ylabel="training loss")
    epochs, values = read_metrics(folder, f"{accuracy}_top1")
    if values:
        right.plot(epochs, values, color="tab:green", marker="o", markersize=3.5, label="trained")
    for (name, value), style in zip((baselines or {}).items(), ("--", ":", "-."), strict=False):
        right.axhline(value, color="tab:gray", linestyle=style, linewidth=1.2, label=name)
    right.set(xlabel="epoch", ylabel=f"k-NN accuracy (k = {accuracy.removeprefix('knn')}), %")
    if values or baselines:
        right.legend(frameon=False, loc="best")
    for axes in (left, right):
        axes.set_xlim(left=0)
        _mark(axes, events)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return True


def _mark(axes: "Axes", events: Sequence[tuple[float, str]]) -> None:
    """Draw a dotted line at each event, with its name above the panel."""
    last = axes.get_xlim()[1]
    shown = [(epoch, name) for epoch, name in events if epoch < last]
    for row, (epoch, name) in enumerate(reversed(shown)):
        axes.axvline(epoch, color="tab:gray", linestyle=":", linewidth=1)
        late = epoch > 0.6 * last
        axes.annotate(
            name,
            (epoch, 1.0),
            (-3 if late else 3, 2 + 10 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right" if late else "left",
            fontsize=7.5,
            color="dimgray",
        )


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
    path: Path, queries: Source, chosen: Tensor, bank: Source, found: Mapping[str, Tensor]
) -> None:
    """Draw one row a query: the image, then its neighbours, framed green if of its class, else red.

    `chosen` (Q,) are indices of `queries`. `found` maps the name of a network to the neighbours
    that it finds, indices (Q, n) of `bank`; the networks stand side by side.
    """
    labelled = bool((queries.labels[chosen] >= 0).all())
    text = "grey: the query    green: a neighbour of its class    red: of another class"
    text = text if labelled else "grey: the query, then its nearest neighbours"
    cell, count = _TILE + _GAP, max(rows.shape[1] for rows in found.values())
    block = cell * (count + 1) + 5 * _GAP  # a query and its neighbours
    font = ImageFont.load_default(_FONT)
    size = (block * len(found), cell * len(chosen) + 2 * _LINE + _GAP)
    canvas = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, _GAP), text, _QUERY, font)
    for number, (name, neighbours) in enumerate(found.items()):
        left = number * block + _GAP
        draw.text((left, _LINE + _GAP), name, (0, 0, 0), font)
        for row, (index, others) in enumerate(
            zip(chosen.tolist(), neighbours.tolist(), strict=True)
        ):
            top = 2 * _LINE + _GAP + row * cell
            canvas.paste(_tile(queries, index, _QUERY), (left, top))
            for column, other in enumerate(others, start=1):
                right = not labelled or int(bank.labels[other]) == int(queries.labels[index])
                tile = _tile(bank, other, _RIGHT if right else _WRONG)
                canvas.paste(tile, (left + column * cell + 2 * _GAP, top))
    canvas.save(path)


def _tile(source: Source, index: int, color: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(source.load(index).permute(1, 2, 0).contiguous().cpu().numpy())
    side = _TILE - 2 * _FRAME
    small = max(image.size) < side  # its pixels stay squares: a blur would hide them
    method = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
    return ImageOps.expand(ImageOps.fit(image, (side, side), method), _FRAME, color)
