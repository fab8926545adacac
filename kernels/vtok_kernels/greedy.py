"""Greedy diversity: selectors that pick one token at a time, each from a running statistic of what is picked."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._common import check_count, check_shape, check_tokens, no_grad, unit
from .backend import operator


def _row(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D) at index (B,): (B, D)."""
    return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)


def _cosine_to(unit_x: Tensor, pick: Tensor) -> Tensor:
    """Cosines (B, N) of all tokens to the picked one (B,)."""
    # A product with one contiguous vector rounds equal rows alike, so that duplicates tie; a general product may not.
    return (unit_x @ _row(unit_x, pick).unsqueeze(-1)).squeeze(-1)


_LARGEST_GRAM = 2**25
"""Entries of the cosines that may be alive for one item: 128 MiB in fp32, N = 5,792. Beyond, rows when needed."""


def _gram(unit_x: Tensor, blocks: int = 8) -> Tensor:
    """Cosines (B, N, N), bitwise symmetric: two tokens that are each other's nearest tie.

    Item by item, so that an item rounds in a batch as it does alone; the upper triangle in blocks of rows and its
    mirror image: 9/16 of the operations of the whole product.
    """
    n = unit_x.shape[1]
    block = max(256, -(-n // blocks))
    gram = unit_x.new_empty(unit_x.shape[0], n, n)
    for rows, out in zip(unit_x, gram, strict=True):
        for start in range(0, n, block):
            end = min(start + block, n)
            torch.mm(rows[start:end], rows[start:].T, out=out[start:end, start:])
            out[end:, start:end] = out[start:end, end:].T
            square = out[start:end, start:end].triu_()
            square += square.triu(1).T
    return gram


def _twins(unit_x: Tensor, block: int = 64) -> Tensor:
    """For each token the lowest index (B, N) of a row that equals its own, by an exact 64-bit sum over the row's bits.

    A product of matrices may round equal rows apart, at the edges of its blocks; who takes the twin's value ties.
    """
    batch, n, width = unit_x.shape
    place = torch.arange(n, device=unit_x.device).expand(batch, n)
    factor = torch.arange(1, width + 1, device=unit_x.device) * -0x61C8864680B583EB  # splitmix64 of the channel
    for shift, multiplier in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        factor = (factor ^ (factor >> shift)) * multiplier
    factor = (factor ^ (factor >> 31)) | 1
    bits = torch.int64 if unit_x.dtype == torch.float64 else torch.int32
    # Adding 0 makes one pattern of 0.0 and -0.0. A block of rows stays in the cache.
    sums = [((part + 0.0).view(bits).long() * factor).sum(-1) for part in unit_x.split(block, 1)]
    ordered, order = torch.sort(torch.cat(sums, 1), dim=1, stable=True)
    opens = torch.ones_like(ordered, dtype=torch.bool)
    opens[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    opener = torch.where(opens, place, 0).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, opener))


class _Rows:
    """Cosines to one token after another, each row made when it is asked for."""

    def __init__(self, unit_x: Tensor) -> None:
        self.unit_x = unit_x

    def to(self, pick: Tensor) -> Tensor:
        return _cosine_to(self.unit_x, pick)

    def nearest_other(self) -> Tensor:
        return _nearest_other(self.unit_x)


class _GramRows:
    """Cosines to one token after another, from one product of matrices."""

    def __init__(self, unit_x: Tensor) -> None:
        self.gram, self.twin = _gram(unit_x), _twins(unit_x)
        batch, n = self.twin.shape
        self.first_row = torch.arange(batch, device=unit_x.device) * n

    def to(self, pick: Tensor) -> Tensor:
        row = self.first_row + self.twin.gather(1, pick[:, None]).squeeze(1)
        return self.gram.flatten(0, 1).index_select(0, row).gather(1, self.twin)

    def nearest_other(self) -> Tensor:
        itself = self.gram.diagonal(dim1=1, dim2=2)
        held = itself.clone()
        itself.fill_(-torch.inf)
        highest = self.gram.amax(-1)
        itself.copy_(held)
        return (1 - highest).clamp_min(0).gather(1, self.twin)


def _cosines(unit_x: Tensor, k: int, every: bool = False) -> _Rows | _GramRows:
    """The cheaper source of k rows; `every`: each token's nearest other one is needed, too.

    A row alone is bound by memory (all of x), the product by arithmetic, which costs some 15 times less a row.
    """
    n = unit_x.shape[1]
    return _GramRows(unit_x) if n * n <= _LARGEST_GRAM and (every or n <= 15 * k) else _Rows(unit_x)


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


def _nothing(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], 0, dtype=torch.long, device=x.device)


def check_selection(
    x: Tensor, k: int, *, first: Tensor | None = None, name: str = "first", **per_token: Tensor | None
) -> None:
    """Raise unless the arguments of a greedy selector fit: x (B, N, D), 0 <= k <= N, first (B,), others (B, N)."""
    check_tokens("x", x, 3, "(B, N, D)")
    check_count(k, x.shape[1])
    if first is not None:
        check_shape(name, first, (x.shape[0],))
    for key, tensor in per_token.items():
        if tensor is not None:
            check_shape(key, tensor, (x.shape[0], x.shape[1]))


@operator
@no_grad
def farthest_first(
    x: Tensor, k: int, *, weights: Tensor | None = None, first: Tensor | None = None, sort: bool = True
) -> Tensor:
    """Greedy max-min diversity on the cosine distance (DivPrune, arXiv 2503.02175).

    With `weights` and `first`: ZOO-Prune (arXiv 2509.24837).

    Each step picks the token whose distance to the nearest picked token is largest: a row of cosines and a running
    minimum a pick.

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
    check_selection(x, k, first=first, weights=weights)
    if k == 0:
        return _nothing(x)
    unit_x = unit(x)
    factor = None if weights is None else weights.to(unit_x.dtype)

    def weighted(distance: Tensor) -> Tensor:
        return distance if factor is None else distance * factor

    cosines = _cosines(unit_x, k, every=first is None)
    if first is None:
        first = weighted(cosines.nearest_other()).argmax(1)
    nearest = unit_x.new_full(x.shape[:2], torch.inf)

    def score(pick: Tensor, _: int) -> Tensor:
        # A pick is some ten calls on a short row: in place, as 1 - row is slower on a CPU than both of these.
        distance = cosines.to(pick).neg_().add_(1).clamp_min_(0)
        torch.minimum(nearest, distance, out=nearest)
        return weighted(nearest)

    return _greedy(first, x.shape[1], k, score, sort)


@operator
@no_grad
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
    check_selection(x, k, first=pivot, name="pivot")
    if objective not in ("sum", "min"):
        raise ValueError(f"There is no objective {objective!r}: choose 'sum' (max-sum) or 'min' (k-center).")
    if k == 0:
        return _nothing(x)
    unit_x = unit(x)
    cosines = _cosines(unit_x, k)
    similarity = unit_x.new_full(x.shape[:2], 0.0 if objective == "sum" else -torch.inf)
    accumulate = torch.add if objective == "sum" else torch.maximum

    def score(pick: Tensor, _: int) -> Tensor:
        accumulate(similarity, cosines.to(pick), out=similarity)
        return -similarity

    return _greedy(pivot, x.shape[1], k, score, sort)


@operator
@no_grad
def dpp_map(x: Tensor, k: int, relevance: Tensor | None = None, *, sort: bool = True) -> Tensor:
    """Greedy MAP of the determinantal point process K = diag(r) cos diag(r) (CDPruner, arXiv 2506.10967).

    Each step picks the token that multiplies det(K_S) most, its residual d^2 in an incremental Cholesky
    factorisation.

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
    check_selection(x, k, relevance=relevance)
    if k == 0:
        return _nothing(x)
    unit_x = unit(x)
    batch, n, _ = x.shape
    cosines = _cosines(unit_x, k)
    r = unit_x.new_ones(batch, n) if relevance is None else relevance.to(unit_x.dtype)
    # The diagonal is r^2 by construction; the rounded squares of unit rows would decide between equals.
    diagonal = torch.where((unit_x != 0).any(-1), r * r, 0.0)
    residual = diagonal.clone()
    noise = diagonal * torch.finfo(diagonal.dtype).eps
    factors = unit_x.new_zeros(batch, k, n)

    def score(pick: Tensor, step: int) -> Tensor:
        column = pick[:, None]
        kernel_row = r.gather(1, column) * r * cosines.to(pick)
        earlier = factors[:, : step - 1]
        explained = earlier.gather(2, column[:, None].expand(-1, step - 1, 1)).transpose(1, 2) @ earlier
        pivot = residual.gather(1, column)
        # A pick inside the span of earlier ones explains nothing new; dividing by its rounding noise would.
        factor = torch.where(pivot > noise.gather(1, column), (kernel_row - explained.squeeze(1)) * pivot.rsqrt(), 0.0)
        factors[:, step - 1] = factor
        residual.sub_(factor * factor).clamp_(min=0)
        return residual

    return _greedy(diagonal.argmax(1), n, k, score, sort)
