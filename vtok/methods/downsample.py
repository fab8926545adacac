"""Downsampling: average pooling to a smaller grid, the baseline that beats many published methods (VTC-Bench)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.methods._grid import positions, share_parts
from vtok.protocol import Part
from vtok.view import Selection, View
from vtok_kernels import MergePlan


@register("downsample")
@dataclass(frozen=True)
class Downsample(Method):
    """Pool each rectangle of the image to the largest smaller grid of the same aspect that the budget allows.

    Every pooled token stands at the place of the middle token of its block, with the mean of the block's embeddings;
    newline tokens are dropped.
    """

    summary = "average pooling to a smaller grid"
    paper = "VTC-Bench (ACL 2026)"
    site = "input"
    blind = True
    exact = False

    def select(self, view: View, count: int) -> Selection:
        length = sum(part.length for part in view.parts)
        if view.size != length:
            raise VtokError(
                "downsample pools whole grids and another stage has thinned this one; put it first, or use uniform"
            )
        dst = torch.full((length,), -1)
        kept: list[int] = []
        start = 0
        for part, cells in zip(view.parts, share_parts(view.parts, count), strict=True):
            if cells:
                owner, middles = _pool(part, cells)
                inside = positions(part) + start
                dst[inside] = owner + len(kept)
                kept += (inside[middles]).tolist()
            start += part.length
        order = torch.tensor(kept).argsort()
        rank = order.argsort()
        dst = torch.where(dst >= 0, rank[dst.clamp_min(0)], -1).to(view.features.device)
        groups = view.features.shape[0]
        dst = dst.expand(groups, -1)
        indices = torch.tensor(kept)[order].to(view.features.device).expand(groups, -1)
        merged = MergePlan(dst, len(kept)).merge(view.features)
        return Selection(indices, merged, dst)


def _pool(part: Part, cells: int) -> tuple[Tensor, Tensor]:
    """Block of every cell, and the middle cell of every block, for the largest grid of at most ``cells`` blocks."""
    best = (1, 1)
    for rows in range(1, min(part.height, cells) + 1):
        columns = min(part.width, cells // rows)
        if columns < 1:
            break
        # the most blocks; among equals the squarest
        squareness = abs(part.height / rows - part.width / columns)
        if (rows * columns, -squareness) > (best[0] * best[1], -abs(part.height / best[0] - part.width / best[1])):
            best = (rows, columns)
    rows, columns = best
    own_row = torch.arange(part.height) * rows // part.height
    own_column = torch.arange(part.width) * columns // part.width
    owner = (own_row[:, None] * columns + own_column).flatten()
    middle_row = torch.stack([(own_row == i).nonzero().float().mean().long() for i in range(rows)])
    middle_column = torch.stack([(own_column == j).nonzero().float().mean().long() for j in range(columns)])
    return owner, (middle_row[:, None] * part.width + middle_column).flatten()
