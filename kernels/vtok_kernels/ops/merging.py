"""Sums and means over output slots: differentiable."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._common import score_dtype
from ..backend import get, trace
from ..merge import Weights, weights_of
from ._define import define, pick_rows


def _poured(x: Tensor, n_out: int) -> Tensor:
    return x.new_empty((x.shape[0], n_out, *x.shape[2:]))


def _sum_backward(grad: Tensor, dst: Tensor) -> Tensor:
    return pick_rows(grad, dst, dst >= 0)


def _mean_backward(
    grad: Tensor, x: Tensor, dst: Tensor, n_out: int, weights: Tensor | None, merged: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Of y = sum of share x with share = w / W: dx = share g, dw = g (x - y) / W; the plain mean where W vanishes."""
    dtype = score_dtype(x)
    slots = torch.where(dst < 0, n_out, dst)

    def total(weight: Tensor) -> Tensor:
        return weight.new_zeros(dst.shape[0], n_out + 1).scatter_add(1, slots, weight).gather(1, slots)

    ones = torch.ones_like(dst, dtype=dtype)
    share, on = 1 / total(ones), dst >= 0
    spread = pick_rows(grad, dst, on).to(dtype)
    grad_weights = None
    if weights is not None:
        weight = weights.reshape(dst.shape).to(dtype)
        mass = total(weight)
        share = torch.where(mass > 0, weight / mass.where(mass > 0, 1.0), share)
        if weights.is_floating_point():
            moved = spread * (x.to(dtype) - pick_rows(merged, dst, on).to(dtype))
            slope = moved.reshape(*dst.shape, -1).sum(-1) / mass.where(mass > 0, 1.0)
            grad_weights = torch.where(mass > 0, slope, 0).to(weights.dtype).reshape(weights.shape)
    grad_x = share.reshape(*share.shape, *[1] * (x.dim() - 2)) * spread
    return grad_x.to(x.dtype), grad_weights


def _set_sum(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


_merge_sum = define("merge_sum", "(Tensor x, Tensor dst, int n_out) -> Tensor", lambda x, dst, n_out: _poured(x, n_out))
_merge_sum.register_autograd(  # type: ignore[attr-defined]
    lambda ctx, grad: (_sum_backward(grad, *ctx.saved_tensors), None, None), setup_context=_set_sum
)
trace("merge_sum", _merge_sum)


def _set_mean(ctx: Any, inputs: tuple, output: Any) -> None:
    x, dst, ctx.n_out, weights = inputs
    ctx.save_for_backward(x, dst, weights, output)


def _merge_mean_backward(ctx: Any, grad: Tensor) -> tuple:
    x, dst, weights, merged = ctx.saved_tensors
    grad_x, grad_weights = _mean_backward(grad, x, dst, ctx.n_out, weights, merged)
    return grad_x, None, None, grad_weights


_merge_mean = define(
    "merge_mean",
    "(Tensor x, Tensor dst, int n_out, Tensor? weights=None) -> Tensor",
    lambda x, dst, n_out, weights=None: _poured(x, n_out),
)
_merge_mean.register_autograd(_merge_mean_backward, setup_context=_set_mean)  # type: ignore[attr-defined]
trace("merge_mean", _merge_mean)


def _weights(weights: Sequence[Tensor], which: Sequence[int]) -> list[Tensor | None]:
    """The weights of each mean: a schema's list has no gaps where it has gradients."""
    return [None if number < 0 else weights[number] for number in which]


def _run_merge_tokens(
    dst: Tensor, n_out: int, means: list[Tensor], sums: list[Tensor], weights: list[Tensor], which: list[int]
) -> list[Tensor]:
    averaged, summed = get("merge_tokens", dst.device)(dst, n_out, means, sums, _weights(weights, which))
    return [*averaged, *summed]


def _set_merge_tokens(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    dst, ctx.n_out, means, _, weights, ctx.which = inputs
    ctx.counts = len(means), len(weights)
    ctx.save_for_backward(dst, *means, *weights, *output[: len(means)])


def _merge_tokens_backward(ctx: Any, grads: list[Tensor]) -> tuple:
    dst, *rest = ctx.saved_tensors
    n_means, n_weights = ctx.counts
    means, weights, merged = rest[:n_means], rest[n_means : n_means + n_weights], rest[n_means + n_weights :]
    of_means: list[Tensor | None] = []
    of_weights: list[Tensor | None] = [None] * n_weights
    for grad, x, y, number in zip(grads[:n_means], means, merged, ctx.which, strict=True):
        weight = None if number < 0 else weights[number]
        grad_x, grad_weight = _mean_backward(grad, x, dst, ctx.n_out, weight, y)
        of_means.append(grad_x)
        if number >= 0:
            of_weights[number] = grad_weight
    of_sums = [_sum_backward(grad, dst) if grad.is_floating_point() else None for grad in grads[n_means:]]
    return None, None, of_means, of_sums, of_weights, None


_merge_tokens = define(
    "merge_tokens",
    "(Tensor dst, int n_out, Tensor[] means, Tensor[] sums, Tensor[] weights, int[] which) -> Tensor[]",
    lambda dst, n_out, means, sums, weights, which: [_poured(x, n_out) for x in (*means, *sums)],
    _run_merge_tokens,
)
_merge_tokens.register_autograd(  # type: ignore[attr-defined]
    _merge_tokens_backward, setup_context=_set_merge_tokens
)


def _trace_merge_tokens(
    dst: Tensor, n_out: int, means: Sequence[Tensor], sums: Sequence[Tensor] = (), weights: Weights = None
) -> tuple[list[Tensor], list[Tensor]]:
    present: list[Tensor] = []
    which: list[int] = []
    for weight in weights_of(means, weights):
        which.append(-1 if weight is None else len(present))
        if weight is not None:
            present.append(weight)
    found = _merge_tokens(dst, n_out, list(means), list(sums), present, which)
    return found[: len(means)], found[len(means) :]


trace("merge_tokens", _trace_merge_tokens)
