"""Draw lines and clouds of points as SVG text, for a page that is light or dark."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

Point = tuple[float, float]
_WIDTH, _HEIGHT = 520.0, 250.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 14.0, 12.0, 34.0
_MOST_POINTS = 400  # of a line: more cannot be seen


class Line(NamedTuple):
    """A named line; `color` is the number of its colour in the style sheet."""

    name: str
    points: Sequence[Point]
    color: int
    dots: bool = False


class Chart(NamedTuple):
    """A title and its picture."""

    title: str
    svg: Markup


def line_chart(
    title: str,
    lines: Sequence[Line],
    events: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[str, float]] = (),
) -> Chart:
    """Draw `lines` over epochs, with named `events` (epoch) and dashed `levels` (value)."""
    finite = [p for line in lines for p in line.points if math.isfinite(p[1])]
    heights = [y for _, y in finite] + [value for _, value in levels]
    ticks = nice_ticks(min(heights), max(heights))
    last = max(x for x, _ in finite) or 1.0
    shown = [(x, name) for x, name in events if 0 < x < last]
    top = _TOP + 13 * len(shown)  # each event has a row for its name

    def place(point: Point) -> Point:
        span = ticks[-1] - ticks[0] or 1.0
        x = _LEFT + point[0] / last * (_WIDTH - _LEFT - _RIGHT)
        share = (point[1] - ticks[0]) / span
        return x, _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - top)

    parts = [_axes(ticks, nice_ticks(0, last), last, place)]
    for row, (epoch, name) in enumerate(shown):
        parts.append(_event(place((epoch, ticks[0])), name, _TOP + 13 * row + 8))
    parts += [_line(line, place) for line in lines]
    # the names last, so that no curve crosses them out
    named = sorted((place((0, value))[1], name) for name, value in levels)
    for number, (y, name) in enumerate(named):
        # below its line, where no curve that is better comes; above it if the next is near
        near = number + 1 < len(named) and named[number + 1][0] - y < 16
        parts.append(_level(name, y, -4 if near else 13))
    return Chart(title, _svg(_WIDTH, _HEIGHT, title, parts))


def cloud(title: str, points: Sequence[Point], colors: Sequence[int]) -> Chart:
    """Draw points in the unit square, each in the colour of its class."""
    side = 360.0
    parts = ['<rect class="frame" x="1" y="1" width="358" height="358" rx="8"/>']
    for (x, y), color in zip(points, colors, strict=True):
        cx, cy = 12 + x * (side - 24), 12 + y * (side - 24)
        parts.append(f'<circle class="f{color}" cx="{cx:.1f}" cy="{cy:.1f}" r="3"/>')
    return Chart(title, _svg(side, side, title, parts))


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return round numbers that enclose `low` to `high`."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next((f for f in (1, 2, 5) if (high - low) / (step * f) <= about), 10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _axes(ticks: list[float], epochs: list[float], last: float, place: object) -> str:
    assert callable(place)
    parts = []
    for value in ticks:
        y = place((0, value))[1]
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{value:.5g}", "end"))
    for epoch in epochs:
        if epoch <= last:
            x = place((epoch, ticks[0]))[0]
            parts.append(_text(x, _HEIGHT - _BOTTOM + 16, f"{epoch:g}", "middle"))
    parts.append(_text(_WIDTH - _RIGHT, _HEIGHT - 3, "epoch", "end"))
    return "".join(parts)


def _event(foot: Point, name: str, y: float) -> str:
    late = foot[0] > _WIDTH * 0.6  # the name goes to the left of the line
    x, anchor = (foot[0] - 4, "end") if late else (foot[0] + 4, "start")
    line = f'<path class="event" d="M{foot[0]:.1f} {y - 8:.1f}V{foot[1]:.1f}"/>'
    return line + _text(x, y, name, anchor, "note")


def _level(name: str, y: float, beside: float) -> str:
    line = f'<path class="level" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
    return line + _text(_WIDTH - _RIGHT, y + beside, name, "end", "note")


def _line(line: Line, place: object) -> str:
    assert callable(place)
    every = max(1, math.ceil(len(line.points) / _MOST_POINTS))
    kept = [*line.points[:-1:every], *line.points[-1:]]
    placed = [(place(point), point) for point in kept if math.isfinite(point[1])]
    path = " ".join(f"{x:.1f},{y:.1f}" for (x, y), _ in placed)
    text = f'<polyline class="s{line.color}" points="{path}"/>'
    if not line.dots:
        return text
    for (x, y), (epoch, value) in placed:
        said = escape(f"{line.name}: {value:.2f} at epoch {epoch:g}")
        text += f'<circle class="f{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
        text += f"<title>{said}</title></circle>"
    return text


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(text)}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
    return Markup(head + "".join(parts) + "</svg>")
