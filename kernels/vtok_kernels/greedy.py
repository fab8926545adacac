"""Greedy diversity: selectors that pick one token at a time, each from a running statistic of what is picked."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._common import check_count, check_shape, check_tokens, unit
from .backend import operator


def _row(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D) at index (B,): (B, D)."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


def _cosine_to(unit_x: Tensor, pick: Tensor) -> Tensor:
    """Cosines (B, N) of all tokens to the picked one (B,)."""
    # A product with one contiguous vector rounds equal rows alike, so that duplicates tie; a general product may not.
    return (unit_x @ _row(unit_x, pick).unsqueeze(-1)).squeeze(-1)


def _greedy(first: Tensor, n: int, k: int, score: Callable[[Tensor, int], Tensor], sort: bool) -> Tensor:
    """Pick `first` (B,), then k - 1 times the argmax of score(last pick, picks so far) among what is not picked."""
    picks = [first]
    taken = torch.zeros(first.shape[0], n, dtype=torch.bool, device=first.device)
    while len(picks) < k:
        taken.scatter_(1, picks[-1][:, None], True)
        scores = score(picks[-1], len(picks))
        picks.append(scores.masked_fill(taken, -torch.inf).argmax(1))
    picked = torch.stack(picks, 1)[:, :k]
    return picked.sort(dim=1).values if sort else picked


def _nearest_other(unit_x: Tensor, block: int = 256) -> Tensor:
    """Cosine distance (B, N) of each token to its nearest other token, `block` rows of the map at a time."""
    n = unit_x.shape[1]
    positions = torch.arange(n, device=unit_x.device)
    parts = []
    for start in range(0, n, block):
        cosine = unit_x[:, start : start + block] @ unit_x.transpose(1, 2)
        itself = positions[start : start + block, None] == positions
        parts.append(cosine.masked_fill_(itself, -torch.inf).amax(-1))
    return (1 - torch.cat(parts, 1)).clamp_min(0)


def _check(x: Tensor, k: int, **per_token: Tensor | None) -> None:
    check_tokens("x", x, 3, "(B, N, D)")
    check_count(k, x.shape[1])
    for name, tensor in per_token.items():
        if tensor is not None:
            check_shape(name, tensor, (x.shape[0], x.shape[1]))


@operator
@torch.no_grad()
def farthest_first(
    x: Tensor, k: int, *, weights: Tensor | None = None, first: Tensor | None = None, sort: bool = True
) -> Tensor:
    """Greedy max-min diversity on the cosine distance (DivPrune, arXiv 2503.02175).

    With `weights` and `first`: ZOO-Prune (arXiv 2509.24837).

    Each step picks the token whose distance to the nearest picked token is largest. One row of cosines a pick, a
    running minimum between them; never the N x N map.

    Parameters
    ----------
    x : (B, N, D)
        Features.
    k : int
        0 <= k <= N.
    weights : (B, N), optional
        Factors on the distances, the first pick's included.
    first : (B,) long, optional
        First pick. Default: the token farthest from its nearest other token.
    sort : bool
        True: ascending indices. False: in the order of picking.

    Returns
    -------
    (B, k) long
        Lower index first among equals. No gradient.

    Raises
    ------
    ValueError
        If shapes do not fit or k is out of range.
    """
    _check(x, k, weights=weights)
    unit_x = unit(x)
    factor = unit_x.new_ones(()) if weights is None else weights.to(unit_x.dtype)
    if first is None:
        first = (_nearest_other(unit_x) * factor).argmax(1)
    check_shape("first", first, (x.shape[0],))
    nearest = unit_x.new_full(x.shape[:2], torch.inf)

    def score(pick: Tensor, _: int) -> Tensor:
        torch.minimum(nearest, (1 - _cosine_to(unit_x, pick)).clamp_min(0), out=nearest)
        return nearest * factor

    return _greedy(first, x.shape[1], k, score, sort)


@operator
@torch.no_grad()
def max_sum(x: Tensor, k: int, pivot: Tensor, *, objective: str = "sum", sort: bool = True) -> Tensor:
    """Greedy max-sum diversification from a pivot (ToDRE, arXiv 2505.18757).

    Each step picks the token least similar to what is picked, by the running sum of cosines (v2 of the paper) or by
    their running maximum (v1, greedy k-center).

    Parameters
    ----------
    x : (B, N, D)
        Features.
    k : int
        0 <= k <= N.
    pivot : (B,) long
        First pick: the token with the largest class attention.
    objective : {"sum", "min"}
        "sum" = running sum; "min" = k-center.
    sort : bool
        True: ascending indices. False: in the order of picking.

    Returns
    -------
    (B, k) long
        Lower index first among equals. No gradient.

    Raises
    ------
    ValueError
        If shapes do not fit, k is out of range, or the objective is unknown.
    """
    _check(x, k)
    check_shape("pivot", pivot, (x.shape[0],))
    if objective not in ("sum", "min"):
        raise ValueError(f"There is no objective {objective!r}: choose 'sum' (max-sum) or 'min' (k-center).")
    unit_x = unit(x)
    similarity = unit_x.new_full(x.shape[:2], 0.0 if objective == "sum" else -torch.inf)
    accumulate = torch.add if objective == "sum" else torch.maximum

    def score(pick: Tensor, _: int) -> Tensor:
        accumulate(similarity, _cosine_to(unit_x, pick), out=similarity)
        return -similarity

    return _greedy(pivot, x.shape[1], k, score, sort)


@operator
@torch.no_grad()
def dpp_map(x: Tensor, k: int, relevance: Tensor | None = None, *, sort: bool = True) -> Tensor:
    """Greedy MAP of the determinantal point process K = diag(r) cos diag(r) (CDPruner, arXiv 2506.10967).

    Each step picks the token that multiplies det(K_S) most, its residual d^2 in an incremental Cholesky
    factorisation. Rows of K are made when needed; memory is (B, k, N).

    Parameters
    ----------
    x : (B, N, D)
        Features.
    k : int
        0 <= k <= N. Beyond the rank of K the remaining residuals are rounding noise: the picks are then valid, distinct
        and deterministic on a device, but arbitrary.
    relevance : (B, N), optional
        r. Its scale does not matter, its offset does. Default: ones.
    sort : bool
        True: ascending indices. False: in the order of picking.

    Returns
    -------
    (B, k) long
        Lower index first among equals. No gradient.

    Raises
    ------
    ValueError
        If shapes do not fit or k is out of range.
    """
    _check(x, k, relevance=relevance)
    unit_x = unit(x)
    batch, n, _ = x.shape
    r = unit_x.new_ones(batch, n) if relevance is None else relevance.to(unit_x.dtype)
    # The diagonal is r^2 by construction; the rounded squares of unit rows would decide between equals.
    diagonal = torch.where((unit_x != 0).any(-1), r * r, 0.0)
    residual = diagonal.clone()
    noise = diagonal * torch.finfo(diagonal.dtype).eps
    factors = unit_x.new_zeros(batch, k, n)

    def score(pick: Tensor, step: int) -> Tensor:
        column = pick[:, None]
        kernel_row = r.gather(1, column) * r * _cosine_to(unit_x, pick)
        earlier = factors[:, : step - 1]
        explained = earlier.gather(2, column[:, None].expand(-1, step - 1, 1)).transpose(1, 2) @ earlier
        pivot = residual.gather(1, column)
        # A pick inside the span of earlier ones explains nothing new; dividing by its rounding noise would.
        factor = torch.where(pivot > noise.gather(1, column), (kernel_row - explained.squeeze(1)) * pivot.rsqrt(), 0.0)
        factors[:, step - 1] = factor
        residual.sub_(factor * factor).clamp_(min=0)
        return residual

    return _greedy(diagonal.argmax(1), n, k, score, sort)
