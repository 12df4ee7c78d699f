"""Make the page of one or several runs: one HTML file that needs no network."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tools.parts.report.charts import Chart, Line, line_chart
from tools.parts.report.looks import Strip, Tile
from tools.parts.report.score_table import COLUMNS
from tools.parts.run_files import RunFiles, differences, seconds_as_text
from utils.checkpoints.atomic import write_text
from utils.names import shown_name

_TEMPLATE = "report.html.j2"
_PANELS = {
    "loss": "training loss",
    "acc1": f"{shown_name('acc1')} (percent; not that of a classifier)",
    "lr": "learning rate",
    "embedding_std": "spread of the embeddings (0: collapsed)",
    "embedding_rank": "effective rank of the embeddings",
    "positive_logit": "mean logit of the positives",
    "negative_logit": "mean logit of the negatives of the queue or batch",
    "synthetic_share": "share of the synthetic negatives in the softmax",
    "grad_norm": "gradient norm",
    "images_per_second": "images per second",
}
_COLORS = 10  # in the style sheet


@dataclass
class RunPage:
    """What the page shows of one run."""

    files: RunFiles
    title: str
    table: list[list[str]] = field(default_factory=list)  # the head, then a row a representation
    best: list[list[bool]] = field(default_factory=list)
    levels: dict[str, float] = field(default_factory=dict)  # k-NN accuracy of what was not trained
    chance: float | None = None  # without labels
    recipe: str = ""
    changed: list[tuple[str, object, object, bool]] = field(default_factory=list)
    views: list[Strip] = field(default_factory=list)
    neighbours: list[list[Strip]] = field(default_factory=list)
    maps: list[Chart] = field(default_factory=list)
    map_classes: list[str] = field(default_factory=list)
    attention: list[Strip] = field(default_factory=list)
    reconstructions: list[Tile] = field(default_factory=list)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Return what was run, where and for how long, as far as the files say."""
        config, status = self.files.config, self.files.status
        start = self.files.starts[-1] if self.files.starts else {}
        command = start.get("command")
        began, ended = _first_and_last(self.files.folder / "log.txt")
        duration = (ended - began).total_seconds() if began and ended else None
        facts = {
            "state": f"{status.get('state', 'unknown')}, step {self.files.step()}",
            "method": config.get("MODEL.NAME"),
            "backbone": config.get("MODEL.BACKBONE.NAME"),
            "data": config.get("DATA.DATASET"),
            "began": began and f"{began:%Y-%m-%d %H:%M}",
            "first to last log line": duration is not None and seconds_as_text(duration),
            "starts": len(self.files.starts) > 1 and len(self.files.starts),
            "machine": " · ".join(
                str(start[key]) for key in ("host", "device", "processes") if start.get(key)
            )
            + (" process(es)" if start else ""),
            "commit": start.get("commit"),
            "versions": start and f"torch {start.get('torch')}, Python {start.get('python')}",
            "command": isinstance(command, list) and shlex.join(map(str, command)),
        }
        return [(name, str(value)) for name, value in facts.items() if value]


def write_page(path: Path, pages: Sequence[RunPage], notes: str) -> None:
    """Write the page of `pages` to `path`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = [page.files.name for page in pages]
    content = environment.get_template(_TEMPLATE).render(
        title=" · ".join(names) if len(names) < 4 else f"{len(names)} runs",
        pages=pages,
        charts=charts(pages),
        differences=differences([page.files.config for page in pages]),
        summary=[summary(page) for page in pages],
        notes=notes,
        colors=_COLORS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)


def charts(pages: Sequence[RunPage]) -> list[Chart]:
    """Return the curves of all runs, each panel with a line a run."""
    events = pages[0].files.events() if len(pages) == 1 else []
    drawn = []
    names = pages[0].files.knn_names()
    if names:
        levels = list(pages[0].levels.items()) if len(pages) == 1 else []
        title = f"k-NN accuracy, % (k = {names[0][3:].removesuffix('_top1')}"
        # no line for chance: the scale would begin there and hide the curve
        chance = pages[0].chance if len(pages) == 1 else None
        title += f", chance {chance:.3g} %)" if chance else ")"
        drawn += _panel(pages, names[0], title, events, levels, dots=True)
    for name, title in _PANELS.items():
        drawn += _panel(pages, name, title, events)
    return drawn[1:2] + drawn[:1] + drawn[2:] if names else drawn  # the loss comes first


def _panel(
    pages: Sequence[RunPage],
    name: str,
    title: str,
    events: Sequence[tuple[float, str]],
    levels: Sequence[tuple[str, float]] = (),
    dots: bool = False,
) -> list[Chart]:
    found = [(i, page.files.name, page.files.curve(name)) for i, page in enumerate(pages)]
    lines = [Line(label, points, i % _COLORS, dots) for i, label, points in found if points]
    return [line_chart(title, lines, events, levels)] if lines else []


def summary(page: RunPage) -> Mapping[str, str]:
    """Return the row of a run in the table of several."""
    files = page.files
    scores = page.table[-1][1:] if page.table else ["-"] * len(COLUMNS)
    return {
        "run": files.name,
        "method": str(files.config.get("MODEL.NAME", "-")),
        "backbone": str(files.config.get("MODEL.BACKBONE.NAME", "-")),
        "step": str(files.step()),
        **dict(zip(COLUMNS.values(), scores, strict=True)),
        "images/s": f"{files.speed() or 0:.0f}",
    }


def _first_and_last(path: Path) -> tuple[datetime | None, datetime | None]:
    """Return the times of the first and the last line of a log."""
    times = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.exists() else []:
        try:
            times.append(datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S"))
        except ValueError:
            continue
    return (times[0], times[-1]) if times else (None, None)
