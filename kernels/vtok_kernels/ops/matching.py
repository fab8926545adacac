"""Matching: plans travel as their two tensors; a mask of protected places decides the length when it runs."""

from typing import Any

import torch
from torch import Tensor

from .. import match
from ..backend import get, trace
from ..merge import MergePlan
from ._define import define, detached, index_like


def _fake_plan(x: Tensor, n: int, r: int, mask: Tensor | None, first: int, two_way: bool) -> tuple[Tensor, Tensor]:
    n_out: Any
    if mask is None:
        n_out = n - min(r, match.merge_limit(n, first, two_way=two_way))
    else:
        n_out = torch.library.get_ctx().new_dynamic_size()
    return index_like(x, x.shape[0], n), index_like(x, x.shape[0], n_out)


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


_bipartite_match = define(
    "bipartite_match",
    "(Tensor scores, int r, Tensor? mask, int first, bool two_way) -> (Tensor, Tensor)",
    lambda scores, r, mask, first, two_way: _fake_plan(
        scores, scores.shape[1] + scores.shape[2], r, mask, first, two_way
    ),
    _run_bipartite,
)
_match_tokens = define(
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
    bias = detached(bias)
    dst, representative = _match_tokens(metric.detach(), r, *_split(protected), two_way, bias, temperature)
    return MergePlan(dst, representative.shape[1], representative)


trace("bipartite_match", _trace_bipartite)
trace("match_tokens", _trace_match)
