"""Anchors of an ordered sequence: boxes of the picture from coarse to fine, and exact pooling over them.

Two orders. ``"quadtree"``: level l holds all 2^l x 2^l boxes, so 1, 5, 21, 85, 341 tokens close whole levels.
``"haar"``: from level 1 on, three of the four children of every box (the fourth is four times the parent less the
three), so 1, 4, 16, 64, 256 tokens close whole levels, the counts of Matryoshka multimodal models (arXiv 2405.17430).
Inside a level boxes come in a dyadic order, so that any part of a level is spread over the picture. A prefix of the
sequence never depends on its length.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from vtok.errors import VtokError

SCHEMES = ("quadtree", "haar")

#: (row, column) of the four children of a box, in order of visit: opposite corners first
_CHILDREN = ((0, 0), (1, 1), (0, 1), (1, 0))


def boxes(count: int, scheme: str = "quadtree") -> Tensor:
    """(count, 4) boxes ``y0 x0 y1 x1`` in unit coordinates, fp32, coarse to fine.

    Raises:
        VtokError: unknown scheme, or fewer than one box.
    """
    _check(count, scheme)
    rows: list[tuple[float, ...]] = []
    level = 0
    while len(rows) < count:
        side = 2**level
        for row, column in _level(level, scheme):
            rows.append((row / side, column / side, (row + 1) / side, (column + 1) / side))
            if len(rows) == count:
                break
        level += 1
    return torch.tensor(rows)


def levels(count: int, scheme: str = "quadtree") -> Tensor:
    """(count,) level of each box of ``boxes(count, scheme)``; level 0 is the whole picture."""
    _check(count, scheme)
    found: list[int] = []
    level = 0
    while len(found) < count:
        found += [level] * _length(level, scheme)
        level += 1
    return torch.tensor(found[:count])


def closed(count: int, scheme: str = "quadtree") -> list[int]:
    """Numbers of tokens up to ``count`` that end with a whole level, ``count`` itself included."""
    _check(count, scheme)
    found, total, level = [], 0, 0
    while total < count:
        total += _length(level, scheme)
        found.append(min(total, count))
        level += 1
    return found


def centres(boxes: Tensor) -> Tensor:
    """(count, 2) centres ``y x`` of boxes (count, 4), in unit coordinates."""
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def pooling(boxes: Tensor, height: int, width: int, mask: Tensor | None = None) -> Tensor:
    """(..., count, height * width) weights of an average over each box: the area it shares with each cell of a grid.

    Rows sum to 1 for any grid, whether boxes are larger or smaller than a cell.

    Args:
        boxes: (count, 4) ``y0 x0 y1 x1`` in unit coordinates.
        height: rows of the grid.
        width: its columns; cells are numbered in raster order.
        mask: (..., height * width) bool, True where a cell is real. A box without a real cell averages all of them.

    Raises:
        VtokError: a grid without cells, or a mask without a real cell.
    """
    if height < 1 or width < 1:
        raise VtokError(f"a grid of {height} x {width} cells holds nothing to pool; give at least one row and column")
    rows = _overlap(boxes[:, 0], boxes[:, 2], height)
    columns = _overlap(boxes[:, 1], boxes[:, 3], width)
    weights = (rows[:, :, None] * columns[:, None, :]).flatten(1)
    if mask is not None:
        if mask.shape[-1] != height * width:
            raise VtokError(f"a mask of {mask.shape[-1]} cells does not fit a grid of {height} x {width}")
        if not bool(mask.any(-1).all()):
            raise VtokError("every cell of a picture is masked out, so nothing is left to pool; leave some cells real")
        real = mask.to(weights)[..., None, :]
        inside = weights * real
        weights = torch.where(inside.sum(-1, keepdim=True) > 0, inside, real)
    return (weights / weights.sum(-1, keepdim=True)).float()


def places(count: int, height: int, width: int, scheme: str = "quadtree") -> Tensor:
    """(count,) cell at which each anchor stands: in order, each takes the free cell nearest to its centre.

    No two anchors share a cell, and a prefix of a longer sequence stands where the shorter one does. Distances are
    in cells; of equally near ones the first in raster order is taken.

    Raises:
        VtokError: more anchors than cells.
    """
    _check(count, scheme)
    if count > height * width:
        raise VtokError(f"{count} tokens do not fit a grid of {height} x {width} cells; ask for fewer")
    return _places(count, height, width, scheme).clone()


@lru_cache(maxsize=256)
def _places(count: int, height: int, width: int, scheme: str) -> Tensor:
    middle = centres(boxes(count, scheme)).double() * torch.tensor([height, width], dtype=torch.float64)
    rows = torch.arange(height, dtype=torch.float64) + 0.5
    columns = torch.arange(width, dtype=torch.float64) + 0.5
    taken = torch.zeros(height * width, dtype=torch.float64)
    found = torch.empty(count, dtype=torch.long)
    for number, (y, x) in enumerate(middle):
        distance = ((rows - y).square()[:, None] + (columns - x).square()[None]).flatten() + taken
        cell = distance.argmin()
        found[number] = cell
        taken[cell] = torch.inf
    return found


def _overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """(count, cells) length that each interval of [0, 1] shares with each of ``cells`` equal cells, in cells."""
    edge = torch.arange(cells, dtype=torch.float64, device=start.device)
    low, high = start.double()[:, None] * cells, end.double()[:, None] * cells
    return (torch.minimum(high, edge + 1) - torch.maximum(low, edge)).clamp_min(0)


def _level(level: int, scheme: str) -> list[tuple[int, int]]:
    """(row, column) of a level's boxes in order of visit."""
    if scheme == "quadtree" or level == 0:
        return _dyadic(level)
    return _children(_dyadic(level - 1), 3)


def _length(level: int, scheme: str) -> int:
    return 4**level if scheme == "quadtree" or level == 0 else 3 * 4 ** (level - 1)


def _dyadic(level: int) -> list[tuple[int, int]]:
    """All boxes of a level: the first four lie in the four quarters of the picture, the first sixteen in its
    sixteenths, and so on."""
    return _children(_dyadic(level - 1), 4) if level else [(0, 0)]


def _children(parents: list[tuple[int, int]], number: int) -> list[tuple[int, int]]:
    """Every parent's first child, then every parent's second, ..."""
    return [(2 * row + down, 2 * column + right) for down, right in _CHILDREN[:number] for row, column in parents]


def _check(count: int, scheme: str) -> None:
    if scheme not in SCHEMES:
        raise VtokError(f"there is no scheme {scheme!r} of anchors; known are {', '.join(SCHEMES)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise VtokError(f"{count!r} tokens cannot be anchored; ask for a whole number from 1 on")
