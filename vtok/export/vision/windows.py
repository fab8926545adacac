"""Attention inside windows of a batch of pictures of one grid, with nothing but calls that exporters know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def whole(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Every patch sees every patch: q, k, v (B, H, N, d), bias (B, 1, 1, N) of the keys."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def inside(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], bias: Tensor | None, scale: float) -> Tensor:
    """Every patch sees its window: consecutive patches of the given lengths. Windows of one length are one call."""
    outputs, where = [], []
    for length, rows in by_length(lengths):
        shape = (len(rows), length)
        index = torch.tensor(rows, device=q.device).flatten()
        parts = [part[:, :, index].unflatten(2, shape).transpose(1, 2).flatten(0, 1) for part in (q, k, v)]
        own = None if bias is None else bias[:, 0, 0, index].unflatten(1, shape).flatten(0, 1)[:, None, None]
        out = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], attn_mask=own, scale=scale)
        outputs.append(out.unflatten(0, (-1, shape[0])).transpose(1, 2).flatten(2, 3))
        where.append(index)
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs, 2)[:, :, torch.cat(where).argsort()]


def masked(q: Tensor, k: Tensor, v: Tensor, window: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Every patch sees patches of its window (B, N): where windows follow the picture."""
    other = window[:, None, :, None] != window[:, None, None, :]
    mask = other.to(q.dtype) * (torch.finfo(q.dtype).min / 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask if bias is None else mask + bias, scale=scale)


def by_length(lengths: Sequence[int]) -> list[tuple[int, list[list[int]]]]:
    """(length, positions of each segment) of consecutive segments, those of one length together."""
    together: dict[int, list[list[int]]] = {}
    start = 0
    for length in lengths:
        if length:
            together.setdefault(length, []).append(list(range(start, start + length)))
        start += length
    return list(together.items())
