"""Numbers as words: one way to print each kind, for pages and tables alike."""

from __future__ import annotations

import math

NONE = TO = "\N{EN DASH}"
"""In place of a number that is missing, and between the ends of a range."""
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a bare percentage: 0.864 is 86.4."""
    return NONE if share is None else minus(f"{100 * share:.{digits}f}")


def points(share: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points, always with its sign."""
    if share is None:
        return NONE
    text = f"{100 * share:+.{digits}f}"
    return minus(text if float(text) else text.lstrip("+-"))


def significant(value: float | None, digits: int = 3) -> str:
    """Three digits or all that stand before the point: 1234, 153, 48.2, 0.21."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return minus(f"{value:.{min(places, digits - 1)}f}")


def tokens(value: float | None) -> str:
    """A count of tokens: whole where it is whole."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value - round(value)) < 0.05 or value >= 1000 else f"{value:.1f}"


def times(value: float | None) -> str:
    """A factor: 1.92 and a cross."""
    return NONE if value is None else f"{value:.2f}{TIMES}"


def chance(p: float | None) -> str:
    """A p-value."""
    if p is None:
        return NONE
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def stars(p: float | None) -> str:
    """Marks of a p-value below 0.05, 0.01 and 0.001."""
    return "" if p is None or p >= 0.05 else "*" if p >= 0.01 else "**" if p >= 0.001 else "***"


def budget(keep: float | None) -> str:
    """A budget as the command line takes it: a count of tokens, or a share of them."""
    return NONE if keep is None else f"{100 * keep:g}%" if keep < 1 else f"{keep:g}"


def count(n: float | None, one: str, many: str | None = None) -> str:
    """1 sample, 1,600 samples."""
    return f"{n or 0:,.0f} {one if n == 1 else many or one + 's'}"


def parameters(n: float | None) -> str:
    """13.4M, 7.06B."""
    if n is None:
        return NONE
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{significant(n / size)}{letter}"
    return f"{n:.0f}"


def minus(text: str) -> str:
    """A true minus sign, as wide as a plus."""
    return text.replace("-", MINUS)
