"""Charts as inline SVG: lines with their names at the end, values on hover, colours and fonts from the page's style.

A page gives `--c0` .. `--c7` (one an architecture), `--peer`, `--ink`, `--soft` and `--grid`; see `page.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 50, 110, 26, 40  # margins: values at the left, names at the right, the unit on top
LINE = 14  # height of a name
COLOURS = 8  # an architecture's number modulo this is its colour; from this number on lines are dashed


@dataclass(frozen=True)
class Series:
    """A line: points (x, y, what hovering says), and where seeds differ (x, low, high). colour None: not ours."""

    name: str
    points: Sequence[tuple[float, float, str]]
    colour: int | None
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Axis:
    """What an axis shows, its unit in the label; a value in words, None: as many digits as its marks need; `base` of a
    logarithmic one; `limits` of values shown, None: all; `signed`: with a plus;
    `ticks`: what is marked, round values if empty."""

    label: str
    shown: Callable[[float], str] | None = None
    base: int | None = None
    limits: tuple[float, float] | None = None
    signed: bool = False
    ticks: Sequence[float] = ()


def line_chart(series: Sequence[Series], x: Axis, y: Axis, about: str) -> str:
    """An SVG element; `about` is said to those who do not see it. Raises ValueError where there is no point."""
    xs = [point[0] for line in series for point in line.points]
    ys = [point[1] for line in series for point in line.points] + [
        bound for line in series for _, *bounds in line.band for bound in bounds]
    across, up = _Scale(x, xs, LEFT, WIDTH - RIGHT), _Scale(y, ys, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across, up), f'<svg x="{LEFT}" y="{TOP}" width="{WIDTH - RIGHT - LEFT}" '
             f'height="{HEIGHT - BOTTOM - TOP}" viewBox="{LEFT} {TOP} {WIDTH - RIGHT - LEFT} {HEIGHT - BOTTOM - TOP}">']
    for line in series:
        if len(line.band) > 1:
            edge = [(at, high) for at, _, high in line.band] + [(at, low) for at, low, _ in reversed(line.band)]
            parts.append(f'<path class="band" {_style(line)} d="{_path(edge, across, up)}Z"/>')
    for line in series:
        points = [(at, value) for at, value, _ in line.points]
        parts.append(f'<path class="line" {_style(line)} d="{_path(points, across, up)}"/>')
    parts.append("</svg>")
    for line in series:
        parts.append(f'<g class="dots" {_style(line)}>')
        for at, value, said in line.points:
            if up.inside(value) and across.inside(at):
                size = 2.6 if len(line.points) <= 16 else 0
                parts.append(f'<circle class="dot" cx="{across(at):.1f}" cy="{up(value):.1f}" r="{size}"/><circle '
                             f'class="hit" cx="{across(at):.1f}" cy="{up(value):.1f}" r="8"><title>{escape(said)}'
                             '</title></circle>')
        parts.append("</g>")
    return _svg(parts + _names(series, across, up), HEIGHT, about)


def dot_chart(rows: Sequence[Series], x: Axis, about: str) -> str:
    """A row a name: a dot for each value (the points' y is not looked at), a line over their range, a bar at the mean.
    """
    height = TOP + BOTTOM + 26 * len(rows)
    across = _Scale(x, [point[0] for row in rows for point in row.points], 112, WIDTH - 16)
    parts = []
    for tick in across.ticks:
        at, foot = across(tick), height - BOTTOM
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{foot}"/>'
                     + _text(at, foot + 16, across.shown(tick), "middle"))
    parts.append(_text((112 + WIDTH - 16) / 2, height - 6, x.label, "middle"))
    for number, row in enumerate(rows):
        level = TOP + 26 * number + 8
        values = [point[0] for point in row.points]
        mean = across(math.fsum(values) / len(values))
        parts.append(f'<g class="dots" {_style(row)}>{_text(104, level + 4, row.name, "end", "name")}'
                     f'<line class="range" x1="{across(min(values)):.1f}" x2="{across(max(values)):.1f}" y1="{level}" '
                     f'y2="{level}"/><line class="mean" x1="{mean:.1f}" x2="{mean:.1f}" y1="{level - 8}" '
                     f'y2="{level + 8}"/>')
        for value, _, said in row.points:
            parts.append(f'<circle class="dot" cx="{across(value):.1f}" cy="{level}" r="3.4"/><circle class="hit" '
                         f'cx="{across(value):.1f}" cy="{level}" r="8"><title>{escape(said)}</title></circle>')
        parts.append("</g>")
    return _svg(parts, height, about)


class _Scale:
    """Values to pixels along an axis, with room at both ends, and the values at which it is marked."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float):
        self.axis, self.start, self.end = axis, start, end
        low, high = axis.limits or (min(values), max(values))
        self.low, self.high = self._place(low), self._place(high)
        spread = self.high - self.low
        room = 0.04 * spread if spread else 0.5 if axis.base else abs(low) * 0.05 or 0.5
        self.low, self.high = self.low - room, self.high + room
        if axis.ticks:
            self.ticks = list(axis.ticks)
        elif axis.base:
            self.ticks = _log_ticks(axis.base, self.low, self.high)
        else:
            self.ticks = _even_ticks(self.low, self.high)
        step = min((after - before for before, after in pairwise(self.ticks)), default=1.0)
        self.digits = max(0, -math.floor(math.log10(step) + 1e-9))

    def shown(self, tick: float) -> str:
        if self.axis.shown is not None:
            return self.axis.shown(tick)
        text = f"{tick:{'+' if self.axis.signed else ''}.{self.digits}f}"
        return text if float(text) else "0"

    def _place(self, value: float) -> float:
        return math.log(value) if self.axis.base else value

    def __call__(self, value: float) -> float:
        return self.start + (self._place(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def inside(self, value: float) -> bool:
        return self.low <= self._place(value) <= self.high


def _even_ticks(low: float, high: float) -> list[float]:
    """Four to ten round numbers from `low` to `high`."""
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = max(unit * by for by in (1, 2, 5) if unit * by <= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(base: int, low: float, high: float) -> list[float]:
    """Powers of the base, every other one where there are many; of ten, also 2 and 5 or 3 times those where there are
    few; even ones where the axis is too short for those."""
    first, last = (math.floor(bound / math.log(base)) for bound in (low, high))
    powers = [float(base) ** power for power in range(first, last + 2)]
    tries = [[tick * by for tick in powers for by in steps if low <= math.log(tick * by) <= high]
             for steps in ((1, 2, 5), (1, 3), (1,)) if base == 10 or steps == (1,)]
    inside = next((ticks for ticks in tries if len(ticks) <= 6), tries[-1])
    if len(inside) < (3 if base == 10 else 1):
        return [tick for tick in _even_ticks(math.exp(low), math.exp(high)) if tick > 0]
    return inside[::-(-len(inside) // 7)] if len(inside) > 7 else inside


def _frame(across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for tick in up.ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
                     + _text(LEFT - 6, up(tick) + 4, up.shown(tick), "end"))
    for tick in across.ticks:
        at, foot = across(tick), HEIGHT - BOTTOM
        parts.append(f'<line class="tick" x1="{at:.1f}" x2="{at:.1f}" y1="{foot}" y2="{foot + 4}"/>'
                     + _text(at, foot + 17, across.shown(tick), "middle"))
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, across.axis.label, "middle"))
    parts.append(_text(4, 12, up.axis.label, "start"))
    return parts


def _names(series: Sequence[Series], across: _Scale, up: _Scale) -> list[str]:
    """The lines' names beside where they end, moved apart where they would overlap."""
    ends = []
    for line in series:
        at, value, _ = line.points[-1]
        level = min(max(up(value), TOP + 4), HEIGHT - BOTTOM)
        ends.append((level, across(at), line))
    ends.sort(key=lambda end: end[0])
    levels: list[float] = []
    for level, _, _ in ends:
        levels.append(max(level, levels[-1] + LINE) if levels else level)
    if levels and (over := levels[-1] - (HEIGHT - BOTTOM)) > 0:
        for number in range(len(levels) - 1, -1, -1):
            limit = levels[number + 1] - LINE if number + 1 < len(levels) else levels[number] - over
            levels[number] = min(levels[number], limit)
    edge = WIDTH - RIGHT
    return [f'<g {_style(line)}><path class="lead" d="M{end:.1f} {level:.1f}L{edge + 2} {level:.1f}L{edge + 10} '
            f'{shown:.1f}"/>{_text(edge + 13, shown + 4, line.name, "start", "name")}</g>'
            for (level, end, line), shown in zip(ends, levels, strict=True)]


def _path(points: Sequence[tuple[float, float]], across: _Scale, up: _Scale) -> str:
    return "M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)


def _style(line: Series) -> str:
    if line.colour is None:
        return 'style="--c:var(--peer);--dash:2 3"'
    dash = ";--dash:6 3" if line.colour >= COLOURS else ""
    return f'style="--c:var(--c{line.colour % COLOURS}){dash}"'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "text") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, about: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(about)}">' + \
        "".join(parts) + "</svg>"
