"""Moving tokens into and out of short sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import check_count, check_tokens, no_grad
from .backend import operator


def _along(index: Tensor, x: Tensor) -> Tensor:
    """index (B, K) -> (B, K, ...), expanded over the trailing axes of x (B, N, ...)."""
    if index.dim() != 2 or x.dim() < 2 or x.shape[0] != index.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and index {tuple(index.shape)} do not fit: (B, N, ...) and (B, K) of one B are needed."
        )
    return index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])


@operator
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x (B, N, ...) at index (B, K) long: (B, K, ...). Differentiable."""
    along = _along(index, x)
    batch, n = x.shape[:2]
    if x.dim() == 2 or batch == 0:
        return x.gather(1, along)
    # Whole rows are copied at the speed of memory; gather reads an index an element: 4 to 12 times the time on a CPU.
    if batch == 1 or x.stride(0) == 0:
        rows, own = x[0], index
    elif x.stride(0) == n * x.stride(1):
        rows, own = x.flatten(0, 1), index + n * torch.arange(batch, device=index.device)[:, None]
    else:
        return x[torch.arange(batch, device=index.device)[:, None], index]
    return rows.index_select(0, own.flatten()).reshape(*index.shape, *x.shape[2:])


@operator
def compact(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Tokens of several tensors at one index: everything that moves together when a sequence is shortened.

    Parameters
    ----------
    tensors : of (B, N, ...) or (1, N, ...)
        Any dtypes and trailing axes, on one device; (1, N, ...) is shared by the batch. Other layouts go in as views:
        a KV cache (B, H, L, d) as ``cache.transpose(1, 2)``.
    index : (B, K) long
        As of `left_compact`.
    out : of (B, K, ...), optional
        Where to write, one for each tensor: the first K columns of a static cache, for example. May share memory with
        `tensors`. No gradient.

    Returns
    -------
    list of (B, K, ...)
        `out` where it is given. Differentiable otherwise.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    moved = [gather_tokens(x, index) for x in check_compact(tensors, index, out)]
    if out is None:
        return moved
    for place, rows in zip(out, moved, strict=True):
        place.copy_(rows)
    return list(out)


def check_compact(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor] | None) -> list[Tensor]:
    """The tensors of `compact` with the batch of the index, or an error."""
    for x in tensors:
        if index.dim() != 2 or x.dim() < 2 or x.shape[0] not in (1, index.shape[0]):
            raise ValueError(
                f"A tensor of shape {tuple(x.shape)} and an index of {tuple(index.shape)} do not fit: (B, N, ...) or "
                "(1, N, ...) and (B, K) of one B are needed."
            )
    if out is not None:
        shapes = [(*index.shape, *x.shape[2:]) for x in tensors]
        if [(tuple(x.shape), x.dtype) for x in out] != [(s, x.dtype) for s, x in zip(shapes, tensors, strict=True)]:
            raise ValueError(
                f"out has shapes {[tuple(x.shape) for x in out]}, but the result has {shapes}, in the same dtypes: "
                "pass one tensor for each."
            )
    return [x.expand(index.shape[0], *x.shape[1:]) for x in tensors]


@operator
def scatter_tokens(x: Tensor, index: Tensor, n: int, mask: Tensor | None = None) -> Tensor:
    """Inverse of `gather_tokens`: write the rows of x to their places among n zeros.

    Parameters
    ----------
    x : (B, K, ...)
        Rows.
    index : (B, K) long
        Distinct places in [0, n) of the rows that are written.
    n : int
        Length of the result.
    mask : (B, K) bool, optional
        Rows where it is False are not written (padding of `left_compact`).

    Returns
    -------
    (B, n, ...)
        Differentiable.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    if x.shape[:2] != index.shape or (mask is not None and mask.shape != index.shape):
        raise ValueError(f"x {tuple(x.shape)}, index {tuple(index.shape)} and mask do not fit: one entry a row of x.")
    if mask is not None:
        index = torch.where(mask, index, n)
    return x.new_zeros(x.shape[0], n + 1, *x.shape[2:]).scatter(1, _along(index, x), x)[:, :n]


@operator
@no_grad
def left_compact(keep: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where to gather kept tokens from, so that each row ends with them, in order: left padding.

    Parameters
    ----------
    keep : (B, N) bool
        Tokens to keep.
    k : int
        Length of the result, known on the host: the largest count of a row. A row that keeps more loses its first ones.

    Returns
    -------
    index : (B, k) long
        For `gather_tokens`. Padding points at tokens that are not kept.
    mask : (B, k) bool
        True at kept tokens, False at padding.

    Raises
    ------
    ValueError
        If keep is not (B, N) bool or k is out of range.
    """
    check_tokens("keep", keep, 2, "(B, N)")
    if keep.dtype != torch.bool:
        raise ValueError(f"keep is {keep.dtype}, but a bool mask is needed: True = keep.")
    n = keep.shape[1]
    check_count(k, n)
    index = torch.sort(keep.to(torch.uint8), dim=1, stable=True).indices[:, n - k :]
    return index, keep.gather(1, index)
