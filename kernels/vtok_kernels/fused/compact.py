"""Gathering tokens of several tensors in one launch, differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import reference, register
from ..compact import check_compact
from ._launch import devices, priority
from ._rows import rows, tile, writable

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _gather_kernel(
    xs, x_batch, x_row, x_inner, x_outer_stride, x_inner_stride,
    ys, y_batch, y_row, y_inner, y_outer_stride, y_inner_stride,
    widths, index, index_batch, index_row, n, k,
    TENSORS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < k
    source = tl.load(index + b * index_batch + row * index_row, mask=inside, other=-1)
    there = (source >= 0) & (source < n)
    for t in tl.static_range(TENSORS):
        x = xs[t] + b * x_batch[t] + source[:, None] * x_row[t]
        y = ys[t] + b * y_batch[t] + row[:, None] * y_row[t]
        for start in range(0, widths[t], CHANNELS):
            channel = (start + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]
            real = channel < widths[t]
            at = (channel // x_inner[t]) * x_outer_stride[t] + (channel % x_inner[t]) * x_inner_stride[t]
            value = tl.load(x + at, mask=there[:, None] & real, other=0)
            to = (channel // y_inner[t]) * y_outer_stride[t] + (channel % y_inner[t]) * y_inner_stride[t]
            tl.store(y + to, value, mask=inside[:, None] & real)


def gather(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Rows of each of `tensors` (B, N, ...) at index (B, K); zeros where the index is not in [0, N). No gradient."""
    if out is None:
        out = [torch.empty((*index.shape, *x.shape[2:]), dtype=x.dtype, device=x.device) for x in tensors]
    lengths: dict[int, list[int]] = {}
    for t, y in enumerate(out):
        if y.numel():
            lengths.setdefault(tensors[t].shape[1], []).append(t)
    for n, chosen in lengths.items():
        # Bits are moved, whatever they stand for: one kernel for bool, half precision and indices.
        bits = [_BITS[tensors[t].element_size()] for t in chosen]
        source = rows([tensors[t].detach().view(kind) for t, kind in zip(chosen, bits, strict=True)])
        target = rows([out[t].detach().view(kind) for t, kind in zip(chosen, bits, strict=True)])
        per_program, channels, warps = tile(source.widths)
        grid = (triton.cdiv(index.shape[1], per_program), index.shape[0])
        _gather_kernel[grid](
            source.tensors, *source.strides, target.tensors, *target.strides, source.widths,
            index, *index.stride(), n, index.shape[1],
            TENSORS=len(chosen), ROWS=per_program, CHANNELS=channels, num_warps=warps,
        )  # fmt: skip
    return list(out)


class _Gather(torch.autograd.Function):
    """Backward of a gather is a sum over the places that took a token: `merge.pour` with the index as slots."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(index)
        ctx.lengths = [x.shape[1] for x in tensors]
        found = gather(tensors, index)
        ctx.mark_non_differentiable(*(y for y in found if not y.is_floating_point()))
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        from .merge import pour

        (index,) = ctx.saved_tensors
        found: list[Tensor | None] = [None] * len(gradients)
        for n in set(ctx.lengths):
            own = {t: g for t, g in enumerate(gradients) if g is not None and ctx.lengths[t] == n}
            own = {t: g for t, g in own.items() if ctx.needs_input_grad[t + 1]}
            found_here = pour(index, n, [], [], list(own.values()))[0]
            for t, gradient in zip(own, found_here, strict=True):
                found[t] = gradient
        return None, *found


def _fits(tensors: Sequence[Tensor], index: Tensor) -> bool:
    """Whether the kernel covers the call: real dtypes, indices, one device, a batch that a grid takes."""
    kinds = all(not x.is_complex() and x.element_size() in _BITS and x.device == index.device for x in tensors)
    return kinds and index.dtype == torch.long and index.shape[0] < 65536


@register("compact", "triton", devices=devices(), priority=priority())
def compact(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    whole = check_compact(tensors, index, out)
    if not whole:
        return []
    # Programs write while others read, so what is compacted in its own memory goes by a copy.
    storages = {x.untyped_storage().data_ptr() for x in whole}
    overlap = out is not None and any(y.untyped_storage().data_ptr() in storages for y in out)
    if overlap or not _fits(whole, index) or (out is not None and not writable(out)):
        return reference("compact")(tensors, index, out)
    if out is not None:
        return gather(whole, index, out)
    if torch.is_grad_enabled() and any(x.requires_grad for x in whole):
        return list(_Gather.apply(index, *whole))
    return gather(whole, index)


@register("gather_tokens", "triton", devices=devices(), priority=priority())
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    if x.dim() < 2 or index.dim() != 2 or x.shape[0] != index.shape[0] or not _fits([x], index):
        return reference("gather_tokens")(x, index)
    return compact([x], index)[0]
