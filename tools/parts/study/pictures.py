"""The pictures of a study, as SVG text: accuracy of each entry, and accuracy over time."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from tools.parts.study.study import MEASURES, UNTRAINED, Results, Row, Study, measured_time, number
from tools.parts.study.tables import interval

_WIDTH, _ROW, _LEFT, _RIGHT = 760, 26, 230, 60
_HEIGHT, _TOP, _BOTTOM = 380, 40, 50  # of the picture over time
_SPREAD = "bars: 95 % interval over seeds; hollow: one seed"
_COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#525252")


def picture(study: Study, results: Results, tier: str) -> str:
    """Draw accuracy over time if the study's entries say which line they belong to, else dots."""
    if any(entry.line for entry in study.entries):
        return over_time(study, results, tier)
    return dots(study, results, tier)


class _Point(NamedTuple):
    """Mean of an entry's seeds, half the width of its 95 % interval (0: of one seed)."""

    minutes: float  # NaN: all rows have the time of another machine
    mean: float
    half: float
    alone: bool  # one seed: nothing is known of its spread


def _point(rows: Sequence[Row], tier: str, measure: str) -> _Point | None:
    values = [number(row, measure) for row in rows]
    if not values or not all(map(math.isfinite, values)):
        return None
    half = interval(values)
    clock = "wall_seconds" if tier == "gpu" else "cpu_seconds"
    times = [number(row, clock) / 60 for row in measured_time(rows)] or [math.nan]
    alone = not math.isfinite(half)
    return _Point(statistics.mean(times), statistics.mean(values), 0.0 if alone else half, alone)


def dots(study: Study, results: Results, tier: str) -> str:
    """Draw a dot an entry with its 95 % interval, the best on top."""
    found = {}
    for entry in study.entries:
        point = _point(list(results[entry.name].values()), tier, study.measure)
        if point:
            found[entry.name] = point
    best_first = sorted(found, key=lambda name: -found[name].mean)
    low, high = _range(found.values())
    bottom = 46 + _ROW * len(found)

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = _head(study, bottom + 40)
    for value in range(low, high + 1):
        if value % 5 == 0:
            parts += [_line(x(value), 34, x(value), bottom - 12, "#eee")]
            parts += [_text(x(value), bottom + 4, str(value), "middle")]
    parts.append(_text(12, bottom + 28, _SPREAD))
    for place, name in enumerate(best_first):
        point, y = found[name], 46 + _ROW * place
        parts += [
            _text(_LEFT - 12, y + 4, name, "end"),
            _line(_LEFT, y, _WIDTH - _RIGHT, y, "#eee"),
            *_mark(point, (x(point.mean - point.half), y), (x(point.mean + point.half), y)),
            _text(_WIDTH - _RIGHT + 12, y + 4, f"{point.mean:.1f}"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def over_time(study: Study, results: Results, tier: str) -> str:
    """Draw lines of accuracy over the minutes that were used, a point an entry."""
    lines: dict[str, list[_Point]] = {}
    untrained: dict[str, _Point] = {}  # they need no time: levels
    for entry in study.entries:
        point = _point(list(results[entry.name].values()), tier, study.measure)
        if point and entry.peer in UNTRAINED:
            untrained[entry.line or entry.name] = point
        elif point and math.isnan(point.minutes) and not (entry.epochs or entry.epochs_of):
            # trained elsewhere, for as many epochs as this time holds
            planned = point._replace(minutes=entry.minutes or study.minutes)
            lines.setdefault(entry.line or entry.name, []).append(planned)
        elif point and math.isfinite(point.minutes):
            lines.setdefault(entry.line or entry.name, []).append(point)
    points = [point for line in lines.values() for point in line]
    low, high = _range([*points, *untrained.values()])
    times = [point.minutes for point in points] or [1.0]
    # half of the shortest to twice the longest time, each doubling as wide as the others
    first, last = math.log2(min(times)) - 1, math.log2(max(times)) + 1

    def x(minutes: float) -> float:
        return 60 + (math.log2(minutes) - first) / (last - first) * (_WIDTH - 240)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = _head(study, _HEIGHT)
    for value in range(low, high + 1):
        if value % 5 == 0:
            parts += [_line(60, y(value), _WIDTH - 180, y(value), "#eee")]
            parts += [_text(50, y(value) + 4, str(value), "end")]
    for minutes in (1, 2, 5, 10, 20, 60):
        if first < math.log2(minutes) < last:
            parts += [_text(x(minutes), _HEIGHT - _BOTTOM + 20, str(minutes), "middle")]
    axis = "minutes of training" if tier == "gpu" else "CPU minutes of training"
    parts += [_text(12, _HEIGHT - 10, f"{axis}; each point has its own runs; {_SPREAD}")]
    for name, level in untrained.items():
        parts += [_line(60, y(level.mean), _WIDTH - 180, y(level.mean), "#777", dashes=True)]
        parts += [_text(_WIDTH - 172, y(level.mean) + 4, f"{name} {level.mean:.1f}")]
    for place, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        line.sort()
        path = " ".join(f"{x(point.minutes):.1f},{y(point.mean):.1f}" for point in line)
        parts += [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
        for point in line:
            place_x = x(point.minutes)
            ends = (place_x, y(point.mean + point.half)), (place_x, y(point.mean - point.half))
            parts += _mark(point, *ends, colour)
        parts += [
            _text(x(line[-1].minutes) + 10, y(line[-1].mean) + 4, f"{name} {line[-1].mean:.1f}")
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _mark(
    point: _Point, one: tuple[float, float], other: tuple[float, float], colour: str = _COLOURS[0]
) -> list[str]:
    """Draw an interval from `one` end to the `other` and the mean between them."""
    middle = (one[0] + other[0]) / 2, (one[1] + other[1]) / 2
    fill = "#fff" if point.alone else colour
    return [
        _line(*one, *other, colour, 3),
        f'<circle cx="{middle[0]:.1f}" cy="{middle[1]:.1f}" r="5" fill="{fill}" '
        f'stroke="{colour}" stroke-width="2"/>',
    ]


def _range(points: Iterable[_Point]) -> tuple[int, int]:
    """Return whole numbers below and above all means with their intervals."""
    ends = [end for p in points for end in (p.mean - p.half, p.mean + p.half)] or [0.0, 1.0]
    return math.floor(min(ends) - 1), math.ceil(max(ends) + 1)


def _head(study: Study, height: int) -> list[str]:
    title = escape(f"{study.title}: {MEASURES[study.measure]} (%)")
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="20" font-weight="bold">{title}</text>',
    ]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1, dashes: bool = False
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashed = ' stroke-dasharray="5 4"' if dashes else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashed}/>'
