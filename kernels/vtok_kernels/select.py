"""Choosing tokens by score, by an even spread, or at random."""

import math

import torch
from torch import Tensor

from ._common import check_count, check_tokens, no_grad, ranking
from .backend import operator


@operator
@no_grad
def topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores.

    Parameters
    ----------
    scores : (B, N)
        Any real dtype.
    k : int
        0 <= k <= N.

    Returns
    -------
    (B, k) long
        Ascending. Among equal scores the lower index wins, on every device.

    Raises
    ------
    ValueError
        If k is out of range or scores are not (B, N).
    """
    check_tokens("scores", scores, 2, "(B, N)")
    check_count(k, scores.shape[1])
    return ranking(scores)[:, :k].sort(dim=1).values


@operator
def keep_mask(indices: Tensor, n: int) -> Tensor:
    """Mask (B, n) bool that is True at `indices` (B, K)."""
    check_tokens("indices", indices, 2, "(B, K)")
    mask = torch.zeros(indices.shape[0], n, dtype=torch.bool, device=indices.device)
    return mask.scatter(1, indices, True)


def _spread(n: int, k: int) -> list[int]:
    """The centres of k equal cells of n places; the second half mirrors the first."""
    left = [(2 * i + 1) * n // (2 * k) for i in range(k // 2)]
    middle = [(n - 1) // 2] * (k % 2)
    return left + middle + [n - 1 - i for i in reversed(left)]


def _to(indices: list[int], device: torch.device | str | None) -> Tensor:
    # A blocking copy to an accelerator would wait for all of its queued work.
    return torch.tensor(indices, dtype=torch.long).to(device, non_blocking=True)


def uniform(n: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """k of n indices, evenly spaced and symmetric about the centre.

    Parameters
    ----------
    n, k : int
        0 <= k <= n.
    device : optional
        Where the result lives; the arithmetic is exact, on the host.

    Returns
    -------
    (k,) long
        Strictly increasing; index i has its mirror image n - 1 - i, except that an odd k of an even n has no true
        centre and takes the lower of the two middle places.

    Raises
    ------
    ValueError
        If k is out of range.
    """
    check_count(k, n)
    return _to(_spread(n, k), device)


def _sub_grid(h: int, w: int, k: int) -> tuple[int, int]:
    """Rows and columns, rows * cols <= k."""

    def quality(shape: tuple[int, int]) -> tuple[float, int, float]:
        rows, cols = shape
        return min(rows / h, cols / w), rows * cols, -abs(math.log(rows * w / (cols * h)))

    return max(((rows, min(w, k // rows)) for rows in range(1, min(h, k) + 1)), key=quality)


def uniform_grid(h: int, w: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """k cells of an h x w grid: an evenly spaced sub-grid of its shape, topped up evenly.

    The rows x cols sub-grid with rows * cols <= k is the one whose widest step, max(h / rows, w / cols), is smallest;
    of equals, the one with most cells, then with the aspect closest to h : w. (Aspect alone would call a 1 x 1 sub-grid
    of a square perfect.) The k - rows * cols remaining picks are spread evenly over the other cells in raster order.

    Parameters
    ----------
    h, w : int
        Rows and columns of the grid.
    k : int
        0 <= k <= h * w.
    device : optional
        Where the result lives.

    Returns
    -------
    (k,) long
        Raster indices (row * w + column), ascending.

    Raises
    ------
    ValueError
        If k is out of range.
    """
    check_count(k, h * w)
    if k == 0:
        return _to([], device)
    rows, cols = _sub_grid(h, w, k)
    columns = _spread(w, cols)
    grid = [row * w + column for row in _spread(h, rows) for column in columns]
    taken = set(grid)
    rest = [cell for cell in range(h * w) if cell not in taken]
    return _to(sorted(grid + [rest[i] for i in _spread(len(rest), k - len(grid))]), device)


def random(n: int, k: int, generator: torch.Generator, device: torch.device | str | None = None) -> Tensor:
    """k of n indices without replacement, the same on every device.

    Parameters
    ----------
    n, k : int
        0 <= k <= n.
    generator : torch.Generator
        A CPU generator: accelerators draw other numbers from the same seed.
    device : optional
        Where the result lives.

    Returns
    -------
    (k,) long
        Ascending.

    Raises
    ------
    ValueError
        If k is out of range or the generator is not a CPU generator.
    """
    check_count(k, n)
    if generator.device.type != "cpu":
        raise ValueError(
            f"The generator lives on {generator.device}, where a seed gives other numbers: "
            "pass torch.Generator() (CPU), and the wanted device as `device`."
        )
    return torch.randperm(n, generator=generator)[:k].sort().values.to(device, non_blocking=True)
