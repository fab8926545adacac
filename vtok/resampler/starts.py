"""What the tokens of an ordered sequence start as: averages over boxes of the picture, or single tokens of it.

``"quadtree"`` and ``"haar"`` are averages, the same boxes for every picture (``vtok.tokenizers.anchors``).
``"farthest"`` takes tokens of the picture itself in the order of farthest-first traversal (Gonzalez 1985; as a pruning
method DivPrune, arXiv 2503.02175): each next one is the least like all before it. The first k are what stopping at k
gives, and with every further one the worst-represented token of the picture is nearer to one that is there.
``"salient"`` does so with distances weighted by what a trained head says of each token (``vtok.resampler.saliency``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.resampler.layout import Plan, plan
from vtok.tokenizers import anchors
from vtok.tokenizers.blocks import grid_points

FARTHEST = "farthest"
SALIENT = "salient"
#: schemes that need no weights, and all
SCHEMES = (*anchors.SCHEMES, FARTHEST)
TRAINED = (*SCHEMES, SALIENT)
#: those whose tokens are tokens of the picture
PICKED = (FARTHEST, SALIENT)

#: positions of anchors and cells count in 24ths of the picture, whatever its grid: CLIP's at 336 pixels
SIDE = 24


@dataclass(frozen=True)
class Starts:
    """k ordered tokens of B pictures of one grid.

    Attributes:
        tokens: (B, k, D) what they start as.
        middles: (B, k, 2) or (k, 2) ``y x`` of what each shows, in 24ths of the picture.
        picks: (B, k) cells that they are; ``None`` for averages.
    """

    tokens: Tensor
    middles: Tensor
    picks: Tensor | None = None


def levels(count: int, scheme: str) -> Tensor:
    """(count,) level of each token, level 0 first; of picked tokens each level has twice as many as the last."""
    if scheme in PICKED:
        return torch.tensor([(number + 1).bit_length() - 1 for number in range(count)])
    return anchors.levels(count, scheme)


def averaged(x: Tensor, grid: tuple[int, int], boxes: Tensor, mask: Tensor | None = None) -> Starts:
    """Averages of x (B, N, D) over boxes (k, 4).

    Args:
        x: tokens in raster order.
        grid: (rows, columns) of them.
        boxes: ``y0 x0 y1 x1`` in unit coordinates.
        mask: (B, N) bool, False on cells that show nothing.
    """
    weights = anchors.pooling(boxes.float(), *grid, mask=mask)
    # in half precision, channels a hundred times the others would lose what tells pictures apart
    with torch.autocast(x.device.type, enabled=False):
        tokens = (weights.to(x.device) @ x.float()).to(x.dtype)
    return Starts(tokens, anchors.centres(boxes) * SIDE)


def farthest(
    x: Tensor, grid: tuple[int, int], k: int, mask: Tensor | None = None, weights: Tensor | None = None
) -> Starts:
    """The first k tokens of x (B, N, D) in farthest-first order by cosine, at most N.

    The features are compared as they are: standardised channels pick worse (docs/decisions.md).

    Args:
        x: tokens in raster order.
        grid: (rows, columns) of them.
        k: how many.
        mask: (B, N) bool, False on cells that show nothing.
        weights: (B, N) factors on distances, above 0.

    Raises:
        VtokError: a picture with fewer than k cells that are not masked.
    """
    k = min(k, x.shape[1])
    # cosines of rounded features would order pictures by their rounding
    with torch.autocast(x.device.type, enabled=False):
        compared = x.detach().float()
        if mask is None:
            picks = kernels.farthest_first(compared, k, weights=weights, sort=False)
        else:
            picks = _unmasked(compared, k, mask, weights)
        tokens = kernels.gather_tokens(x, picks)
    return Starts(tokens, cells(*grid, x.device)[picks], picks)


def _unmasked(x: Tensor, k: int, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Row by row: with weights of 0 a masked cell would still win over a second copy of a token."""
    found = []
    for number, (row, real) in enumerate(zip(x, mask, strict=True)):
        where = real.nonzero()[:, 0]
        if len(where) < k:
            raise VtokError(f"{k} tokens cannot be picked from {len(where)} cells that are not masked; ask for fewer")
        own = None if weights is None else weights[number, where][None]
        found.append(where[kernels.farthest_first(row[None, where], k, weights=own, sort=False)[0]])
    return torch.stack(found)


def planned(first: Starts, counts: Sequence[int], grid: tuple[int, int], scheme: str) -> list[Plan]:
    """Where the first ``counts`` tokens of each picture stand; those that are not to be had left out."""
    total = grid[0] * grid[1]
    if first.picks is None:
        return [plan(min(count, total), grid, scheme) for count in counts]
    return [_single(row[:count], total) for row, count in zip(first.picks.cpu(), counts, strict=True)]


def _single(places: Tensor, total: int) -> Plan:
    """Of tokens that are single cells; other cells belong to none."""
    numbers = torch.arange(len(places))
    weights, owner = torch.zeros(len(places), total), torch.full((total,), -1)
    weights[numbers, places] = 1
    owner[places] = numbers
    return Plan(weights, places, owner)


def cells(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 2) centres ``y x`` of a grid's cells, on the scale of the anchors' middles."""
    scale = torch.tensor([SIDE / rows, SIDE / columns], device=device)
    return (grid_points(rows, columns).to(device) + 0.5) * scale
