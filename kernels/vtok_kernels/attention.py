"""Attention statistics, recomputed exactly from queries and keys: only the rows that are asked for."""

import torch
from torch import Tensor

from ._common import check_shape, check_tokens, no_grad, score_dtype
from .backend import operator


def _check_heads(q: Tensor, k: Tensor) -> None:
    check_tokens("q", q, 4, "(B, H, R, d)")
    check_tokens("k", k, 4, "(B, Hkv, N, d)")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit: batch and head width must agree, "
            "and the query heads must be a multiple of the key heads."
        )


def _check_mask(name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} is {mask.dtype}, not an on-off mask: pass a bool mask, True = may attend.")
    check_shape(name, mask, *shapes)


def _head_mean(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Softmax over N of scale * q.k, mean over heads: (B, R, N)."""
    batch, heads, rows, width = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    dtype = score_dtype(q)
    # Query heads of one group are rows of the same product, so that k is never repeated.
    grouped = (q.to(dtype) * scale).reshape(batch, kv_heads, heads // kv_heads * rows, width)
    logits = (grouped @ k.to(dtype).transpose(-1, -2)).view(batch, heads, rows, n)
    if mask is None:
        return logits.softmax(-1).mean(1)
    # The lowest finite value keeps an empty row free of NaN; the product with the mask then makes it zero.
    probabilities = logits.masked_fill_(~mask[:, None], torch.finfo(dtype).min).softmax(-1)
    return probabilities.mean(1) * mask


@operator
@no_grad
def attention_rows(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Rows of the attention map, averaged over heads.

    Parameters
    ----------
    q : (B, H, R, d)
        Queries of the rows that are needed, after any rotary embedding.
    k : (B, Hkv, N, d)
        Keys; H is a multiple of Hkv (grouped-query attention).
    scale : float
        Factor on q.k, usually ``d ** -0.5`` (1.0 where q is scaled already).
    mask : (B, R, N) or (B, 1, N) bool, optional
        True = may attend. Default: everything.

    Returns
    -------
    (B, R, N)
        fp32 (float64 for float64 input). A row with nothing to attend is zero. No gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit or the mask is not bool.

    Notes
    -----
    All R x H rows are alive at once: for whole maps use `received_attention`, which works in blocks.
    """
    _check_heads(q, k)
    batch, rows, n = q.shape[0], q.shape[2], k.shape[2]
    _check_mask("mask", mask, (batch, rows, n), (batch, 1, n))
    return _head_mean(q, k, scale, mask)


@operator
@no_grad
def received_attention(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    query_positions: Tensor | None = None,
    block: int = 256,
) -> Tensor:
    """Attention that each key receives: mean over heads and valid queries.

    MCTF's information (arXiv 2403.10030), and what stands in for class attention in towers without a class token.

    Parameters
    ----------
    q : (B, H, R, d)
        Queries.
    k : (B, Hkv, N, d)
        Keys; H is a multiple of Hkv.
    scale : float
        Factor on q.k.
    key_mask : (B, N) bool, optional
        Keys that may be attended.
    query_mask : (B, R) bool, optional
        Queries that count in the mean.
    query_positions : (B, R) long, optional
        Causal: key j is visible to a query iff j <= its position.
    block : int
        Queries whose logits are alive at once (H * block * N numbers).

    Returns
    -------
    (B, N)
        fp32 (float64 for float64 input); sums to 1 over N where every valid query sees a key. Zero where no query
        is valid. No gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit, a mask is not bool, or block < 1.
    """
    _check_heads(q, k)
    batch, rows, n = q.shape[0], q.shape[2], k.shape[2]
    _check_mask("key_mask", key_mask, (batch, n))
    _check_mask("query_mask", query_mask, (batch, rows))
    if query_positions is not None:
        check_shape("query_positions", query_positions, (batch, rows))
    if block < 1:
        raise ValueError(f"block is {block}, but at least one row must be computed at a time: pass block >= 1.")

    k = k.to(score_dtype(q))
    key_positions = torch.arange(n, device=k.device)
    received = k.new_zeros(batch, n)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        mask = None if key_mask is None else key_mask[:, None]
        if query_positions is not None:
            causal = key_positions <= query_positions[:, part, None]
            mask = causal if mask is None else causal & mask
        rows_attention = _head_mean(q[:, :, part], k, scale, mask)
        if query_mask is not None:
            rows_attention = rows_attention * query_mask[:, part, None]
        received += rows_attention.sum(1)
    if query_mask is None:
        return received / max(rows, 1)
    return received / query_mask.sum(1, keepdim=True).clamp_min(1)


@operator
@no_grad
def value_similarity(v: Tensor, row: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Softmax over tokens of the similarity of their values to one value row, mean over heads.

    FlowCut's semantic relation (arXiv 2505.19536).

    Parameters
    ----------
    v : (B, H, N, d)
        Values; fewer heads than `row` are shared by groups, as in `attention_rows`.
    row : (B, H, d)
        The value of the class token or of the last instruction token.
    scale : float
        Factor on v_row.v_j: 1 in FlowCut's vision tower, ``d ** -0.5`` in its language-model stage.
    mask : (B, N) bool, optional
        Tokens in the softmax.

    Returns
    -------
    (B, N)
        fp32 (float64 for float64 input). No gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit or the mask is not bool.
    """
    check_tokens("row", row, 3, "(B, H, d)")
    _check_heads(row[:, :, None], v)
    _check_mask("mask", mask, (v.shape[0], v.shape[2]))
    return _head_mean(row[:, :, None], v, scale, None if mask is None else mask[:, None])[:, 0]
