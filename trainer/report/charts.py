"""Line charts as inline SVG that follow the page's colours. Knows numbers and pixels; knows nothing of training."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
_MAX_POINTS = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 10, 26
_LABEL_ROOM = 40  # at the right end of the x axis, for its name


@dataclass(frozen=True)
class Line:
    """One curve. css: class names that colour it (c1, c2, ...; thin; dots marks its points)."""

    name: str
    points: Points
    css: str = "c1"


@dataclass(frozen=True)
class Level:
    """A dashed horizontal line, e.g. the base's loss."""

    name: str
    value: float


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    levels: Sequence[Level] = (),
    x_label: str = "step",
    size: tuple[int, int] = (640, 240),
) -> str:
    """An <svg> with axes, grid and curves; a short notice if there is nothing to draw. The title is for readers.
    size: width and height."""
    drawn = [Line(line.name, _thinned(line.points), line.css) for line in lines if line.points]
    if not drawn:
        return f'<p class="none">{html.escape(title)}: nothing was recorded.</p>'
    frame = _Frame.around(drawn, levels, size)
    parts = [
        f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{html.escape(title)}">',
        f"<title>{html.escape(title)}</title>",
        *_grid(frame, x_label),
        *(_level(frame, level) for level in levels),
        *(part for line in drawn for part in _curve(frame, line)),
        "</svg>",
    ]
    return "".join(parts)


def _thinned(points: Points) -> Points:
    """At most about _MAX_POINTS of them, the last always among them."""
    step = max(1, len(points) // _MAX_POINTS)
    kept = list(points[::step])
    return kept if not kept or kept[-1] == points[-1] else [*kept, points[-1]]


@dataclass(frozen=True)
class _Frame:
    """Data ranges and where they lie in pixels."""

    x_low: float
    x_high: float
    y_ticks: list[float]
    width: int
    height: int

    @classmethod
    def around(cls, lines: Sequence[Line], levels: Sequence[Level], size: tuple[int, int]) -> _Frame:
        xs = [x for line in lines for x, _ in line.points]
        ys = [y for line in lines for _, y in line.points] + [level.value for level in levels]
        return cls(min(xs), max(*xs, min(xs) + 1), nice_ticks(min(ys), max(ys)), *size)

    def x(self, value: float) -> float:
        width = self.width - _LEFT - _RIGHT
        return _LEFT + width * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        height = self.height - _TOP - _BOTTOM
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _TOP + height * (1 - (value - low) / (high - low))


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about `count` steps apart."""
    if 0 <= low < high / 3:
        low = 0.0
    spread = high - low or abs(high) or 1.0
    raw = spread / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number as a label: 1.5k, 0.03, 2e-4."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0e}".replace("e-0", "e-") if 0 < abs(value) < 1e-3 else f"{value:.3g}"


def _grid(frame: _Frame, x_label: str) -> Iterator[str]:
    right, floor = frame.width - _RIGHT, frame.height - _BOTTOM
    for tick in frame.y_ticks:
        y = frame.y(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
    inner = [tick for tick in nice_ticks(frame.x_low, frame.x_high, 5) if frame.x_low <= tick <= frame.x_high]
    for tick in (tick for tick in inner if frame.x(tick) < right - _LABEL_ROOM):
        yield f'<text class="tick" x="{frame.x(tick):.1f}" y="{floor + 17}" text-anchor="middle">{short(tick)}</text>'
    yield f'<text class="tick" x="{right}" y="{floor + 17}" text-anchor="end">{html.escape(x_label)}</text>'


def _level(frame: _Frame, level: Level) -> str:
    y = frame.y(level.value)
    name = html.escape(level.name)
    return (
        f'<line class="level" x1="{_LEFT}" x2="{frame.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{frame.width - _RIGHT}" y="{y - 5:.1f}" text-anchor="end">{name}</text>'
    )


def _curve(frame: _Frame, line: Line) -> Iterator[str]:
    path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line.points)
    yield f'<polyline class="line {line.css}" points="{path}"><title>{html.escape(line.name)}</title></polyline>'
    if "dots" in line.css or len(line.points) == 1:
        for x, y in line.points:
            yield f'<circle class="dot {line.css}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.2"/>'
