"""Merging of several tensors by one plan: an inverse index in one launch, then every sum in one more; no atomics.

Members of a slot are added in ascending order, so repeated runs agree bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._common import check_shape
from ..backend import reference, register
from ..merge import Weights, weights_of
from ._launch import devices, next_power, priority
from ._rows import rows, tile
from .compact import gather


@triton.jit
def _order_kernel(
    dst, dst_batch, dst_row, order, starts, n, n_out,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Stable counting sort by counting: a token stands behind every token of a lower (slot, place).

    n (n + n_out) comparisons, but all at once: at N = 2880 far less than the merge itself moves.
    """
    b = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    is_token = query < n
    slot = tl.load(dst + b * dst_batch + query.to(tl.int64) * dst_row, mask=is_token, other=-1)
    poured = (slot >= 0) & (slot < n_out)
    # (slot, place) as one number; behind the tokens, queries for the first place of every slot and of the end.
    own = tl.where(is_token, slot * n + query, (query - n).to(tl.int64) * n)
    before = tl.zeros([QUERIES], tl.int32)
    for start in range(0, n, KEYS):
        key = start + tl.arange(0, KEYS)
        other = tl.load(dst + b * dst_batch + key.to(tl.int64) * dst_row, mask=key < n, other=-1)
        number = tl.where((other >= 0) & (other < n_out), other * n + key, 9223372036854775807)
        before += tl.sum((number[None, :] < own[:, None]).to(tl.int32), 1)
    tl.store(order + b * n + before, query, mask=poured)
    tl.store(starts + b * (n_out + 1) + query - n, before, mask=(query >= n) & (query <= n + n_out))


@triton.jit
def _merge_kernel(
    xs, x_batch, x_row, x_inner, x_outer_stride, x_inner_stride,
    ys, y_batch, y_row, y_inner, y_outer_stride, y_inner_stride,
    widths, weights, weight_batch, weight_row, totals, order, starts, n, n_out,
    TENSORS: tl.constexpr, MEANS: tl.constexpr, WEIGHTED: tl.constexpr, SAVE: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < n_out
    first = tl.load(starts + b * (n_out + 1) + row, mask=inside, other=0)
    count = tl.load(starts + b * (n_out + 1) + row + 1, mask=inside, other=0) - first
    members = order + b * n + first
    most = tl.max(count, 0)
    for t in tl.static_range(TENSORS):
        kind = xs[t].dtype.element_ty
        if kind == tl.float64:
            sum_type = tl.float64
        elif kind.is_floating():
            sum_type = tl.float32
        else:
            sum_type = tl.int64
        if t < MEANS:
            total = tl.zeros([ROWS], sum_type)
            if (WEIGHTED >> t) & 1:
                for m in range(0, most):
                    there = m < count
                    token = tl.load(members + m, mask=there, other=0).to(tl.int64)
                    at = weights[t] + b * weight_batch[t] + token * weight_row[t]
                    total += tl.load(at, mask=there, other=0).to(sum_type)
            # Without weights, or where all weights of a slot vanish, the mean is the plain one.
            plain = tl.where(total > 0, 0.0, 1.0).to(sum_type)
            divisor = tl.where(total > 0, total, tl.maximum(count, 1).to(sum_type))
            if SAVE:
                tl.store(totals + (t * tl.num_programs(1) + b) * n_out + row, total, mask=inside)
        for start in range(0, widths[t], CHANNELS):
            channel = (start + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
            real = channel < widths[t]
            at = (channel // x_inner[t]) * x_outer_stride[t] + (channel % x_inner[t]) * x_inner_stride[t]
            sums = tl.zeros([ROWS, CHANNELS], sum_type)
            for m in range(0, most):
                there = m < count
                token = tl.load(members + m, mask=there, other=0).to(tl.int64)
                x = xs[t] + b * x_batch[t] + token[:, None] * x_row[t] + at
                value = tl.load(x, mask=there[:, None] & real, other=0).to(sum_type)
                if t < MEANS:
                    share = plain
                    if (WEIGHTED >> t) & 1:
                        own = tl.load(weights[t] + b * weight_batch[t] + token * weight_row[t], mask=there, other=0).to(
                            sum_type
                        )
                        share = tl.where(total > 0, own, plain)
                    # Divided before the product, so that tiny weights neither vanish nor overflow.
                    value *= (share / divisor)[:, None]
                sums += value
            to = (channel // y_inner[t]) * y_outer_stride[t] + (channel % y_inner[t]) * y_inner_stride[t]
            tl.store(ys[t] + b * y_batch[t] + row[:, None] * y_row[t] + to, sums.to(kind), mask=inside[:, None] & real)


@triton.jit
def _mean_backward_kernel(
    gs, g_batch, g_row, g_inner, g_outer_stride, g_inner_stride,
    xs, x_batch, x_row, x_inner, x_outer_stride, x_inner_stride,
    ys, y_batch, y_row, y_inner, y_outer_stride, y_inner_stride,
    dxs, dx_batch, dx_row, dx_inner, dx_outer_stride, dx_inner_stride,
    widths, weights, weight_batch, weight_row, dws, totals, starts, dst, dst_batch, dst_row, n, n_out,
    MEANS: tl.constexpr, WEIGHTED: tl.constexpr, LEARNED: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of y = sum_i (w_i / W) x_i: dx_i = (w_i / W) g, and dw_i = g . (x_i - y) / W."""
    b = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < n
    slot = tl.load(dst + b * dst_batch + row * dst_row, mask=inside, other=-1)
    poured = (slot >= 0) & (slot < n_out)
    first = tl.load(starts + b * (n_out + 1) + slot, mask=poured, other=0)
    count = tl.load(starts + b * (n_out + 1) + slot + 1, mask=poured, other=1) - first
    for t in tl.static_range(MEANS):
        kind = xs[t].dtype.element_ty
        if kind == tl.float64:
            sum_type = tl.float64
        else:
            sum_type = tl.float32
        at_total = totals + (t * tl.num_programs(1) + b) * n_out + slot
        total = tl.load(at_total, mask=poured, other=0).to(sum_type)
        share = 1.0 / tl.maximum(count, 1).to(sum_type)
        if (WEIGHTED >> t) & 1:
            weight = tl.load(weights[t] + b * weight_batch[t] + row * weight_row[t], mask=inside, other=0).to(sum_type)
            share = tl.where(total > 0, weight / tl.where(total > 0, total, 1), share)
        slope = tl.zeros([ROWS], sum_type)
        for start in range(0, widths[t], CHANNELS):
            channel = (start + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
            real = channel < widths[t]
            at = (channel // g_inner[t]) * g_outer_stride[t] + (channel % g_inner[t]) * g_inner_stride[t]
            g = tl.load(gs[t] + b * g_batch[t] + slot[:, None] * g_row[t] + at, mask=poured[:, None] & real, other=0)
            g = g.to(sum_type)
            if (LEARNED >> t) & 1:
                at = (channel // x_inner[t]) * x_outer_stride[t] + (channel % x_inner[t]) * x_inner_stride[t]
                x = tl.load(xs[t] + b * x_batch[t] + row[:, None] * x_row[t] + at, mask=poured[:, None] & real, other=0)
                at = (channel // y_inner[t]) * y_outer_stride[t] + (channel % y_inner[t]) * y_inner_stride[t]
                y = tl.load(
                    ys[t] + b * y_batch[t] + slot[:, None] * y_row[t] + at, mask=poured[:, None] & real, other=0
                )
                slope += tl.sum(g * (x.to(sum_type) - y.to(sum_type)), 1)
            to = (channel // dx_inner[t]) * dx_outer_stride[t] + (channel % dx_inner[t]) * dx_inner_stride[t]
            dx = tl.where(poured[:, None], share[:, None] * g, 0.0)
            tl.store(dxs[t] + b * dx_batch[t] + row[:, None] * dx_row[t] + to, dx.to(kind), mask=inside[:, None] & real)
        if (LEARNED >> t) & 1:
            dw = tl.where(total > 0, slope / tl.where(total > 0, total, 1), 0.0)
            tl.store(dws[t] + b * n + row, dw.to(dws[t].dtype.element_ty), mask=inside)


def _inverse(dst: Tensor, n_out: int) -> tuple[Tensor, Tensor]:
    """order (B, N): tokens by slot, ascending within one; starts (B, n_out + 1): where each slot's begin in it."""
    batch, n = dst.shape
    order = torch.empty((batch, n), dtype=torch.int32, device=dst.device)
    starts = torch.empty((batch, n_out + 1), dtype=torch.int32, device=dst.device)
    queries = 32
    grid = (triton.cdiv(n + n_out + 1, queries), batch)
    keys = min(128, next_power(n))
    _order_kernel[grid](dst, *dst.stride(), order, starts, n, n_out, QUERIES=queries, KEYS=keys)
    return order, starts


def _strides(weights: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> tuple[tuple, tuple, tuple, int]:
    """Weights (B, N) as the kernels take them: pointers (any where there is none), strides, and bits that tell."""
    at = tuple(x if w is None else w for x, w in zip(tensors, weights, strict=False))
    batch = tuple(0 if w is None else w.stride(0) for w in weights)
    row = tuple(0 if w is None else w.stride(1) for w in weights)
    return at, batch, row, sum(1 << t for t, w in enumerate(weights) if w is not None)


def pour(
    dst: Tensor,
    n_out: int,
    means: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    sums: Sequence[Tensor],
    save: bool = False,
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Means, then sums (B, n_out, ...), of tensors (B, N, ...). No gradient; what backward needs where `save`."""
    tensors = [x.detach() for x in (*means, *sums)]
    batch, n = dst.shape
    out = [torch.empty((batch, n_out, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in tensors]
    filled = [t for t, y in enumerate(out) if y.numel()]
    totals = starts = None
    if save:
        kind = torch.float64 if any(x.dtype == torch.float64 for x in means) else torch.float32
        totals = torch.empty((len(means), batch, n_out), dtype=kind, device=dst.device)
    if n == 0:
        return [y.zero_() for y in out], totals, dst.new_zeros(batch, n_out + 1, dtype=torch.int32)
    if filled:
        order, starts = _inverse(dst, n_out)
        x = rows([tensors[t] for t in filled])
        y = rows([out[t] for t in filled])
        own = [weights[t] for t in filled if t < len(means)]
        at, weight_batch, weight_row, weighted = _strides(own, x.tensors)
        per_program, channels, warps = tile(x.widths)
        _merge_kernel[(triton.cdiv(n_out, per_program), batch)](
            x.tensors, *x.strides, y.tensors, *y.strides,
            x.widths, at or x.tensors[:1], weight_batch or (0,), weight_row or (0,),
            order if totals is None else totals, order, starts, n, n_out,
            TENSORS=len(filled), MEANS=len(own), WEIGHTED=weighted, SAVE=save,
            ROWS=per_program, CHANNELS=channels, num_warps=warps,
        )  # fmt: skip
    return out, totals, starts


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dst: Tensor, n_out: int, count: int, *given: Any) -> tuple[Tensor, ...]:
        """given: `count` means, their weights, the sums."""
        means, weights, sums = given[:count], given[count : 2 * count], given[2 * count :]
        found, totals, starts = pour(dst, n_out, means, weights, sums, save=True)
        ctx.save_for_backward(dst, totals, starts, *means, *weights, *found[:count])
        ctx.n_out, ctx.count = n_out, count
        ctx.mark_non_differentiable(*(y for y in found if not y.is_floating_point()))
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count, needs = ctx.count, ctx.needs_input_grad[3:]
        dst, totals, starts, *saved = ctx.saved_tensors
        means, weights, averaged = saved[:count], saved[count : 2 * count], saved[2 * count :]
        d_means: list[Tensor | None] = [None] * count
        d_weights: list[Tensor | None] = [None] * count
        if any(needs[: 2 * count]):
            d_means, d_weights = _mean_backward(
                dst, starts, totals, gradients[:count], means, weights, averaged, needs[count : 2 * count]
            )
        taken = [t for t in range(len(needs) - 2 * count) if needs[2 * count + t]]
        d_sums: list[Tensor | None] = [None] * (len(needs) - 2 * count)
        if taken:
            slots = torch.where(dst < ctx.n_out, dst, -1)
            for t, gradient in zip(taken, gather([gradients[count + t] for t in taken], slots), strict=True):
                d_sums[t] = gradient
        return None, None, None, *d_means, *d_weights, *d_sums


def _mean_backward(
    dst: Tensor, starts: Tensor, totals: Tensor, gradients: Sequence[Tensor], means: Sequence[Tensor],
    weights: Sequence[Tensor | None], averaged: Sequence[Tensor], learned: Sequence[bool],
) -> tuple[list, list]:  # fmt: skip
    batch, n = dst.shape
    d_means = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in means]
    d_weights = [
        torch.empty((batch, n), dtype=w.dtype, device=w.device) if w is not None and need else None
        for w, need in zip(weights, learned, strict=True)
    ]
    g, x, y, dx = rows(gradients), rows([m.detach() for m in means]), rows(averaged), rows(d_means)
    at, weight_batch, weight_row, weighted = _strides(weights, means)
    to = tuple(m if d is None else d for d, m in zip(d_weights, d_means, strict=True))
    per_program, channels, warps = tile(x.widths)
    _mean_backward_kernel[(triton.cdiv(n, per_program), batch)](
        g.tensors, *g.strides, x.tensors, *x.strides, y.tensors, *y.strides, dx.tensors, *dx.strides,
        x.widths, at, weight_batch, weight_row, to, totals, starts, dst, *dst.stride(), n, totals.shape[2],
        MEANS=len(means), WEIGHTED=weighted, LEARNED=sum(1 << t for t, d in enumerate(d_weights) if d is not None),
        ROWS=per_program, CHANNELS=channels, num_warps=warps,
    )  # fmt: skip
    return d_means, d_weights


def _fits(dst: Tensor, n_out: int, tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels cover the call; the rest, errors included, is the reference's."""
    shapes = all(x.shape[:2] == dst.shape and x.numel() for x in tensors)
    kinds = all(x.dtype != torch.bool and not x.is_complex() and x.device == dst.device for x in tensors)
    return bool(tensors) and shapes and kinds and n_out > 0 and dst.shape[0] < 65536


@register("merge_tokens", "triton", devices=devices(), priority=priority())
def merge_tokens(
    dst: Tensor, n_out: int, means: Sequence[Tensor], sums: Sequence[Tensor] = (), weights: Weights = None
) -> tuple[list[Tensor], list[Tensor]]:
    given = weights_of(means, weights)
    together = [*means, *sums]
    if not _fits(dst, n_out, together) or not all(x.is_floating_point() for x in means):
        return reference("merge_tokens")(dst, n_out, means, sums, weights)
    each: list[Tensor | None] = []
    for weight in given:
        if weight is not None:
            check_shape("weights", weight, tuple(dst.shape), (*dst.shape, 1))
            weight = weight.reshape(dst.shape)
        each.append(weight)
    wanted = [x for x in (*together, *each) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in wanted):
        found = list(_Merge.apply(dst, n_out, len(means), *means, *each, *sums))
    else:
        found = pour(dst, n_out, means, [w if w is None else w.detach() for w in each], sums)[0]
    return found[: len(means)], found[len(means) :]


@register("merge_sum", "triton", devices=devices(), priority=priority())
def merge_sum(x: Tensor, dst: Tensor, n_out: int) -> Tensor:
    if not _fits(dst, n_out, [x]):
        return reference("merge_sum")(x, dst, n_out)
    return merge_tokens(dst, n_out, [], [x])[1][0]


@register("merge_mean", "triton", devices=devices(), priority=priority())
def merge_mean(x: Tensor, dst: Tensor, n_out: int, weights: Tensor | None = None) -> Tensor:
    if not _fits(dst, n_out, [x]) or not x.is_floating_point():
        return reference("merge_mean")(x, dst, n_out, weights)
    return merge_tokens(dst, n_out, [x], [], [weights])[0][0]
