"""The pictures of a study, as SVG text: accuracy of each entry, and accuracy over time."""

import math
import statistics
from collections.abc import Iterable
from xml.sax.saxutils import escape

from tools.parts.study.study import MEASURES, UNTRAINED, Results, Row, Study, interval, number

_WIDTH, _ROW, _LEFT, _RIGHT = 720, 26, 190, 60
_HEIGHT, _TOP, _BOTTOM = 380, 40, 50  # of the picture over time
_COLOURS = ("#2563a8", "#c2410c", "#15803d", "#7e22ce", "#525252")


def picture(study: Study, results: Results, tier: str, measure: str = "knn20") -> str:
    """Draw accuracy over time if the study's entries say which line they belong to, else dots."""
    if any(entry.line for entry in study.entries):
        return over_time(study, results, tier, measure)
    return dots(study, results, measure)


def _mean_and_interval(rows: Iterable[Row], measure: str) -> tuple[float, float] | None:
    """Return mean and half the width of its 95 % interval (0: of one seed), None without rows."""
    values = [number(row, measure) for row in rows]
    if not values or not all(map(math.isfinite, values)):
        return None
    half = interval(values)
    return statistics.mean(values), half if math.isfinite(half) else 0.0


def dots(study: Study, results: Results, measure: str) -> str:
    """Draw a dot an entry with its 95 % interval, the best on top."""
    found = {}
    for entry in study.entries:
        point = _mean_and_interval(results[entry.name].values(), measure)
        if point:
            found[entry.name] = point
    best_first = sorted(found, key=lambda name: -found[name][0])
    low, high = _range(found.values())

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    parts = _head(study, measure, 60 + _ROW * len(found))
    for place, name in enumerate(best_first):
        (mean, half), y = found[name], 46 + _ROW * place
        parts += [
            _text(_LEFT - 12, y + 4, name, "end"),
            _line(_LEFT, y, _WIDTH - _RIGHT, y, "#eee"),
            _line(x(mean - half), y, x(mean + half), y, _COLOURS[0], 3),
            f'<circle cx="{x(mean):.1f}" cy="{y}" r="5" fill="{_COLOURS[0]}"/>',
            _text(_WIDTH - _RIGHT + 12, y + 4, f"{mean:.1f}"),
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def over_time(study: Study, results: Results, tier: str, measure: str) -> str:
    """Draw lines of accuracy over minutes, a point an entry with its 95 % interval."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    untrained: dict[str, list[tuple[float, float, float]]] = {}  # they need no time: levels
    for entry in study.entries:
        point = _mean_and_interval(results[entry.name].values(), measure)
        if point:
            minutes = entry.minutes or study.minutes
            kind = untrained if entry.peer in UNTRAINED else lines
            kind.setdefault(entry.line or entry.name, []).append((minutes, *point))
    points = [point for line in lines.values() for point in line]
    shown = [*points, *(line[0] for line in untrained.values())]
    low, high = _range([(mean, half) for _, mean, half in shown])
    times = sorted({minutes for minutes, _, _ in points}) or [1.0]
    # half of the shortest to twice the longest time, each doubling as wide as the others
    first, last = math.log2(times[0]) - 1, math.log2(times[-1]) + 1

    def x(minutes: float) -> float:
        return 60 + (math.log2(minutes) - first) / (last - first) * (_WIDTH - 240)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = _head(study, measure, _HEIGHT)
    for value in range(low, high + 1):
        if value % 5 == 0:
            parts += [_line(60, y(value), _WIDTH - 180, y(value), "#eee")]
            parts += [_text(50, y(value) + 4, str(value), "end")]
    for minutes in times:
        parts += [_text(x(minutes), _HEIGHT - _BOTTOM + 20, f"{minutes:g}", "middle")]
    axis = "minutes of training" if tier == "gpu" else "CPU minutes of training"
    parts += [_text(x(times[len(times) // 2]), _HEIGHT - 10, axis, "middle")]
    for name, [(_, mean, _), *_] in untrained.items():
        parts += [_line(60, y(mean), _WIDTH - 180, y(mean), "#777", dashes=True)]
        parts += [_text(_WIDTH - 172, y(mean) + 4, f"{name} {mean:.1f}")]
    for place, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[place % len(_COLOURS)]
        line.sort()
        path = " ".join(f"{x(minutes):.1f},{y(mean):.1f}" for minutes, mean, _ in line)
        parts += [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
        for minutes, mean, half in line:
            parts += [_line(x(minutes), y(mean - half), x(minutes), y(mean + half), colour, 3)]
            parts += [f'<circle cx="{x(minutes):.1f}" cy="{y(mean):.1f}" r="4" fill="{colour}"/>']
        minutes, mean, _ = line[-1]
        parts += [_text(x(minutes) + 10, y(mean) + 4, f"{name} {mean:.1f}")]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _range(points: Iterable[tuple[float, float]]) -> tuple[int, int]:
    """Return whole numbers below and above all means with their intervals."""
    ends = [end for mean, half in points for end in (mean - half, mean + half)] or [0.0, 1.0]
    return math.floor(min(ends) - 1), math.ceil(max(ends) + 1)


def _head(study: Study, measure: str, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="12" y="20" font-weight="bold">{escape(study.title)}: {MEASURES[measure]} (%)'
        "</text>",
    ]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1, dashes: bool = False
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    dashed = ' stroke-dasharray="5 4"' if dashes else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dashed}/>'
