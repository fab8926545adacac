"""Uniform sub-grid: every so-manieth row and column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.method import Method, register
from vtok.methods._grid import share_parts
from vtok.view import View


@register("uniform")
@dataclass(frozen=True)
class Uniform(Method):
    """Keep an evenly spaced sub-grid of each rectangle of the image; each gets its share of the budget."""

    summary = "evenly spaced sub-grid"
    site = "input"
    blind = True

    def select(self, view: View, count: int) -> Tensor:
        groups = view.features.shape[0]
        if not view.parts or view.size != sum(part.length for part in view.parts):
            # an earlier stage has thinned the grid: evenly spaced in reading order
            picked = kernels.uniform(view.size, count, device=view.features.device)
            return picked.expand(groups, -1)
        chosen, start = [], 0
        for part, cells in zip(view.parts, share_parts(view.parts, count), strict=True):
            own = kernels.uniform_grid(part.height, part.width, cells)
            row_length = part.width + (part.newlines if part.per_row else 0)
            chosen.append(start + own // part.width * row_length + own % part.width)
            start += part.length
        return torch.cat(chosen).to(view.features.device).expand(groups, -1)
