"""Cells of one run of a packed tower: which stand, in which order, window and place."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class CellState:
    """Cells of one tower run, in processing order.

    Attributes:
        order: (M,) raster cell at each processing position; ``window``: (M,) its window.
        targets: cells that each frame must be left with. ``counts``: cells of each frame now, on the host.
        cells: (m,) processing positions that stand, ascending.
        sizes: (m,) original cells per standing cell, once merged. ``carry``: (m,) the method's running score.
        dst: (M,) processing position that each cell was poured into, -1 where dropped.
        place: (m, unit, 2) mean row and column of merged patches, fractional; ``None`` before any merge.
        grid_places: (M, unit, 2) row and column of every patch at the start, where something merges.
        taken: (M,) size of every cell at each DeepStack tap, 0 where it did not stand.
        tables: (cos, sin) of all patches. ``rotary``: those of the block that runs.
    """

    order: Tensor
    window: Tensor
    targets: list[int]
    counts: list[int]
    cells: Tensor
    dst: Tensor
    sizes: Tensor | None = None
    carry: Tensor | None = None
    place: Tensor | None = None
    merged: bool = False
    taps: dict[int, list[Tensor]] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    stages: list[tuple[int | None, Tensor]] = field(default_factory=list)
    tables: tuple[Tensor, Tensor] | None = None
    grid_places: Tensor | None = None
    taken: list[Tensor] = field(default_factory=list)

    def frames(self) -> list[tuple[int, int, int]]:
        """(first row, cells, target) of every frame in the current sequence of cells."""
        rows, start = [], 0
        for count, target in zip(self.counts, self.targets, strict=True):
            rows.append((start, count, target))
            start += count
        return rows

    def standing(self) -> Tensor:
        """(M,) bool by processing position."""
        return torch.zeros(len(self.order), dtype=torch.bool, device=self.cells.device).index_fill(0, self.cells, True)
