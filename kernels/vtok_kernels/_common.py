"""What every operator shares: the dtype of scores, unit rows, and the check of a count."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .backend import portable_asked

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: `torch.no_grad`, which is not touched where gradients are off already.

    torch.export cuts its graph at every switch of gradients and writes it anew for each, which made exports of merging
    methods quadratic: hundreds of merges of windows, each with its own switches.
    """
    quiet = torch.no_grad()(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return (quiet if torch.is_grad_enabled() else function)(*args, **kwargs)

    return call


def score_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: ties and sums of half-precision scores are not to be trusted."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def unit(x: Tensor) -> Tensor:
    """Rows of x (..., D) at length 1, in `score_dtype`. A zero row stays zero: its cosine to anything is 0."""
    x = x.to(score_dtype(x))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def ranking(values: Tensor) -> Tensor:
    """Indices (B, N) of values from the highest to the lowest; the lower index first among equals, on every device.

    torch.topk promises no order of ties. Adding 0 makes one value of -0.0 and 0.0, whose bits differ in a radix sort.
    """
    if values.is_floating_point():
        values = values.to(score_dtype(values)) + 0.0
    if portable_asked():
        return _counted(values)
    return torch.sort(values, dim=1, descending=True, stable=True).indices


def _counted(values: Tensor) -> Tensor:
    """The same by counting who comes before whom: exporters know no stable sort, and the others break ties as they
    like (torch's on CPUs does). N x N comparisons."""
    values = values if values.is_floating_point() else values.to(torch.int32)
    own, other = values[:, :, None], values[:, None]
    place = torch.arange(values.shape[1], device=values.device)
    before = (other > own) | ((other == own) & (place < place[:, None]))
    rank = before.sum(2)
    return torch.zeros_like(rank).scatter(1, rank, place.expand(rank.shape))


def check_count(k: int, n: int) -> None:
    """Raise unless 0 <= k <= n."""
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} tokens cannot be chosen: k must lie between 0 and {n}.")


def check_tokens(name: str, x: Tensor, dims: int, axes: str) -> None:
    """Raise unless x has `dims` axes."""
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but {axes} is needed: add or remove leading axes.")


def check_shape(name: str, x: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise unless the shape of x is one of `shapes`."""
    if tuple(x.shape) not in shapes:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but {' or '.join(map(str, shapes))} is needed.")
