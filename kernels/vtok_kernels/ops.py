"""The operators as custom operators of torch (`torch.ops.vtok`): one node of a graph each, for compile and export.

While torch.compile or torch.export look on, a public operator becomes such a node, which chooses the implementation
by device when it runs. Under ``use("reference")`` or VTOK_KERNELS=reference plain torch is traced instead: what a
target without these operators needs, ONNX for example. Called eagerly, operators do not pass through here.

Statistics and choices take no gradient. What moves and merges tokens is differentiable: its derivatives are written
out below. `packed_attention` is traced as plain torch, gradients included.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import attention, compact, greedy, match, merge, packed, select, transition  # noqa: F401 - they come first
from ._common import score_dtype
from .backend import get, reference, trace
from .merge import MergePlan, Weights, weights_of

Operator = Callable[..., Any]


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, list | tuple):
        return next((found for part in value if (found := _first_tensor(part)) is not None), None)
    return value if isinstance(value, Tensor) else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _own(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Contiguous outputs that share memory neither with inputs nor among each other: a custom operator's promise."""
    taken = {x.untyped_storage().data_ptr() for x in inputs} - {0}
    owned = []
    for x in outputs:
        x = x.contiguous()
        if x.untyped_storage().data_ptr() in taken:
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        owned.append(x)
    return owned


def _define(name: str, schema: str, fake: Operator, run: Operator | None = None) -> Operator:
    """`vtok::name`: `run` (default: the operator of that name) on real tensors, `fake` for shapes and dtypes alone."""

    def call(*args: Any) -> Any:
        first = _first_tensor(args)
        function = run or get(name, None if first is None else first.device)
        found = function(*args)
        owned = _own(_tensors(found), _tensors(args))
        return owned[0] if isinstance(found, Tensor) else (owned if isinstance(found, list) else tuple(owned))

    defined = torch.library.custom_op(f"vtok::{name}", call, mutates_args=(), schema=schema)
    defined.register_fake(fake)
    return defined


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _without_gradient(op: Operator) -> Operator:
    """`op` of detached tensors: no_grad would stay on if the operator raised inside a graph."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*map(_detached, args), **{name: _detached(value) for name, value in kwargs.items()})

    return call


def _scores(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=score_dtype(x))


def _index(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.long)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and choices: the reference's arguments in its order, no gradient.


def _with_keywords(name: str) -> Operator:
    """The operator called by position, as schemas are: their tensors cannot be keywords, and defaults are left out."""
    parameters = inspect.signature(reference(name)).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = len(parameters) - len(keywords)

    def run(*args: Any) -> Any:
        first = _first_tensor(args)
        function = get(name, None if first is None else first.device)
        return function(*args[:positional], **dict(zip(keywords, args[positional:], strict=False)))

    return run


def _pair_shape(n: int) -> tuple[int, int]:
    return (n + 1) // 2, n // 2


STATISTICS: dict[str, tuple[str, Operator]] = {
    "attention_rows": (
        "(Tensor q, Tensor k, float scale, Tensor? mask=None) -> Tensor",
        lambda q, k, scale, mask=None: _scores(q, q.shape[0], q.shape[2], k.shape[2]),
    ),
    "received_attention": (
        "(Tensor q, Tensor k, float scale, Tensor? key_mask=None, Tensor? query_mask=None, "
        "Tensor? query_positions=None, int block=256) -> Tensor",
        lambda q, k, *rest, **named: _scores(q, k.shape[0], k.shape[2]),
    ),
    "value_similarity": (
        "(Tensor v, Tensor row, float scale=1.0, Tensor? mask=None) -> Tensor",
        lambda v, row, scale=1.0, mask=None: _scores(row, v.shape[0], v.shape[2]),
    ),
    "transition": (
        "(Tensor x, Tensor y, Tensor? mask=None) -> (Tensor, Tensor)",
        lambda x, y, mask=None: (_scores(x, *x.shape[:2]), _scores(x, *x.shape[:2])),
    ),
    "topk": (
        "(Tensor scores, int k) -> Tensor",
        lambda scores, k: _index(scores, scores.shape[0], k),
    ),
    "keep_mask": (
        "(Tensor indices, int n) -> Tensor",
        lambda indices, n: indices.new_empty((indices.shape[0], n), dtype=torch.bool),
    ),
    "left_compact": (
        "(Tensor keep, int k) -> (Tensor, Tensor)",
        lambda keep, k: (_index(keep, keep.shape[0], k), keep.new_empty((keep.shape[0], k))),
    ),
    "farthest_first": (
        "(Tensor x, int k, Tensor? weights=None, Tensor? first=None, bool sort=True) -> Tensor",
        lambda x, k, weights=None, first=None, sort=True: _index(x, x.shape[0], k),
    ),
    "max_sum": (
        '(Tensor x, int k, Tensor pivot, str objective="sum", bool sort=True) -> Tensor',
        lambda x, k, pivot, objective="sum", sort=True: _index(x, x.shape[0], k),
    ),
    "dpp_map": (
        "(Tensor x, int k, Tensor? relevance=None, bool sort=True) -> Tensor",
        lambda x, k, relevance=None, sort=True: _index(x, x.shape[0], k),
    ),
    "cosine_scores": (
        "(Tensor x) -> Tensor",
        lambda x: _scores(x, x.shape[0], *_pair_shape(x.shape[1])),
    ),
    "mctf_scores": (
        "(Tensor x, Tensor attention_received, Tensor sizes, float[] tau=[1.0, 20.0, 40.0]) -> Tensor",
        lambda x, attention_received, sizes, tau=(): _scores(x, x.shape[0], *_pair_shape(x.shape[1])),
    ),
    "strided_merge": (
        "(Tensor metric, int c) -> (Tensor, Tensor)",
        lambda metric, c: (_index(metric, min(c, metric.shape[1])), _index(metric, *metric.shape[:2])),
    ),
}

for _name, (_schema, _fake) in STATISTICS.items():
    trace(_name, _without_gradient(_define(_name, _schema, _fake, _with_keywords(_name))))


# ---------------------------------------------------------------------------------------------------------------------
# Matching: plans travel as their two tensors; a mask of protected places decides the length when it runs.


def _fake_plan(x: Tensor, n: int, r: int, mask: Tensor | None, first: int, two_way: bool) -> tuple[Tensor, Tensor]:
    n_out: Any
    if mask is None:
        n_out = n - min(r, match.merge_limit(n, first, two_way=two_way))
    else:
        n_out = torch.library.get_ctx().new_dynamic_size()
    return _index(x, x.shape[0], n), _index(x, x.shape[0], n_out)


def _plan_tensors(plan: MergePlan) -> tuple[Tensor, Tensor]:
    assert plan.representative is not None
    return plan.dst, plan.representative


def _run_bipartite(scores: Tensor, r: int, mask: Tensor | None, first: int, two_way: bool) -> tuple[Tensor, Tensor]:
    protected = first if mask is None else mask
    return _plan_tensors(get("bipartite_match", scores.device)(scores, r, protected=protected, two_way=two_way))


def _run_match(
    metric: Tensor, r: int, mask: Tensor | None, first: int, two_way: bool, bias: Tensor | None, temperature: Any
) -> tuple[Tensor, Tensor]:
    protected = first if mask is None else mask
    function = get("match_tokens", metric.device)
    found = function(metric, r, protected=protected, two_way=two_way, bias=bias, temperature=temperature)
    return _plan_tensors(found)


_bipartite_match = _define(
    "bipartite_match",
    "(Tensor scores, int r, Tensor? mask, int first, bool two_way) -> (Tensor, Tensor)",
    lambda scores, r, mask, first, two_way: _fake_plan(
        scores, scores.shape[1] + scores.shape[2], r, mask, first, two_way
    ),
    _run_bipartite,
)
_match_tokens = _define(
    "match_tokens",
    "(Tensor metric, int r, Tensor? mask, int first, bool two_way, Tensor? bias, float? temperature) "
    "-> (Tensor, Tensor)",
    lambda metric, r, mask, first, two_way, bias, temperature: _fake_plan(
        metric, metric.shape[1], r, mask, first, two_way
    ),
    _run_match,
)


def _split(protected: Tensor | int | None) -> tuple[Tensor | None, int]:
    return (protected, 0) if isinstance(protected, Tensor) else (None, protected or 0)


def _trace_bipartite(
    scores: Tensor, r: int, *, protected: Tensor | int | None = None, two_way: bool = False
) -> MergePlan:
    dst, representative = _bipartite_match(scores.detach(), r, *_split(protected), two_way)
    return MergePlan(dst, representative.shape[1], representative)


def _trace_match(
    metric: Tensor,
    r: int,
    *,
    protected: Tensor | int | None = None,
    two_way: bool = False,
    bias: Tensor | None = None,
    temperature: float | None = None,
) -> MergePlan:
    bias = _detached(bias)
    dst, representative = _match_tokens(metric.detach(), r, *_split(protected), two_way, bias, temperature)
    return MergePlan(dst, representative.shape[1], representative)


trace("bipartite_match", _trace_bipartite)
trace("match_tokens", _trace_match)


# ---------------------------------------------------------------------------------------------------------------------
# Moving and merging: differentiable.


def _along(index: Tensor, x: Tensor) -> Tensor:
    """index (B, K) -> (B, K, ...), expanded over the trailing axes of x."""
    return index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])


def _pick(x: Tensor, index: Tensor, on: Tensor) -> Tensor:
    """Rows of x (B, N, ...) at index (B, K) where `on`, else zero."""
    rows = x.gather(1, _along(torch.where(on, index, 0), x))
    return torch.where(on.reshape(*on.shape, *[1] * (x.dim() - 2)), rows, 0)


def _gather_backward(grad: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Gradient of a gather from (B or 1, N, ...); rows gathered more than once add up, in fp32."""
    wide = grad.to(score_dtype(grad))
    total = wide.new_zeros(grad.shape[0], *shape[1:]).scatter_add(1, _along(index, wide), wide)
    return (total if shape[0] == grad.shape[0] else total.sum(0, keepdim=True)).to(grad.dtype)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((*index.shape, *x.shape[2:]))


def _set_gather(ctx: Any, inputs: tuple, output: Any) -> None:
    x, index = inputs
    ctx.shape = tuple(x.shape)
    ctx.save_for_backward(index)


_gather_tokens = _define("gather_tokens", "(Tensor x, Tensor index) -> Tensor", _gathered)
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


_compact = _define(
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


_scatter_tokens = _define(
    "scatter_tokens",
    "(Tensor x, Tensor index, int n, Tensor? mask=None) -> Tensor",
    lambda x, index, n, mask=None: x.new_empty((x.shape[0], n, *x.shape[2:])),
)
_scatter_tokens.register_autograd(  # type: ignore[attr-defined]
    lambda ctx, grad: (_pick(grad, *ctx.saved_tensors), None, None, None), setup_context=_set_scatter
)
trace("scatter_tokens", _scatter_tokens)


def _poured(x: Tensor, n_out: int) -> Tensor:
    return x.new_empty((x.shape[0], n_out, *x.shape[2:]))


def _sum_backward(grad: Tensor, dst: Tensor) -> Tensor:
    return _pick(grad, dst, dst >= 0)


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
    spread = _pick(grad, dst, on).to(dtype)
    grad_weights = None
    if weights is not None:
        weight = weights.reshape(dst.shape).to(dtype)
        mass = total(weight)
        share = torch.where(mass > 0, weight / mass.where(mass > 0, 1.0), share)
        if weights.is_floating_point():
            moved = spread * (x.to(dtype) - _pick(merged, dst, on).to(dtype))
            slope = moved.reshape(*dst.shape, -1).sum(-1) / mass.where(mass > 0, 1.0)
            grad_weights = torch.where(mass > 0, slope, 0).to(weights.dtype).reshape(weights.shape)
    grad_x = share.reshape(*share.shape, *[1] * (x.dim() - 2)) * spread
    return grad_x.to(x.dtype), grad_weights


def _set_sum(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(inputs[1])


_merge_sum = _define(
    "merge_sum", "(Tensor x, Tensor dst, int n_out) -> Tensor", lambda x, dst, n_out: _poured(x, n_out)
)
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


_merge_mean = _define(
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


_merge_tokens = _define(
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
