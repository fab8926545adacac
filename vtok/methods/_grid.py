"""Sharing a budget over the rectangles of an image."""

from __future__ import annotations

from collections.abc import Sequence

from vtok.protocol import Part


def share_parts(parts: Sequence[Part], count: int) -> list[int]:
    """Split ``count`` cells over rectangles by area (newline tokens get none), largest remainders first."""
    areas = [part.height * part.width for part in parts]
    whole = sum(areas)
    count = min(count, whole)
    exact = [count * area / whole for area in areas]
    cells = [int(value) for value in exact]
    for i in sorted(range(len(parts)), key=lambda i: cells[i] - exact[i])[: count - sum(cells)]:
        cells[i] += 1
    return cells
