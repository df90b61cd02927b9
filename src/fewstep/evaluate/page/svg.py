"""Charts as inline SVG text. The page's style sheet colours them by class, so they follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 520
CURVE_WIDTH = 340
LABELS = 128
"""Width of the names on the left of a bar chart."""


@dataclass(frozen=True)
class Bar:
    """One horizontal bar, with an optional interval; `kind` is a CSS class."""

    label: str
    value: float | None
    kind: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Point:
    """One labelled point of a scatter plot."""

    label: str
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Line:
    """One line of a chart, with an optional interval at each point; `kind` is a CSS class. A single point is drawn as a level."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str
    intervals: Sequence[tuple[float, float] | None] = ()


def bars(
    items: Sequence[Bar],
    *,
    text: Callable[[float], str],
    top: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Horizontal bars from 0 to `top` (default: the largest value), with dashed vertical `marks` (value, name)."""
    pitch, bar, head = 30, 16, 22 if marks else 4
    ends = [b.interval[1] if b.interval else b.value for b in items if b.value is not None]
    top = max([*ends, *(m for m, _ in marks), 1e-12]) if top is None else top
    room = WIDTH - LABELS - 62
    height = head + pitch * len(items) + 4

    def x(value: float) -> float:
        return LABELS + room * min(max(value, 0.0), top) / top

    parts = []
    for value, name in marks:
        anchor = "end" if x(value) > WIDTH - 120 else "start" if x(value) < LABELS + 60 else "middle"
        parts.append(_line(x(value), head - 4, x(value), height - 2, "mark"))
        parts.append(_text(x(value), 12, name, "small", anchor))
    for i, item in enumerate(items):
        y = head + pitch * i + (pitch - bar) / 2
        parts.append(_text(LABELS - 10, y + bar / 2 + 4.5, item.label, f"name {item.kind}", "end"))
        if item.value is None:
            parts.append(_text(LABELS + 2, y + bar / 2 + 4.5, "not measured", "small"))
            continue
        width = max(1.5, x(item.value) - LABELS)
        parts.append(
            f'<rect class="bar {item.kind}" x="{LABELS}" y="{y:.1f}" width="{width:.1f}" height="{bar}" rx="2"/>'
        )
        edge = x(item.value)
        if item.interval is not None:
            low, high = x(item.interval[0]), x(item.interval[1])
            middle, edge = y + bar / 2, max(edge, high)
            parts.append(_line(low, middle, high, middle, "whisker"))
            parts.extend(_line(end, middle - 4, end, middle + 4, "whisker") for end in (low, high))
        parts.append(_text(edge + 7, y + bar / 2 + 4.5, text(item.value), "value"))
    return _svg(height, parts)


def scatter(points: Sequence[Point], *, x_name: str, y_name: str) -> str:
    """Points over a logarithmic x axis and a y axis from 0 to 1, written in per cent."""
    left, right, upper, lower = 46, WIDTH - 16, 14, 190
    low, high = _decades([p.x for p in points])

    def at(p: Point) -> tuple[float, float]:
        across = (math.log10(p.x) - low) / (high - low)
        return left + (right - left) * across, lower - (lower - upper) * p.y

    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = lower - (lower - upper) * share
        parts.append(_line(left, y, right, y, "grid"))
        parts.append(_text(left - 8, y + 4, f"{100 * share:.0f} %", "small", "end"))
    for tick in _ticks(low, high):
        x = left + (right - left) * (math.log10(tick) - low) / (high - low)
        parts.append(_line(x, lower, x, lower + 4, "axis"))
        parts.append(_text(x, lower + 18, f"{tick:g}", "small", "middle"))
    parts.append(_text((left + right) / 2, lower + 36, x_name, "small", "middle"))
    parts.append(_text(left + 6, upper + 12, y_name, "small"))
    taken: list[tuple[float, float, float, float]] = [(left, upper, left + 7 * len(y_name), upper + 14)]
    for point in sorted(points, key=lambda p: -p.y):
        x, y = at(point)
        parts.append(f'<circle class="dot {point.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>')
        taken.append((x - 7, y - 7, x + 7, y + 7))
    for point in sorted(points, key=lambda p: -p.y):
        x, y, anchor = _place(*at(point), 6.6 * len(point.label), right, taken)
        parts.append(_text(x, y, point.label, f"name {point.kind}", anchor))
    return _svg(lower + 44, parts)


def curve(xs: Sequence[float], ys: Sequence[float], *, marks: Sequence[tuple[float, str]] = ()) -> str:
    """One training curve: a pale line for the figures as logged, a strong one for their running mean over 1/20 of the run.

    `marks` (value, name) are dashed horizontal lines to compare with; the axis includes all of them.
    """
    left, right, upper, lower = 48, CURVE_WIDTH - 8, 8, 128
    finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if not finite:
        return _svg(40, [_text(left, 24, "no finite value", "small")], CURVE_WIDTH)
    x_low, x_high = finite[0][0], max(finite[-1][0], finite[0][0] + 1)
    levels = [*(y for _, y in finite), *(value for value, _ in marks)]
    y_low, y_high = min(levels), max(levels)
    if y_low == y_high:
        y_low, y_high = y_low - 0.5, y_high + 0.5

    def place(x: float, y: float) -> str:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return f"{left + (right - left) * across:.1f},{lower - (lower - upper) * up:.1f}"

    parts = [_line(left, y, right, y, "grid") for y in (upper, (upper + lower) / 2, lower)]
    for share, y in ((1.0, upper), (0.5, (upper + lower) / 2), (0.0, lower)):
        parts.append(_text(left - 7, y + 4, f"{y_low + share * (y_high - y_low):.3g}", "small", "end"))
    parts.append(_text(left, lower + 17, f"{x_low:g}", "small"))
    parts.append(_text(right, lower + 17, f"step {x_high:g}", "small", "end"))
    smooth = running_mean([y for _, y in finite], max(1, len(finite) // 20))
    raw = " ".join(place(x, y) for x, y in _thinned(finite))
    mean = " ".join(place(x, y) for x, y in _thinned([(x, m) for (x, _), m in zip(finite, smooth, strict=True)]))
    for value, name in marks:
        y = float(place(x_low, value).split(",")[1])
        parts += [_line(left, y, right, y, "mark"), _text(right, y - 3 if y > 24 else y + 12, name, "small", "end")]
    parts += [f'<polyline class="raw" points="{raw}"/>', f'<polyline class="mean" points="{mean}"/>']
    return _svg(lower + 24, parts, CURVE_WIDTH)


def lines(items: Sequence[Line], *, x_name: str, text: Callable[[float], str], top: float | None = None) -> str:
    """Several lines over one axis that begins at 0, with pale bands for their intervals; `text` writes the levels."""
    left, right, upper, lower = 52, CURVE_WIDTH - 8, 8, 148
    ends = [y for item in items for y in (*item.ys, *(high for i in item.intervals if i for high in i[1:]))]
    x_high = max([x for item in items for x in item.xs] + [1e-12])
    y_high = top or max([y for y in ends if math.isfinite(y)] + [1e-12])

    def place(x: float, y: float) -> str:
        up = min(max(y / y_high, 0.0), 1.0)
        return f"{left + (right - left) * x / x_high:.1f},{lower - (lower - upper) * up:.1f}"

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = lower - (lower - upper) * share
        parts += [_line(left, y, right, y, "grid"), _text(left - 7, y + 4, text(share * y_high), "small", "end")]
    parts += [_text(left, lower + 17, "0", "small"), _text(right, lower + 17, f"{x_name} {x_high:g}", "small", "end")]
    for item in items:
        xs, ys = (item.xs, item.ys) if len(item.xs) > 1 else ((0, x_high), (*item.ys, *item.ys))
        band = [(x, i) for x, i in zip(item.xs, item.intervals) if i is not None]
        if len(band) > 1:
            edge = [place(x, i[1]) for x, i in band] + [place(x, i[0]) for x, i in reversed(band)]
            parts.append(f'<polygon class="band {item.kind}" points="{" ".join(edge)}"/>')
        level = "" if len(item.xs) > 1 else " level"
        points = " ".join(place(x, y) for x, y in zip(xs, ys, strict=True))
        parts.append(
            f'<polyline class="line {item.kind}{level}" points="{points}"><title>{escape(item.label)}</title></polyline>'
        )
    return _svg(lower + 24, parts, CURVE_WIDTH)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and the `width - 1` before it (fewer at the start)."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means


def _thinned(points: Sequence[tuple[float, float]], limit: int = 600) -> Sequence[tuple[float, float]]:
    stride = -(-len(points) // limit)
    return [*points[:-1:stride], points[-1]]


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a logarithmic axis, with a margin."""
    logs = [math.log10(v) for v in values]
    low, high = min(logs), max(logs)
    margin = max(0.12, 0.12 * (high - low))
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade within 10^low..10^high; only the 1s if these are too many."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    steps = (1, 2, 5) if high - low < 2.2 else (1,)
    return [m * 10.0**d for d in decades for m in steps if low <= math.log10(m * 10.0**d) <= high]


Box = tuple[float, float, float, float]


def _place(x: float, y: float, width: float, right: float, taken: list[Box]) -> tuple[float, float, str]:
    """A place for the label of (x, y) that overlaps nothing: right, left, above or below the point, then further away."""
    for away in (0, 14, 28, 42):
        for dx, dy, anchor in ((11, 4, "start"), (-11, 4, "end"), (0, -11 - away, "middle"), (0, 20 + away, "middle")):
            start = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            box = (start, y + dy - 11, start + width, y + dy + 3)
            free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
            if free and start > 46 and start + width < right + 12:
                taken.append(box)
                return x + dx, y + dy, anchor
    return x + 11, y + 4, "start"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str], width: int = WIDTH) -> str:
    return f'<svg viewBox="0 0 {width} {height:.0f}" role="img">{"".join(parts)}</svg>'
