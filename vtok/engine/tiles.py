"""Tiles of one run of a dense tower: what stands, where it stood, what was poured into it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtok.engine.host import on_device


@dataclass
class TileState:
    """Tiles of one tower run.

    Attributes:
        total: patches per tile at the start.
        targets: patches that each tile must be left with.
        counts: patches of each tile now, on the host.
        tokens: (B, n) original patch of each slot; slots past a tile's count mean nothing.
        dst: (B, total) original patch that each patch was poured into, -1 where dropped.
        sizes: (B, n) original patches per slot, once tokens were merged.
        carry: (B, n) the method's running score.
        valid: (B, total) patches that survive the family's unpadding, where some do not.
        front: kept tokens lie first instead of at their own places.
    """

    total: int
    targets: list[int]
    counts: list[int]
    tokens: Tensor
    dst: Tensor
    sizes: Tensor | None = None
    carry: Tensor | None = None
    valid: Tensor | None = None
    front: bool = False
    merged: bool = False
    prefix_features: Tensor | None = None
    taps: dict[int, list[Tensor]] = field(default_factory=dict)
    stages: list[tuple[int | None, Tensor]] = field(default_factory=list)

    @property
    def ragged(self) -> bool:
        return len(set(self.counts)) > 1

    def real(self) -> Tensor:
        """(B, n) bool: slots that hold a token."""
        counts = on_device(self.counts, self.tokens.device)
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None] < counts[:, None]

    def kept(self) -> Tensor:
        """(B, total) bool: original patches that stand."""
        kept = torch.zeros(len(self.counts), self.total, dtype=torch.long, device=self.tokens.device)
        return kept.scatter_add(1, self.tokens, self.real().long()) > 0  # slots past the count may repeat a token

    def groups(self) -> list[tuple[int, int, list[int]]]:
        """(count, target, rows) of the tiles that look alike."""
        together: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self.counts, self.targets, strict=True)):
            together.setdefault(key, []).append(row)
        return [(count, target, rows) for (count, target), rows in together.items()]
