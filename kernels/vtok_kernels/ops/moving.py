"""Rows at indices, there and back: differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import score_dtype
from ..backend import get, trace
from ._define import along, define, pick_rows


def _gather_backward(grad: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of a gather from (B or 1, N, ...); rows gathered more than once add up, in fp32."""
    wide = grad.to(score_dtype(grad))
    total = wide.new_zeros(grad.shape[0], *shape[1:]).scatter_add(1, along(index, wide), wide)
    return (total if shape[0] == grad.shape[0] else total.sum(0, keepdim=True)).to(grad.dtype)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, *x.shape[2:]))


def _set_gather(ctx: Any, inputs: tuple, output: Any) -> None:
    x, index = inputs
    ctx.shape = tuple(x.shape)
    ctx.save_for_backward(index)


_gather_tokens = define("gather_tokens", "(Tensor x, Tensor index) -> Tensor", _gathered)
_gather_tokens.register_autograd(  # type: ignore[attr-defined]
    lambda ctx, grad: (_gather_backward(grad, ctx.saved_tensors[0], ctx.shape), None), setup_context=_set_gather
)
trace("gather_tokens", _gather_tokens)


def _set_compact(ctx: Any, inputs: tuple, output: Any) -> None:
    tensors, index = inputs
    ctx.shapes = [tuple(x.shape) for x in tensors]
    ctx.floating = [x.is_floating_point() for x in tensors]
    ctx.save_for_backward(index)


def _compact_backward(ctx: Any, grads: list[Tensor | None]) -> tuple:
    (index,) = ctx.saved_tensors
    found = [
        _gather_backward(grad, index, shape) if floating and grad is not None else None
        for grad, shape, floating in zip(grads, ctx.shapes, ctx.floating, strict=True)
    ]
    return found, None


_compact = define(
    "compact",
    "(Tensor[] tensors, Tensor index) -> Tensor[]",
    lambda tensors, index: [_gathered(x, index) for x in tensors],
)
_compact.register_autograd(_compact_backward, setup_context=_set_compact)  # type: ignore[attr-defined]


def _run_compact_into(tensors: list[Tensor], index: Tensor, out: list[Tensor]) -> None:
    get("compact", index.device)(tensors, index, out)


_compact_into = torch.library.custom_op(
    "vtok::compact_into",
    _run_compact_into,
    mutates_args=("out",),
    schema="(Tensor[] tensors, Tensor index, Tensor(a!)[] out) -> ()",
)
_compact_into.register_fake(lambda tensors, index, out: None)


def _trace_compact(tensors: Sequence[Tensor], index: Tensor, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    if out is None:
        return _compact(list(tensors), index)
    _compact_into([x.detach() for x in tensors], index, list(out))
    return list(out)


trace("compact", _trace_compact)


def _set_scatter(ctx: Any, inputs: tuple, output: Any) -> None:
    _, index, _, mask = inputs
    ctx.save_for_backward(index, torch.ones_like(index, dtype=torch.bool) if mask is None else mask)


_scatter_tokens = define(
    "scatter_tokens",
    "(Tensor x, Tensor index, int n, Tensor? mask=None) -> Tensor",
    lambda x, index, n, mask=None: x.new_empty((x.shape[0], n, *x.shape[2:])),
)
_scatter_tokens.register_autograd(  # type: ignore[attr-defined]
    lambda ctx, grad: (pick_rows(grad, *ctx.saved_tensors), None, None, None), setup_context=_set_scatter
)
trace("scatter_tokens", _scatter_tokens)
