"""Operators in the form that exported graphs hold (see `backend.portable`): fixed lengths, any batch, no writing in
place, nothing but what ONNX, OpenVINO and torch.export programs all know. Greedy loops are unrolled."""

from collections.abc import Callable

import torch
from torch import Tensor

from ._common import no_grad, score_dtype, unit
from .backend import portable_form
from .greedy import check_selection


def _picks(rows: Tensor, first: Tensor, k: int, running: Callable[[Tensor | None, Tensor], Tensor]) -> list[Tensor]:
    """`first` (B,), then k - 1 times the argmax of a running score (B, N) over rows (B, N, N) of what is picked."""
    score: Tensor | None = None
    picks = [first]
    while len(picks) < k:
        along = picks[-1][:, None, None].expand(-1, 1, rows.shape[2])
        score = running(score, rows.gather(1, along).squeeze(1))
        picks.append(score.argmax(1))
    return picks


def _with_diagonal(square: Tensor, value: float) -> Tensor:
    itself = torch.eye(square.shape[1], dtype=torch.bool, device=square.device)
    return torch.where(itself, value, square)


def _ordered(picks: list[Tensor], sort: bool) -> Tensor:
    picked = torch.stack(picks, 1)
    return picked.sort(dim=1).values if sort else picked


@portable_form("farthest_first")
@no_grad
def farthest_first(
    x: Tensor, k: int, *, weights: Tensor | None = None, first: Tensor | None = None, sort: bool = True
) -> Tensor:
    """As the operator. A token that is picked lies at distance -1 from itself, below every other, so the running
    minimum keeps it out of the next picks."""
    check_selection(x, k, first=first, weights=weights)
    if k == 0:
        return torch.zeros_like(x[:, :0, 0], dtype=torch.long)
    unit_x = unit(x)
    distance = (1 - unit_x @ unit_x.transpose(1, 2)).clamp_min(0)
    if first is None:
        nearest_other = _with_diagonal(distance, torch.inf).amin(2)
        first = (nearest_other if weights is None else nearest_other * weights).argmax(1)

    def running(nearest: Tensor | None, row: Tensor) -> Tensor:
        return row if nearest is None else torch.minimum(nearest, row)

    if weights is not None:
        # the weight belongs to the token that is scored, so it commutes with the minimum over picked ones
        distance = distance * weights.to(distance.dtype)[:, None]
    return _ordered(_picks(_with_diagonal(distance, -1.0), first, k, running), sort)


@portable_form("max_sum")
@no_grad
def max_sum(x: Tensor, k: int, pivot: Tensor, *, objective: str = "sum", sort: bool = True) -> Tensor:
    """As the operator. A picked token is -4 N dissimilar to itself, which no sum of N cosines makes up for."""
    check_selection(x, k, first=pivot, name="pivot")
    if objective not in ("sum", "min"):
        raise ValueError(f"There is no objective {objective!r}: choose 'sum' (max-sum) or 'min' (k-center).")
    if k == 0:
        return torch.zeros_like(x[:, :0, 0], dtype=torch.long)
    unit_x = unit(x)
    dissimilar = _with_diagonal(-(unit_x @ unit_x.transpose(1, 2)), -4.0 * x.shape[1])
    accumulate = torch.add if objective == "sum" else torch.minimum

    def running(score: Tensor | None, row: Tensor) -> Tensor:
        return row if score is None else accumulate(score, row)

    return _ordered(_picks(dissimilar, pivot, k, running), sort)


@portable_form("gather_tokens")
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """As the operator, by one gather."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:]))


@portable_form("merge_sum")
def merge_sum(x: Tensor, dst: Tensor, n_out: int) -> Tensor:
    """As the operator, by scatter_add: index_add would need rows of all items in one axis."""
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
    flat = flat.to(score_dtype(x)) if x.is_floating_point() else flat
    slots = torch.where(dst < 0, n_out, dst).unsqueeze(-1).expand(-1, -1, flat.shape[2])
    summed = torch.zeros_like(flat[:, :1]).expand(-1, n_out + 1, -1).scatter_add(1, slots, flat)
    return summed[:, :n_out].reshape(x.shape[0], n_out, *x.shape[2:]).to(x.dtype)
