"""Where k tokens of a picture come from and stand: numbers of a grid alone, worked out once a grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vtok.tokenizers import anchors


@dataclass(frozen=True)
class Plan:
    """k ordered tokens on a grid of n cells.

    Attributes:
        weights: (k, n) share of each cell in each token; rows sum to 1.
        places: (k,) cell at which each token stands, in the tokens' order.
        owner: (n,) finest token that shows each cell.
    """

    weights: Tensor
    places: Tensor
    owner: Tensor


def plan(count: int, grid: tuple[int, int], scheme: str) -> Plan:
    """The plan of ``count`` tokens on a grid (rows, columns), on the CPU; do not write to its tensors.

    Raises:
        VtokError: more tokens than cells, or an unknown scheme.
    """
    return _plan(count, int(grid[0]), int(grid[1]), scheme)


@lru_cache(maxsize=256)
def _plan(count: int, height: int, width: int, scheme: str) -> Plan:
    places = anchors.places(count, height, width, scheme)
    weights = anchors.pooling(anchors.boxes(count, scheme), height, width)
    # the finest level first; within it, the box that shares most with the cell
    rank = anchors.levels(count, scheme)[:, None] + 0.5 * weights / weights.amax(1, keepdim=True)
    owner = torch.where(weights > 0, rank, -1.0).argmax(0)
    owner[places] = torch.arange(count)  # a coarse token shows at least where it stands
    return Plan(weights, places, owner)
