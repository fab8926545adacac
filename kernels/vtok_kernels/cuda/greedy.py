"""Greedy selection in CUDA C++ (csrc/greedy.cu), on Triton's products of all tokens.

On request only (``VTOK_KERNELS=cuda`` or ``use("cuda")``): it has not run on a GPU yet.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import register
from ..fused import greedy as fused
from ..greedy import check_selection
from .loader import launch

FILE = "greedy.cu"

SHARED = 226 * 1024
"""Dynamic shared memory of a block on sm_90, of 227 KiB: the kernel declares 768 bytes itself."""

THREADS = 768
"""Of a block of the DPP, at most."""

ITEMS = (1, 3, 8)
"""Tokens a thread, of 1,024 threads, that pick kernels are compiled for."""


def _contiguous(per_token: Tensor | None) -> Tensor | None:
    return None if per_token is None else per_token.float().contiguous()


def _pick(x: Tensor, k: int, first: Tensor | None, weights: Tensor | None, objective: str, sort: bool) -> Tensor:
    batch, n, _ = x.shape
    products, inverse = fused.gram(x)
    nearest = fused.nearest_other(products, inverse) if first is None else None
    picks = torch.empty(batch, k, dtype=torch.long, device=x.device)
    items = next(i for i in ITEMS if n <= 1024 * i)
    threads = min(1024, -(-n // (32 * items)) * 32)
    start = None if first is None else first.long().contiguous()
    arguments = (products, inverse, _contiguous(weights), start, nearest, picks, n, k, int(sort))
    launch(FILE, f"pick_{objective}_{items}", (batch,), (threads,), arguments, device=x.device)
    return picks


@register("farthest_first", "cuda", devices=("cuda",), priority=-2)
@torch.no_grad()
def farthest_first(
    x: Tensor, k: int, *, weights: Tensor | None = None, first: Tensor | None = None, sort: bool = True
) -> Tensor:
    """`vtok_kernels.farthest_first` with one block a span."""
    if not fused.covers(x, k, weights, first):
        return fused.farthest_first(x, k, weights=weights, first=first, sort=sort)
    check_selection(x, k, first=first, weights=weights)
    return _pick(x, k, first, weights, "far", sort)


@register("max_sum", "cuda", devices=("cuda",), priority=-2)
@torch.no_grad()
def max_sum(x: Tensor, k: int, pivot: Tensor, *, objective: str = "sum", sort: bool = True) -> Tensor:
    """`vtok_kernels.max_sum` with one block a span."""
    if not fused.covers(x, k, pivot) or objective not in ("sum", "min"):
        return fused.max_sum(x, k, pivot, objective=objective, sort=sort)
    check_selection(x, k, first=pivot, name="pivot")
    return _pick(x, k, pivot, None, objective, sort)


class Plan(NamedTuple):
    """How n columns and k rows of factors are laid over a cluster."""

    blocks: int
    width: int  # columns of the span a block
    columns: int  # threads that they take: whole warps
    threads: int
    resident: int  # rows of factors in shared memory; later ones go to global memory
    shared: int  # bytes


def plan_cluster(n: int, k: int) -> Plan:
    """At least a warp or two of columns a block, at most 16 blocks, as many rows in shared memory as fit."""
    blocks = next(size for size in (1, 2, 4, 8, 16) if n <= 64 * size or size == 16)
    width = -(-n // blocks)
    columns = -(-width // 32) * 32
    threads = columns * max(1, min(8, THREADS // columns))
    fours = -(-k // 4) * 4
    room = SHARED // 4 - fours - threads
    resident = min(fours, room // width // 4 * 4)
    return Plan(blocks, width, columns, threads, resident, 4 * (fours + threads + resident * width))


@register("dpp_map", "cuda", devices=("cuda",), priority=-2)
@torch.no_grad()
def dpp_map(x: Tensor, k: int, relevance: Tensor | None = None, *, sort: bool = True) -> Tensor:
    """`vtok_kernels.dpp_map` with one cluster of blocks a span: sm_90 and later."""
    if not fused.covers(x, k, relevance) or torch.cuda.get_device_capability(x.device)[0] < 9:
        return fused.dpp_map(x, k, relevance, sort=sort)
    check_selection(x, k, relevance=relevance)
    batch, n, _ = x.shape
    products, inverse = fused.gram(x)
    plan = plan_cluster(n, k)
    rest = k - plan.resident
    spill = torch.empty(batch, rest, n, dtype=torch.float32, device=x.device) if rest > 0 else None
    picks = torch.empty(batch, k, dtype=torch.long, device=x.device)
    r = _contiguous(relevance)
    sizes = (n, k, plan.width, plan.columns, plan.blocks, plan.resident)
    launch(
        FILE, "dpp_map", (batch * plan.blocks,), (plan.threads,), (products, inverse, r, spill, picks, *sizes),
        device=x.device, shared=plan.shared, cluster=plan.blocks,
    )  # fmt: skip
    return picks.sort(dim=1).values if sort else picks
