"""The roofline picture: what each operator reaches, under what the device can do. Plain SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from vtok.bench.kernels.device import Ceilings
from vtok.bench.kernels.run import Row

WIDTH, HEIGHT = 900, 560
LEFT, RIGHT, TOP, BOTTOM = 74, 640, 46, 500
LEAST = 0.125
"""Operations a byte of an operator that only moves: the left edge stands for none."""
COLOURS = (
    "#3565c9", "#d9622b", "#1f8f63", "#b23a7c", "#7d57c2", "#a07c10",
    "#1795ab", "#cf3b3b", "#5b7a22", "#d77aa3", "#71503a", "#5e9be0",
)  # fmt: skip


def picture(rows: Sequence[Row], top: Ceilings, title: str) -> str:
    """An SVG: bandwidth's slope and a roof for each dtype; a full mark where a backend serves, a ring for the others.

    Height over the slope's foot is the rate that was reached; an operator without arithmetic stands on the left edge,
    as far below the slope as it is from the copy bandwidth.
    """
    drawn = [row for row in rows if row.times and row.limit_ms and row.backend not in ("textbook", "yardstick")]
    points = [(_intensity(row), _rate(row), row) for row in drawn]
    roof = max(top.rate.values())
    xs = [LEAST, 2 * roof / top.bandwidth, *(x for x, _, _ in points)]
    ys = [roof, *(y for _, y, _ in points)]
    x = _scale(min(xs) / 1.5, max(xs) * 1.5, LEFT, RIGHT)
    y = _scale(min(ys) / 2, max(ys) * 2, BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(title, LEFT, 24, size=15),
        *_grid(x, y, (min(xs) / 1.5, max(xs) * 1.5), (min(ys) / 2, max(ys) * 2)),
        *_roofs(x, y, top, min(xs) / 1.5, max(xs) * 1.5, min(ys) / 2),
    ]
    names = list(dict.fromkeys(row.operator for row in drawn))
    for px, py, row in points:
        reached = f"{row.ms.median:.3g} ms, {100 * (row.share or 0):.0f}% of the limit" if row.ms else ""
        told = f"{row.operator} {row.size} {row.dtype} {row.backend}: {reached}"
        parts.append(_mark(names.index(row.operator), x(px), y(py), row.chosen, told))
    for i, name in enumerate(names):
        level = TOP + 18 * i + 6
        parts.append(_mark(i, RIGHT + 22, level - 4, True))
        parts.append(_text(name, RIGHT + 34, level))
    parts.append(_text("full: what serves here; ring: others", RIGHT + 14, BOTTOM, size=11))
    return "\n".join([*parts, "</svg>", ""])


def _mark(number: int, x: float, y: float, full: bool, told: str = "") -> str:
    """A dot, and a square where the colours come round again."""
    colour = COLOURS[number % len(COLOURS)]
    corner = 5 if number < len(COLOURS) else 1
    title = f"<title>{escape(told)}</title>" if told else ""
    return (
        f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" rx="{corner}" class="mark" fill-opacity="0.8" '
        f'fill="{colour if full else "#fff"}" stroke="{colour}" stroke-width="1.5">{title}</rect>'
    )


def _intensity(row: Row) -> float:
    return max(LEAST, row.operations / row.moved)


def _rate(row: Row) -> float:
    """Operations per second; of what only moves, as if it did ``LEAST`` of them a byte."""
    assert row.ms is not None
    return 1000 * max(row.operations, LEAST * row.moved) / row.ms.median


def _scale(low: float, high: float, start: float, end: float) -> _Log:
    return _Log(math.log(low), math.log(high), start, end)


class _Log:
    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (math.log(value) - self.low) / (self.high - self.low)


def _grid(x: _Log, y: _Log, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    parts = []
    for power in range(math.ceil(math.log10(xs[0])), math.floor(math.log10(xs[1])) + 1):
        at = x(10.0**power)
        parts.append(_line(at, TOP, at, BOTTOM, "#e5e5e5"))
        parts.append(_text(f"{10.0**power:g}", at, BOTTOM + 18, "middle"))
    for power in range(math.ceil(math.log10(ys[0])), math.floor(math.log10(ys[1])) + 1):
        at = y(10.0**power)
        parts.append(_line(LEFT, at, RIGHT, at, "#e5e5e5"))
        parts.append(_text(_rated(10.0**power), LEFT - 6, at + 4, "end"))
    parts.append(_text("operations a byte", (LEFT + RIGHT) / 2, BOTTOM + 40, "middle"))
    parts.append(_text("operations a second", LEFT, TOP - 6))
    return parts


def _roofs(x: _Log, y: _Log, top: Ceilings, first: float, last: float, floor: float) -> list[str]:
    parts = []
    highest = max(top.rate.values())
    start, knee = max(first, floor / top.bandwidth), highest / top.bandwidth
    parts.append(_line(x(start), y(start * top.bandwidth), x(knee), y(highest), "#333", 2))
    middle = math.sqrt(start * knee)
    parts.append(_text(f"copy {top.bandwidth / 1e9:.4g} GB/s", x(middle) - 8, y(middle * top.bandwidth) - 4, "end"))
    for name, rate in top.rate.items():
        parts.append(_line(x(rate / top.bandwidth), y(rate), x(last), y(rate), "#333", 2))
        parts.append(_text(f"matmul {name} {_rated(rate)}", x(last), y(rate) - 6, "end"))
    return parts


def _rated(value: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"/>'


def _text(content: str, x: float, y: float, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(content)}</text>'
