"""A colour and a dash a method, the same in pages and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtok_eval.render.results import BASELINES

COLOURS = (
    "#3565c9",
    "#d9622b",
    "#1f8f63",
    "#b23a7c",
    "#7d57c2",
    "#a07c10",
    "#1795ab",
    "#cf3b3b",
    "#5b7a22",
    "#d77aa3",
    "#71503a",
    "#5e9be0",
)
GREYS = {"random": "#55585f", "uniform": "#84878e", "downsample": "#a3a5ab"}
DASHES = {"random": "", "uniform": "6 3", "downsample": "2 3"}


@dataclass(frozen=True)
class Style:
    """How a series is drawn: its CSS class, colour, dashes and whether it is a baseline."""

    css: str
    colour: str
    dashes: str
    baseline: bool


def styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for every method and chain; greys for the baselines, dashes for chains and for repeated colours."""
    found = {}
    number = 0
    for name in names:
        if name in BASELINES:
            found[name] = Style(f"s-{name}", GREYS[name], DASHES[name], True)
            continue
        again = "7 3" if "+" in name else ("", "4 3", "1 3")[number // len(COLOURS) % 3]
        found[name] = Style(f"s-{number}", COLOURS[number % len(COLOURS)], again, False)
        number += 1
    return found


def css(found: dict[str, Style]) -> str:
    """One rule a series, that sets its colour."""
    return "\n".join(f".{style.css}{{--c:{style.colour}}}" for style in found.values())
