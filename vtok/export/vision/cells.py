"""Cells of pictures of one grid, as they go through a packed tower in window order."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

import vtok_kernels as kernels


@dataclass
class Cells:
    """Cells of B pictures.

    Attributes:
        x: (B, n * unit, D) patches, cell by cell.
        cells: (B, n) processing position of each cell, ascending.
        unit: patches of a cell.
        target: cells that must be left when the tower ends.
        lengths: cells of each window, in order; ``None`` once they follow the picture.
        rotary: cos and sin (1 or B, n * unit, d).
        place: (B, n, unit, 2) mean row and column of merged patches; ``None`` before any merge.
        projections: q, k, v (B, H, n * unit, d) of the block that has just run; ``turned``: after the rotary embedding.
        carry: (B, n) the method's running score.
        sizes: (B, n) original cells per cell, once merged.
        standing: (B, n) bool, where dropped cells still hold their places.
        alike: ``cells`` is the same for all pictures.
    """

    x: Tensor
    cells: Tensor
    unit: int
    target: int
    lengths: tuple[int, ...] | None
    rotary: tuple[Tensor, Tensor] | None = None
    place: Tensor | None = None
    projections: tuple[Tensor, ...] | None = None
    turned: tuple[Tensor, ...] | None = None
    carry: Tensor | None = None
    sizes: Tensor | None = None
    standing: Tensor | None = None
    alike: bool = True

    @property
    def count(self) -> int:
        """Cells of a picture."""
        return self.cells.shape[1]

    def patches(self, index: Tensor) -> Tensor:
        """(B, k) cells to their patches (B, k * unit)."""
        return (index[..., None] * self.unit + torch.arange(self.unit, device=index.device)).flatten(1)

    def take(self, index: Tensor) -> Cells:
        """The cells at index (B, k) stay."""
        rows = self.patches(index)

        def chosen(x: Tensor | None) -> Tensor | None:
            return None if x is None else kernels.gather_tokens(x, index)

        def turned(parts: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            if parts is None:
                return None
            return tuple(kernels.gather_tokens(part.transpose(1, 2), rows).transpose(1, 2) for part in parts)

        assert self.rotary is not None
        cos, sin = (kernels.gather_tokens(part.expand(rows.shape[0], -1, -1), rows) for part in self.rotary)
        return dataclasses.replace(
            self,
            x=kernels.gather_tokens(self.x, rows),
            cells=self.cells.gather(1, index),
            lengths=None,
            rotary=(cos, sin),
            place=chosen(self.place),
            projections=turned(self.projections),
            turned=turned(self.turned),
            carry=chosen(self.carry),
            sizes=chosen(self.sizes),
            standing=None,
            alike=False,
        )

    def key_bias(self, sized: bool) -> Tensor | None:
        """(B, 1, 1, n * unit) added to attention logits: log sizes, and next to nothing for what has been dropped.

        Not minus infinity: a window of nothing but dropped cells would give NaN.
        """
        bias = self.sizes.float().log() if sized and self.sizes is not None else None
        if self.standing is not None:
            gone = torch.where(self.standing, 0.0, torch.finfo(self.x.dtype).min / 2)
            bias = gone if bias is None else bias + gone
        return None if bias is None else bias.repeat_interleave(self.unit, 1)[:, None, None].to(self.x.dtype)
