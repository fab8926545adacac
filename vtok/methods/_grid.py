"""The rectangles of an image: where their cells are, and how a budget is shared over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def positions(part: Part) -> Tensor:
    """Places of a rectangle's cells within its run, newlines skipped."""
    row = part.width + (part.newlines if part.per_row else 0)
    return (torch.arange(part.height)[:, None] * row + torch.arange(part.width)).flatten()
