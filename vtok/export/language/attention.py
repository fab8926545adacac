"""Attention as the exported decoder does it: key and value heads are shared by groups of query heads, never copied."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "vtok_export"
MASKED = -3.0e4
"""Added to the score of a key that must not be seen. Finite, so that a row of padding has a softmax; in half precision
a score may lie this far below the others without becoming infinite."""


def causal_mask(attention_mask: Tensor, length: int, groups: int, dtype: torch.dtype) -> Tensor:
    """The additive mask of the last ``length`` columns of a cache.

    Parameters
    ----------
    attention_mask : Tensor
        (B, T) integers, 0 on padding, of all T columns: those of the cache and the ``length`` new ones.
    length : int
        New columns L.
    groups : int
        Query heads to a key head, G.
    dtype : torch.dtype
        Of the hidden states.

    Returns
    -------
    Tensor
        (B, 1, G * L, T): 0 where a query may look, else ``MASKED``. Rows repeat for each query head of a group.
    """
    total = attention_mask.shape[1]
    columns = torch.arange(total, device=attention_mask.device)
    rows = torch.arange(length, device=attention_mask.device) + (total - length)
    seen = (columns[None, :] <= rows[:, None])[None] & (attention_mask != 0)[:, None, :]
    mask = torch.where(seen, 0.0, MASKED).to(dtype)
    return mask[:, None].repeat(1, 1, groups, 1)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers for masks of ``causal_mask``.

    Parameters
    ----------
    module : nn.Module
        The attention module, unused.
    query : Tensor
        (B, H, L, d).
    key, value : Tensor
        (B, H / G, T, d).
    attention_mask : Tensor
        (B, 1, G * L, T).
    scaling : float, optional
        Factor on q.k; by default 1 / sqrt(d).

    Returns
    -------
    tuple
        (B, L, H, d), and no weights.
    """
    batch, heads, length, width = query.shape
    shared = key.shape[1]
    rows = query.reshape(batch, shared, (heads // shared) * length, width)
    found = F.scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(batch, heads, length, width).transpose(1, 2), None


@contextmanager
def exported_attention(config: Any) -> Iterator[None]:
    """Let the layers of this config attend by ``grouped_attention`` inside the block."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_attention)
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
