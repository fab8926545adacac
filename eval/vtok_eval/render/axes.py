"""Scales, ticks, the front of a cloud of points, and places for labels that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vtok_eval.render.results import Entry, Run
from vtok_eval.render.words import TIMES, budget, tokens


@dataclass(frozen=True)
class Cost:
    """An abscissa for the plot of accuracy against cost.

    Attributes
    ----------
    key, title : str
        For ids and for the axis.
    value : callable
        Entry to number.
    rising : bool
        More is better.
    log : bool
        Logarithmic, to base 2.
    text : callable
        A tick's label.
    """

    key: str
    title: str
    value: Callable[[Entry], float | None]
    rising: bool
    log: bool
    text: Callable[[float], str]


COSTS = (
    Cost("speed", "speed-up of the prefill", lambda e: e.speedup, True, False, lambda x: f"{x:g}{TIMES}"),
    Cost("tokens", "visual tokens, layer average", lambda e: e.tokens, False, True, tokens),
    Cost(
        "macs",
        "decoder MACs on visual tokens",
        lambda e: e.number("counts", "mac_ratio"),
        False,
        True,
        lambda x: f"{100 * x:.3g}%",
    ),
)


def costs(run: Run) -> list[Cost]:
    """The abscissas that a run has numbers for."""
    return [cost for cost in COSTS if any(cost.value(entry) is not None for entry in run.drawn())]


@dataclass(frozen=True)
class Scale:
    """A line from numbers to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            low, high, value = (math.log2(x) for x in (self.low, self.high, value))
        else:
            low, high = self.low, self.high
        return self.start + (self.end - self.start) * (value - low) / ((high - low) or 1.0)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in a range."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def doublings(low: float, high: float, anchor: float, most: int = 6) -> list[float]:
    """Halves of an anchor that lie in a range, ascending."""
    found: list[float] = []
    value = anchor
    while value >= low * 0.999 and len(found) < most:
        if value <= high * 1.001:
            found.append(value)
        value /= 2
    return found[::-1]


def marks(run: Run, cost: Cost, low: float, high: float, most: int) -> list[float]:
    """Ticks of an abscissa between two numbers: budgets for tokens, halves of all for MACs, round numbers else."""
    if cost.key == "tokens":
        budgets = {run.in_tokens(keep) for keep in run.keeps} | ({run.full} if run.full else set())
        return apart([x for x in sorted(budgets) if low <= x <= high], (high / low) ** (1 / (2.2 * most)))
    if cost.log:
        return doublings(low, high, 1.0, most)
    return ticks(low, high, most)


def apart(values: Sequence[float], ratio: float) -> list[float]:
    """Ascending numbers, thinned from the top so that neighbours are a factor apart."""
    found: list[float] = []
    for value in reversed(values):
        if not found or found[-1] / value >= ratio:
            found.append(value)
    return found[::-1]


def front(points: Sequence[tuple[float, float]], rising: bool) -> list[int]:
    """Indices of the points that no other one beats in both, along the abscissa.

    Parameters
    ----------
    points : sequence of (cost, quality)
        Quality: more is better.
    rising : bool
        More of the cost's number is better too.
    """
    sign = -1 if rising else 1
    order = sorted(range(len(points)), key=lambda i: (sign * points[i][0], -points[i][1], i))
    found: list[int] = []
    best = -math.inf
    for i in order:
        if points[i][1] > best:
            found.append(i)
            best = points[i][1]
    return sorted(found, key=lambda i: points[i][0])


@dataclass(frozen=True)
class Label:
    """A text and where it stands: ``anchor`` is ``start``, ``middle`` or ``end``."""

    text: str
    x: float
    y: float
    anchor: str


Box = tuple[float, float, float, float]


def place(
    wanted: Sequence[tuple[str, Sequence[tuple[float, float]]]],
    dots: Sequence[tuple[float, float]],
    frame: Box,
    letter: float = 6.4,
    height: float = 14.0,
    reach: float = 9.0,
    lines: Sequence[tuple[float, float]] = (),
) -> list[Label]:
    """Put texts beside their points: the place with the least overlap of other texts, points and the frame.

    Parameters
    ----------
    wanted : sequence of (text, spots)
        In the order of their importance; a text may stand at any of its spots (x, y).
    dots, lines : sequence of (x, y)
        What should stay visible, and what may be crossed if it must.
    frame : tuple
        Left, top, right and bottom edge.
    letter, height : float
        Mean width of a letter, height of a line.
    reach : float
        Distance from the point.
    """
    taken: list[Box] = []
    found = []
    for text, spots in wanted:
        best: tuple[float, Label, Box] | None = None
        for spot, (x, y) in enumerate(spots):
            for rank, (label, box) in enumerate(_options(text, x, y, letter * len(text), height, reach)):
                bad = 4 * sum(_overlap(box, other) for other in taken) + 3 * rank + spot
                bad += 60 * sum(box[0] - 4 < dx < box[2] + 4 and box[1] - 4 < dy < box[3] + 4 for dx, dy in dots)
                bad += 12 * sum(box[0] < dx < box[2] and box[1] < dy < box[3] for dx, dy in lines)
                bad += 50 * (max(0, frame[0] - box[0]) + max(0, box[2] - frame[2]))
                bad += 50 * (max(0, frame[1] - box[1]) + max(0, box[3] - frame[3]))
                if best is None or bad < best[0]:
                    best = (bad, label, box)
        assert best is not None, "a label without a spot"
        taken.append(best[2])
        found.append(best[1])
    return found


def _options(text: str, x: float, y: float, width: float, height: float, reach: float) -> list[tuple[Label, Box]]:
    """Places around a point, the nearer ones first, with what each covers."""
    found = []
    for far in (1.0, 1.8, 2.8):
        d, slant = reach * far, reach * far * 0.7
        for anchor, at, base in (
            ("middle", x, y - d),
            ("start", x + d, y + height * 0.3),
            ("end", x - d, y + height * 0.3),
            ("start", x + slant, y - slant),
            ("end", x - slant, y - slant),
            ("middle", x, y + d + height * 0.7),
            ("start", x + slant, y + slant + height * 0.7),
            ("end", x - slant, y + slant + height * 0.7),
        ):
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = (left, base - height * 0.8, left + width, base + height * 0.2)
            found.append((Label(text, at, base, anchor), box))
    return found


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def along(points: Sequence[tuple[float, float]], step: float = 10.0) -> list[tuple[float, float]]:
    """Points along a path, about ``step`` apart, for labels to keep away from."""
    found = []
    for (x0, y0), (x1, y1) in pairwise(points):
        n = max(1, round(math.hypot(x1 - x0, y1 - y0) / step))
        found += [(x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n) for i in range(1, n)]
    return found


def rail(
    left: float, right: float, level: float, mark: float | None, width: float
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """A level line for ``place``: points along it, and spots for a label of a width, those far from a mark first."""
    points = [(left + 6 * step, level) for step in range(int((right - left) / 6) + 1)]
    first, last = left + width / 2 + 2, right - width / 2 - 2
    spots = [(last + (first - last) * step / 10, level) for step in range(11)]
    return points, spots[::-1] if mark is not None and mark > (left + right) / 2 else spots


def ran_at(entry: Entry) -> float | None:
    """The budget that counts: what it ran with where that is not what was asked for."""
    return entry.keep if entry.reached else entry.number("budget") or entry.keep


def titles(
    entries: Sequence[Entry], best: Sequence[int], names: Sequence[str] = ()
) -> list[tuple[str, str, list[int]]]:
    """What to write into a plot: (text, name, entries it may stand at).

    Points of the front, from the cheap end on, with method and budget; then every other method of ``names`` once, by
    name alone.
    """
    found = []
    for i in best:
        entry = entries[i]
        found.append((f"{entry.name} {budget(ran_at(entry))}", entry.name, [i]))
    seen = {name for _, name, _ in found}
    for name in names:
        own = [i for i, entry in enumerate(entries) if entry.name == name]
        if own and name not in seen:
            found.append((name, name, own))
    return found
