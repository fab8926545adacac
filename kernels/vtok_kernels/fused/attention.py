"""Attention statistics in Triton: the softmax is normalised in one pass over the keys and read in a second one.

No logit reaches memory. The first pass leaves a log-sum-exp (base 2) for every head and row; keys may be split among
programs, whose parts the second pass adds up. Sums across programs go through memory, never through atomics, so that
repeated runs agree to the last bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..backend import reference, register
from ._launch import INTERPRETED, devices, next_power, priority

LOG2_E = 1.4426950408889634
SHARED, BY_ROW = tl.constexpr(1), tl.constexpr(2)
"""Kinds of masks: one vector for all rows, or a matrix."""
PROGRAMS = 512
"""Programs to aim for: about four for each of an H100's 132 processors."""


@triton.jit
def _logits(q, k, scale, IEEE: tl.constexpr):
    """Tiles q (M, D), k (N, D): scaled products (M, N) in fp32. Half precision multiplies exactly on tensor cores."""
    if IEEE:
        return tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee") * scale
    return tl.dot(q, tl.trans(k)) * scale


@triton.jit
def _rows(q, row, rows, kv_head, stride_h, stride_r, stride_d, width, GROUP: tl.constexpr, D: tl.constexpr):
    """Queries of one key head: row = place * GROUP + head within the group, so that tiles stay close in place."""
    d = tl.arange(0, D)
    head = kv_head * GROUP + (row % GROUP).to(tl.int64)
    place = (row // GROUP).to(tl.int64)
    pointers = q + head[:, None] * stride_h + place[:, None] * stride_r + d[None] * stride_d
    return tl.load(pointers, mask=(row[:, None] < rows) & (d[None] < width), other=0.0)


@triton.jit
def _keys(k, start, n, stride_n, stride_d, width, BLOCK_N: tl.constexpr, D: tl.constexpr):
    d, column = tl.arange(0, D), start + tl.arange(0, BLOCK_N)
    pointers = k + column[:, None].to(tl.int64) * stride_n + d[None] * stride_d
    return tl.load(pointers, mask=(column[:, None] < n) & (d[None] < width), other=0.0)


@triton.jit
def _visible(
    mask, positions, place, column, in_rows, n, mask_r, mask_n, pos_r, MASKED: tl.constexpr, CAUSAL: tl.constexpr
):
    """Which columns the rows at `place` may attend: (M, N)."""
    inside = in_rows[:, None] & (column[None] < n)
    if MASKED == SHARED:
        on = tl.load(mask + column.to(tl.int64) * mask_n, mask=column < n, other=0)
        inside = inside & (on[None] != 0)
    elif MASKED == BY_ROW:
        pointers = mask + place[:, None].to(tl.int64) * mask_r + column[None].to(tl.int64) * mask_n
        inside = inside & (tl.load(pointers, mask=inside, other=0) != 0)
    if CAUSAL:
        position = tl.load(positions + place.to(tl.int64) * pos_r, mask=in_rows, other=-1)
        inside = inside & (column[None] <= position[:, None])
    return inside


@triton.jit
def _normaliser(lse, row, rows, SPLITS: tl.constexpr):
    """Log-sum-exp of rows over all parts; 0 where nothing is visible (what is masked there is masked again)."""
    part = tl.arange(0, SPLITS)
    parts = tl.load(
        lse + row[:, None].to(tl.int64) * SPLITS + part[None], mask=row[:, None] < rows, other=-float("inf")
    )
    highest = tl.max(parts, 1)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(tl.exp2(parts - highest[:, None]), 1)
    return highest + tl.log2(tl.where(total > 0, total, 1.0))


@triton.jit
def _lse_kernel(
    q, k, mask, positions, lse, scale, rows, n, width, kv_heads, per_split,
    q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d, mask_b, mask_r, mask_n, pos_b, pos_r,
    GROUP: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, IEEE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of (batch x key head) x rows over one part of the keys: lse (B, Hkv, rows, SPLITS)."""
    both, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, kv_head = both // kv_heads, both % kv_heads
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place, in_rows = row // GROUP, row < rows
    queries = _rows(q + batch * q_b, row, rows, kv_head, q_h, q_r, q_d, width, GROUP, D)
    k += batch * k_b + kv_head * k_h
    mask += batch * mask_b
    positions += batch * pos_b

    start = part * per_split
    end = tl.minimum(start + per_split, n)
    if CAUSAL:
        last = tl.max(tl.load(positions + place.to(tl.int64) * pos_r, mask=in_rows, other=-1), 0)
        end = tl.minimum(end.to(tl.int64), last.to(tl.int64) + 1).to(tl.int32)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for at in range(start, end, BLOCK_N):
        column = at + tl.arange(0, BLOCK_N)
        logits = _logits(queries, _keys(k, at, n, k_n, k_d, width, BLOCK_N, D), scale, IEEE)
        seen = _visible(mask, positions, place, column, in_rows, end, mask_r, mask_n, pos_r, MASKED, CAUSAL)
        logits = tl.where(seen, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(highest - finite) + tl.sum(tl.exp2(logits - finite[:, None]), 1)
        highest = higher
    value = tl.where(total > 0, highest + tl.log2(tl.where(total > 0, total, 1.0)), -float("inf"))
    tl.store(lse + (both * rows + row) * SPLITS + part, value, mask=in_rows)


@triton.jit
def _rows_kernel(
    q, k, mask, lse, out, scale, factor, rows, n, width, heads, chunks, per_chunk,
    q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d, mask_b, mask_r, mask_n,
    GROUP: tl.constexpr, MASKED: tl.constexpr, IEEE: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Probabilities added over a chunk of the heads: out (B, chunks, R, N)."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    batch, chunk = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = (tl.program_id(0) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = (tl.program_id(0) // row_blocks) * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    kv_heads = heads // GROUP
    seen = _visible(mask + batch * mask_b, mask, row, column, row < rows, n, mask_r, mask_n, 0, MASKED, False)
    mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(chunk * per_chunk, tl.minimum((chunk + 1) * per_chunk, heads)):
        head = at + tl.zeros((), tl.int64)
        queries = _rows(q + batch * q_b + head * q_h, row, rows, 0, 0, q_r, q_d, width, 1, D)
        keys = _keys(k + batch * k_b + (head // GROUP) * k_h, start, n, k_n, k_d, width, BLOCK_N, D)
        own = lse + (batch * kv_heads + head // GROUP) * (rows * GROUP) * SPLITS
        normaliser = _normaliser(own, row * GROUP + (head % GROUP).to(tl.int32), rows * GROUP, SPLITS)
        mean += tl.where(seen, tl.exp2(_logits(queries, keys, scale, IEEE) - normaliser[:, None]), 0.0)
    pointers = out + ((batch * chunks + chunk) * rows + row[:, None]) * n + column[None]
    tl.store(pointers, mean * factor, mask=(row[:, None] < rows) & (column[None] < n))


@triton.jit
def _columns_kernel(
    q, k, mask, query_mask, positions, last, lse, out, scale, rows, n, width, kv_heads, per_split, parts, blocks,
    q_b, q_h, q_r, q_d, k_b, k_h, k_n, k_d, mask_b, mask_n, query_b, query_r, pos_b, pos_r,
    GROUP: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, CAUSAL: tl.constexpr, IEEE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Column sums of the probabilities over one part of the rows of (batch x key head): out (B, Hkv, parts, N)."""
    both, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    batch, kv_head = both // kv_heads, both % kv_heads
    start = tl.program_id(0) * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    keys = _keys(k + batch * k_b + kv_head * k_h, start, n, k_n, k_d, width, BLOCK_N, D)
    q += batch * q_b
    mask += batch * mask_b
    query_mask += batch * query_b
    positions += batch * pos_b
    lse += both * rows * SPLITS

    begin, end = part * per_split, tl.minimum((part + 1) * per_split, rows)
    if CAUSAL:
        # Row blocks before the first one that sees this block of keys are passed over.
        block = tl.arange(0, BLOCKS)
        reach = tl.load(last + batch * blocks + block, mask=block < blocks, other=-1)
        begin = tl.maximum(begin, tl.min(tl.where(reach >= start, block, blocks), 0) * BLOCK_M)
    received = tl.zeros((BLOCK_N,), tl.float32)
    for at in range(begin, end, BLOCK_M):
        row = at + tl.arange(0, BLOCK_M)
        place, in_rows = row // GROUP, row < end
        if COUNTED:
            counted = tl.load(query_mask + place.to(tl.int64) * query_r, mask=in_rows, other=0) != 0
            in_rows = in_rows & counted
        queries = _rows(q, row, rows, kv_head, q_h, q_r, q_d, width, GROUP, D)
        seen = _visible(mask, positions, place, column, in_rows, n, 0, 0, pos_r, 0, CAUSAL)
        normaliser = _normaliser(lse, row, rows, SPLITS)
        weights = tl.exp2(_logits(queries, keys, scale, IEEE) - normaliser[:, None])
        received += tl.sum(tl.where(seen, weights, 0.0), 0)
    if MASKED:
        received = tl.where(tl.load(mask + column.to(tl.int64) * mask_n, mask=column < n, other=0) != 0, received, 0.0)
    tl.store(out + (both * parts + part) * n + column, received, mask=column < n)


def _covered(q: Tensor, k: Tensor) -> bool:
    """Whether these kernels compute it: fp32 or half precision of one kind, something to do, heads that fit a tile."""
    known = q.dtype == k.dtype and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
    shaped = q.dim() == 4 and k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] <= 256
    return known and shaped and q.numel() > 0 and k.numel() > 0 and q.shape[1] % k.shape[1] == 0


def _ieee(q: Tensor) -> bool:
    """fp32 is not rounded to TF32; the interpreter, which takes bf16's bits for integers, multiplies in fp32."""
    return q.dtype == torch.float32 or INTERPRETED


def _floor_power(n: int) -> int:
    return 1 << (max(n, 1).bit_length() - 1)


def _tiles(rows: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and warps: fp32 tiles take twice the shared memory, and 64 rows are what one warp group takes."""
    depth = max(16, next_power(width))
    wide = rows > 64 and dtype != torch.float32 and depth <= 128
    block_m = 128 if wide else min(64, max(16, next_power(rows)))
    block_n = 64 if dtype != torch.float32 and depth <= 128 else 32
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "D": depth, "num_warps": 8 if wide else 4, "num_stages": 3}


def _kind(mask: Tensor | None) -> int:
    if mask is None:
        return 0
    return (SHARED if mask.shape[1] == 1 else BY_ROW).value


def _lse(
    q: Tensor, k: Tensor, scale: float, mask: Tensor, masked: int, positions: Tensor, causal: bool
) -> tuple[Tensor, int]:
    """Log-sum-exp (B, Hkv, R * G, splits) of every row over `splits` parts of the keys."""
    batch, heads, places, width = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    group = heads // kv_heads
    rows = places * group
    tiles = _tiles(rows, width, q.dtype)
    blocks, columns = triton.cdiv(rows, tiles["BLOCK_M"]), triton.cdiv(n, tiles["BLOCK_N"])
    splits = min(16, _floor_power(columns), _floor_power(PROGRAMS // (blocks * batch * kv_heads)))
    per_split = triton.cdiv(columns, splits) * tiles["BLOCK_N"]
    lse = torch.empty(batch, kv_heads, rows, splits, dtype=torch.float32, device=q.device)
    _lse_kernel[(blocks, batch * kv_heads, splits)](
        q, k, mask, positions, lse, scale * LOG2_E, rows, n, width, kv_heads, per_split,
        *q.stride(), *k.stride(), *mask.stride(), *positions.stride(),
        GROUP=group, MASKED=masked, CAUSAL=causal, IEEE=_ieee(q), SPLITS=splits, **tiles,
    )  # fmt: skip
    return lse, splits


def _nothing(q: Tensor, dims: int) -> Tensor:
    """Stands for a mask that is not there: its pointer is never read."""
    return q.new_empty(1).expand(*[1] * dims)


def _mean_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    batch, heads, rows, width = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    on = _nothing(q, 3) if mask is None else mask
    nowhere = _nothing(q, 2)
    lse, splits = _lse(q, k, scale, on, _kind(mask), nowhere, False)
    tiles = _tiles(min(rows, 64), width, q.dtype)
    blocks = triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(n, tiles["BLOCK_N"])
    per_chunk = triton.cdiv(heads, max(1, min(heads, PROGRAMS // (blocks * batch))))
    chunks = triton.cdiv(heads, per_chunk)
    out = torch.empty(batch, chunks, rows, n, dtype=torch.float32, device=q.device)
    _rows_kernel[(blocks, batch, chunks)](
        q, k, on, lse, out, scale * LOG2_E, 1 / heads, rows, n, width, heads, chunks, per_chunk,
        *q.stride(), *k.stride(), *on.stride(),
        GROUP=group, MASKED=_kind(mask), IEEE=_ieee(q), SPLITS=splits, **tiles,
    )  # fmt: skip
    return out[:, 0] if chunks == 1 else out.sum(1)


def _fits(mask: Tensor | None, *shapes: tuple[int, ...]) -> bool:
    return mask is None or (mask.dtype == torch.bool and tuple(mask.shape) in shapes)


@register("attention_rows", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def attention_rows(q: Tensor, k: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """`vtok_kernels.attention_rows` in two launches, or three where the heads are shared out."""
    batch, rows, n = q.shape[0], q.shape[-2], k.shape[-2]
    if not _covered(q, k) or not _fits(mask, (batch, rows, n), (batch, 1, n)):
        return reference("attention_rows")(q, k, scale=scale, mask=mask)
    return _mean_rows(q, k, scale, mask)


@register("value_similarity", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def value_similarity(v: Tensor, row: Tensor, *, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """`vtok_kernels.value_similarity`: one row of attention whose keys are the values."""
    if row.dim() != 3 or not _covered(row[:, :, None], v) or not _fits(mask, (v.shape[0], v.shape[2])):
        return reference("value_similarity")(v, row, scale=scale, mask=mask)
    return _mean_rows(row[:, :, None], v, scale, None if mask is None else mask[:, None])[:, 0]


@register("received_attention", "triton", devices=devices(), priority=priority())
@torch.no_grad()
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
    """`vtok_kernels.received_attention` in linear memory; `block` is the reference's and has no meaning here."""
    batch, n = k.shape[0], k.shape[-2]
    heads, places, width = q.shape[1:] if q.dim() == 4 else (0, 0, 0)
    shaped = _fits(key_mask, (batch, n)) and _fits(query_mask, (batch, places)) and block >= 1
    causal = query_positions is not None
    placed = query_positions is None or tuple(query_positions.shape) == (batch, places)
    if not _covered(q, k) or not shaped or not placed:
        return reference("received_attention")(
            q, k, scale=scale, key_mask=key_mask, query_mask=query_mask, query_positions=query_positions, block=block
        )
    kv_heads = k.shape[1]
    group = heads // kv_heads
    rows = places * group
    keys_on = _nothing(q, 3) if key_mask is None else key_mask[:, None]
    queries_on = _nothing(q, 2) if query_mask is None else query_mask
    positions = _nothing(q, 2) if query_positions is None else query_positions
    lse, splits = _lse(q, k, scale, keys_on, 0 if key_mask is None else SHARED.value, positions, causal)

    # Tiles of queries stream here, twice as large as those of keys: a third stage would not fit 99 KB.
    tiles = _tiles(rows, width, q.dtype) | {"num_stages": 2}
    blocks, columns = triton.cdiv(rows, tiles["BLOCK_M"]), triton.cdiv(n, tiles["BLOCK_N"])
    per_split = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // (columns * batch * kv_heads)))) * tiles["BLOCK_M"]
    parts = triton.cdiv(rows, per_split)
    last = positions
    if causal:
        # The furthest key that any row of a block sees.
        padding = blocks * tiles["BLOCK_M"] - rows
        of_rows = positions.repeat_interleave(group, 1, output_size=rows)
        last = F.pad(of_rows, (0, padding), value=-1).view(batch, blocks, -1).amax(-1)
    out = torch.empty(batch, kv_heads * parts, n, dtype=torch.float32, device=q.device)
    _columns_kernel[(columns, batch * kv_heads, parts)](
        q, k, keys_on, queries_on, positions, last, lse, out, scale * LOG2_E, rows, n, width, kv_heads, per_split,
        parts, blocks, *q.stride(), *k.stride(), keys_on.stride(0), keys_on.stride(2), *queries_on.stride(),
        *positions.stride(), GROUP=group, MASKED=key_mask is not None, COUNTED=query_mask is not None, CAUSAL=causal,
        IEEE=_ieee(q), SPLITS=splits, BLOCKS=next_power(blocks), **tiles,
    )  # fmt: skip
    received = out.sum(1)
    if query_mask is None:
        return received / (heads * places)
    return received / (heads * query_mask.sum(1, keepdim=True)).clamp_min(1)
