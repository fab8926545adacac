"""Statistics and choices: the reference's arguments in its order, no gradient."""

import inspect
from typing import Any

import torch

from ..backend import get, reference, trace
from ._define import Operator, define, first_tensor, index_like, score_like, without_gradient


def _with_keywords(name: str) -> Operator:
    """The operator called by position, as schemas are: their tensors cannot be keywords, and defaults are left out."""
    parameters = inspect.signature(reference(name)).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    positional = len(parameters) - len(keywords)

    def run(*args: Any) -> Any:
        first = first_tensor(args)
        function = get(name, None if first is None else first.device)
        return function(*args[:positional], **dict(zip(keywords, args[positional:], strict=False)))

    return run


def _pair_shape(n: int) -> tuple[int, int]:
    return (n + 1) // 2, n // 2


STATISTICS: dict[str, tuple[str, Operator]] = {
    "attention_rows": (
        "(Tensor q, Tensor k, float scale, Tensor? mask=None) -> Tensor",
        lambda q, k, scale, mask=None: score_like(q, q.shape[0], q.shape[2], k.shape[2]),
    ),
    "received_attention": (
        "(Tensor q, Tensor k, float scale, Tensor? key_mask=None, Tensor? query_mask=None, "
        "Tensor? query_positions=None, int block=256) -> Tensor",
        lambda q, k, *rest, **named: score_like(q, k.shape[0], k.shape[2]),
    ),
    "value_similarity": (
        "(Tensor v, Tensor row, float scale=1.0, Tensor? mask=None) -> Tensor",
        lambda v, row, scale=1.0, mask=None: score_like(row, v.shape[0], v.shape[2]),
    ),
    "transition": (
        "(Tensor x, Tensor y, Tensor? mask=None) -> (Tensor, Tensor)",
        lambda x, y, mask=None: (score_like(x, *x.shape[:2]), score_like(x, *x.shape[:2])),
    ),
    "topk": (
        "(Tensor scores, int k) -> Tensor",
        lambda scores, k: index_like(scores, scores.shape[0], k),
    ),
    "keep_mask": (
        "(Tensor indices, int n) -> Tensor",
        lambda indices, n: indices.new_empty((indices.shape[0], n), dtype=torch.bool),
    ),
    "left_compact": (
        "(Tensor keep, int k) -> (Tensor, Tensor)",
        lambda keep, k: (index_like(keep, keep.shape[0], k), keep.new_empty((keep.shape[0], k))),
    ),
    "farthest_first": (
        "(Tensor x, int k, Tensor? weights=None, Tensor? first=None, bool sort=True) -> Tensor",
        lambda x, k, weights=None, first=None, sort=True: index_like(x, x.shape[0], k),
    ),
    "max_sum": (
        '(Tensor x, int k, Tensor pivot, str objective="sum", bool sort=True) -> Tensor',
        lambda x, k, pivot, objective="sum", sort=True: index_like(x, x.shape[0], k),
    ),
    "dpp_map": (
        "(Tensor x, int k, Tensor? relevance=None, bool sort=True) -> Tensor",
        lambda x, k, relevance=None, sort=True: index_like(x, x.shape[0], k),
    ),
    "cosine_scores": (
        "(Tensor x) -> Tensor",
        lambda x: score_like(x, x.shape[0], *_pair_shape(x.shape[1])),
    ),
    "mctf_scores": (
        "(Tensor x, Tensor attention_received, Tensor sizes, float[] tau=[1.0, 20.0, 40.0]) -> Tensor",
        lambda x, attention_received, sizes, tau=(): score_like(x, x.shape[0], *_pair_shape(x.shape[1])),
    ),
    "strided_merge": (
        "(Tensor metric, int c) -> (Tensor, Tensor)",
        lambda metric, c: (index_like(metric, min(c, metric.shape[1])), index_like(metric, *metric.shape[:2])),
    ),
}

for _name, (_schema, _fake) in STATISTICS.items():
    trace(_name, without_gradient(define(_name, _schema, _fake, _with_keywords(_name))))
