"""The cases of every operator: the sizes at which vtok calls them, and what each must move and compute.

A builder takes a ``Maker`` and numbers, and is named after its operator; ``SIZES`` says with which numbers it is
called. An operator that another backend implements appears without a change here; a new operator needs a builder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from vtok.bench.kernels import textbook
from vtok.bench.kernels.case import Bar, Case, Maker, bytes_of

LONG = 8
"""Bytes of an index."""

# -- greedy selection -----------------------------------------------------------------------------------------------


def _greedy_bars(b: int, n: int, k: int) -> tuple[Bar, ...]:
    if b == 1 and (n, k) == (2880, 320):
        return (Bar("ms", 1.0, "H100"), Bar("speedup", 8.0), Bar("yardstick", 1.5, "cpu"))
    return (Bar("ms", 0.2, "H100"),) if b == 1 and (n, k) == (576, 64) else ()


def farthest_first(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """The first pick needs the nearest other token of every token, so each pair's cosine once."""
    x = make.normal(b, n, d)
    return Case(
        "farthest_first", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(x, k), (x,),
        moved=bytes_of(x) + LONG * b * k, operations=b * n * n * d, dtype=make.name,
        textbook=lambda: textbook.farthest_first(x, k),
        compiled=lambda compile: _loop(textbook.farthest_first, (x, k), compile(textbook.nearest_step)),
        yardstick=("Gram product", lambda: textbook.cosines(x)), bars=_greedy_bars(b, n, k),
    )  # fmt: skip


def max_sum(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """A row of cosines a pick."""
    x, pivot = make.normal(b, n, d), torch.zeros(b, dtype=torch.long, device=make.device)
    return Case(
        "max_sum", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(x, k, pivot), (x, pivot),
        moved=bytes_of(x, pivot) + LONG * b * k, operations=2 * b * k * n * d, dtype=make.name,
        textbook=lambda: textbook.max_sum(x, k, pivot),
        compiled=lambda compile: _loop(textbook.max_sum, (x, k, pivot), compile(textbook.sum_step)),
        yardstick=("Gram product", lambda: textbook.cosines(x)), bars=_greedy_bars(b, n, k),
    )  # fmt: skip


def dpp_map(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """A row of cosines and a row of the triangular factor a pick."""
    x, relevance = make.normal(b, n, d), make.positive(b, n)
    return Case(
        "dpp_map", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(x, k, relevance), (x, relevance),
        moved=bytes_of(x, relevance) + LONG * b * k, operations=b * k * n * (2 * d + k), dtype=make.name,
        textbook=lambda: textbook.dpp_map(x, k, relevance),
        # every step sees one row more of the factor: another shape, another graph
        compiled=lambda compile: _not("each of its steps has another shape"),
        yardstick=("Gram product", lambda: textbook.cosines(x)), bars=_greedy_bars(b, n, k),
    )  # fmt: skip


def _loop(function: Callable, arguments: tuple, step: Callable) -> Callable[[], Any]:
    """The textbook's loop around its step, compiled: unrolled, hundreds of steps would compile for minutes."""
    return lambda: function(*arguments, step=step)


def _not(reason: str) -> Any:
    raise NotImplementedError(reason)


# -- matching and merging -------------------------------------------------------------------------------------------


def match_tokens(make: Maker, b: int, n: int, d: int, r: int) -> Case:
    """Cosines of half the tokens to the other half, and what each row's best is."""
    x = make.normal(b, n, d)
    return Case(
        "match_tokens", {"B": b, "N": n, "D": d, "r": r}, lambda fn: fn(x, r), (x,),
        moved=bytes_of(x) + LONG * b * (2 * n - r), operations=b * n * n * d / 2, dtype=make.name,
        textbook=lambda: textbook.match(x, r),
        yardstick=("half Gram product", lambda: x[:, ::2] @ x[:, 1::2].transpose(1, 2)),
        bars=(Bar("speedup", 5.0),) if n == 2880 else (),
    )  # fmt: skip


def bipartite_match(make: Maker, b: int, n: int, r: int) -> Case:
    """On scores that are given."""
    scores = make.positive(b, (n + 1) // 2, n // 2)
    return Case(
        "bipartite_match", {"B": b, "N": n, "r": r}, lambda fn: fn(scores, r), (scores,),
        moved=bytes_of(scores) + LONG * b * (2 * n - r), operations=scores.numel(), dtype=make.name,
        textbook=lambda: textbook.match_scores(scores, r),
    )  # fmt: skip


def merge_sum(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """Tokens into slots."""
    return _merge("merge_sum", make, b, n, d, k, mean=False)


def merge_mean(make: Maker, b: int, n: int, d: int, k: int, backward: bool = False) -> Case:
    """Tokens into slots, weighted alike."""
    return _merge("merge_mean", make, b, n, d, k, mean=True, backward=backward)


def _merge(name: str, make: Maker, b: int, n: int, d: int, k: int, mean: bool, backward: bool = False) -> Case:
    x, dst = make.normal(b, n, d), make.slots(b, n, k)
    size: dict[str, Any] = {"B": b, "N": n, "D": d, "k": k}
    moved, operations = bytes_of(x, dst) + b * k * d * x.element_size(), b * n * d
    if not backward:
        return Case(
            name, size, lambda fn: fn(x, dst, k), (x, dst), moved, operations, make.name,
            textbook=lambda: textbook.merge(x, dst, k, mean), bars=(Bar("share", 0.8),) if b == 8 and n == 2880 else (),
        )  # fmt: skip
    x.requires_grad_()
    poured = make.normal(b, k, d)
    return Case(
        name, size | {"pass": "both"}, lambda fn: torch.autograd.grad(fn(x, dst, k), x, poured), (x, dst, poured),
        2 * moved, 2 * operations, make.name,
        textbook=lambda: torch.autograd.grad(textbook.merge(x, dst, k, mean), x, poured), grad=True,
    )  # fmt: skip


def merge_tokens(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """What a merging tower pours at once: features and places averaged, sizes summed."""
    x, places, sizes = make.normal(b, n, d), make.positive(b, n, 2), make.positive(b, n)
    dst = make.slots(b, n, k)
    poured = bytes_of(x, places, sizes)
    return Case(
        "merge_tokens", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(dst, k, (x, places), (sizes,)),
        (x, places, sizes, dst), moved=poured * (n + k) / n + bytes_of(dst), operations=b * n * (d + 3),
        dtype=make.name,
        textbook=lambda: [
            textbook.merge(x, dst, k, True), textbook.merge(places, dst, k, True),
            textbook.merge(sizes[..., None], dst, k, False),
        ],
        bars=(Bar("share", 0.8),) if b == 8 and n == 2880 else (),
    )  # fmt: skip


def strided_merge(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """Each token to the most similar of k."""
    x = make.normal(b, n, d)
    return Case(
        "strided_merge", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(x, k), (x,),
        moved=bytes_of(x) + LONG * b * n, operations=2 * b * n * k * d, dtype=make.name,
    )  # fmt: skip


# -- moving tokens --------------------------------------------------------------------------------------------------


def compact(make: Maker, b: int, n: int, d: int, k: int, head: int) -> Case:
    """What moves together before a decoder layer: hidden states, cos and sin, position ids, mask."""
    index = make.picks(b, n, k)
    tensors = (
        make.normal(b, n, d), make.normal(b, n, head), make.normal(b, n, head),
        torch.arange(n, device=make.device).expand(b, n), torch.ones(b, n, dtype=torch.bool, device=make.device),
    )  # fmt: skip
    kept = k * sum(bytes_of(x[:, :1]) for x in tensors)
    return Case(
        "compact", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(tensors, index), (*tensors, index),
        moved=2 * kept + bytes_of(index), operations=0, dtype=make.name,
        textbook=lambda: textbook.compact(tensors, index), bars=(Bar("share", 0.8),) if b == 8 and n == 2880 else (),
    )  # fmt: skip


def gather_tokens(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """k rows of each sample."""
    x, index = make.normal(b, n, d), make.picks(b, n, k)
    return Case(
        "gather_tokens", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(x, index), (x, index),
        moved=2 * b * k * d * x.element_size() + bytes_of(index), operations=0, dtype=make.name,
        textbook=lambda: textbook.compact((x,), index),
    )  # fmt: skip


def scatter_tokens(make: Maker, b: int, n: int, d: int, k: int) -> Case:
    """k rows of each sample among n zeros."""
    x, index = make.normal(b, k, d), make.picks(b, n, k)
    return Case(
        "scatter_tokens", {"B": b, "N": n, "D": d, "k": k}, lambda fn: fn(x, index, n), (x, index),
        moved=bytes_of(x, index) + b * n * d * x.element_size(), operations=0, dtype=make.name,
    )  # fmt: skip


def left_compact(make: Maker, b: int, n: int, k: int) -> Case:
    """Indices out of a mask."""
    keep = torch.zeros(b, n, dtype=torch.bool, device=make.device).scatter(1, make.picks(b, n, k), True)
    return Case(
        "left_compact", {"B": b, "N": n, "k": k}, lambda fn: fn(keep, k), (keep,),
        moved=bytes_of(keep) + (LONG + 1) * b * k, operations=0, dtype=make.name,
    )  # fmt: skip


def topk(make: Maker, b: int, n: int, k: int) -> Case:
    """Indices out of scores."""
    scores = make.positive(b, n)
    return Case(
        "topk", {"B": b, "N": n, "k": k}, lambda fn: fn(scores, k), (scores,),
        moved=bytes_of(scores) + LONG * b * k, operations=0, dtype=make.name,
        textbook=lambda: scores.topk(k).indices.sort(1).values,
    )  # fmt: skip


# -- attention ------------------------------------------------------------------------------------------------------


def attention_rows(make: Maker, b: int, heads: int, kv: int, n: int, d: int, rows: int) -> Case:
    """The last rows of a causal layer's map; measured against that layer's attention."""
    q, k, v, scale = make.normal(b, heads, n, d), make.normal(b, kv, n, d), make.normal(b, kv, n, d), d**-0.5
    last = q[:, :, n - rows :]
    places = torch.arange(n, device=make.device)
    mask = (places <= places[n - rows :, None]).expand(b, rows, n)
    return Case(
        "attention_rows", {"B": b, "H": heads, "Hkv": kv, "N": n, "d": d, "R": rows},
        lambda fn: fn(last, k, scale=scale, mask=mask), (q, k, v, mask),
        moved=bytes_of(last, k) + 4 * b * rows * n, operations=2 * b * heads * rows * n * d, dtype=make.name,
        textbook=lambda: textbook.attention_map(q, k, scale, True)[:, :, n - rows :].mean(1),
        yardstick=(
            "layer's attention",
            lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv),
        ),
        bars=(Bar("yardstick", 0.05),) if n == 3000 else (),
    )  # fmt: skip


def received_attention(make: Maker, b: int, heads: int, n: int, d: int, causal: bool) -> Case:
    """Column sums of the map."""
    q, k, v = (make.normal(b, heads, n, d) for _ in range(3))
    scale, places = d**-0.5, torch.arange(n, device=make.device).expand(b, n)
    only: dict[str, Any] = {"query_positions": places} if causal else {}
    return Case(
        "received_attention", {"B": b, "H": heads, "N": n, "d": d, "causal": causal},
        lambda fn: fn(q, k, scale=scale, **only), (q, k, v, places),
        moved=bytes_of(q, k) + 4 * b * n, operations=2 * b * heads * n * n * d / (2 if causal else 1),
        dtype=make.name, textbook=lambda: textbook.attention_map(q, k, scale, causal).mean((1, 2)),
        yardstick=("flash forward", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)),
        bars=(Bar("yardstick", 1.5),) if n == 3000 else (),
    )  # fmt: skip


def value_similarity(make: Maker, b: int, heads: int, n: int, d: int) -> Case:
    """One row over the values."""
    v, row = make.normal(b, heads, n, d), make.normal(b, heads, d)
    return Case(
        "value_similarity", {"B": b, "H": heads, "N": n, "d": d}, lambda fn: fn(v, row), (v, row),
        moved=bytes_of(v, row) + 4 * b * n, operations=2 * b * heads * n * d, dtype=make.name,
        textbook=lambda: textbook.attention_map(row[:, :, None], v, 1.0, False).mean(1)[:, 0],
    )  # fmt: skip


def transition(make: Maker, b: int, n: int, d: int) -> Case:
    """Dot product and two norms of each row."""
    x, y = make.normal(b, n, d), make.normal(b, n, d)
    return Case(
        "transition", {"B": b, "N": n, "D": d}, lambda fn: fn(x, y), (x, y),
        moved=bytes_of(x, y) + 8 * b * n, operations=6 * b * n * d, dtype=make.name,
        textbook=lambda: textbook.transition(x, y),
    )  # fmt: skip


def packed_attention(make: Maker, segments: int, length: int, heads: int, d: int) -> Case:
    """Windows of a tower, in one sequence."""
    n, scale = segments * length, d**-0.5
    q, k, v = (make.normal(n, heads, d) for _ in range(3))
    lengths = [length] * segments
    return Case(
        "packed_attention", {"N": n, "segments": segments, "H": heads, "d": d},
        lambda fn: fn(q, k, v, lengths, scale=scale), (q, k, v),
        moved=bytes_of(q, k, v, v), operations=4 * segments * length**2 * heads * d, dtype=make.name,
        textbook=lambda: textbook.block_attention(q, k, v, lengths, scale),
    )  # fmt: skip


BUILDERS: dict[str, Callable[..., Case]] = {
    build.__name__: build
    for build in (
        farthest_first, max_sum, dpp_map, match_tokens, merge_tokens, merge_mean, merge_sum, compact, attention_rows,
        received_attention, transition, bipartite_match, gather_tokens, scatter_tokens, value_similarity,
        packed_attention, strided_merge, left_compact, topk,
    )
}  # fmt: skip
"""Those with bars first: they come first where time is short."""

UNTIMED = {"keep_mask": "one scatter", "cosine_scores": "part of match_tokens", "mctf_scores": "part of match_tokens"}
"""Operators without a case, and why."""


def _sizes(width: int, heads: int, kv: int, head: int, many: int) -> dict[str, list[dict[str, Any]]]:
    """The sizes of a model: 576 and 2880 tokens, its hidden width, its heads; ``many`` samples in a batch."""
    spans = [(1, 2880, 320), (1, 576, 64), (many, 2880, 320)]
    greedy = [{"b": b, "n": n, "d": width, "k": k} for b, n, k in spans[: 2 if many == 1 else 3]]
    rows = [{"b": many, "n": 2880, "d": width, "k": k} for k in (1440, 320)]
    tower = {"heads": 16, "n": 577, "d": 64}
    return {
        "farthest_first": greedy,
        "max_sum": greedy,
        "dpp_map": greedy,
        "match_tokens": [{"b": 1, "n": n, "d": 64, "r": n // 4} for n in (2880, 5760)]
        + [{"b": many, "n": 576, "d": 1024, "r": 144}],
        "merge_tokens": rows,
        "merge_mean": [*rows, {**rows[1], "backward": True}],
        "merge_sum": rows,
        "compact": [{**row, "head": head} for row in rows],
        "attention_rows": [
            {"b": 1, "heads": heads, "kv": own, "n": 3000, "d": head, "rows": r}
            for own, r in ((heads, 1), (heads, 64), (kv, 64))
        ],
        "received_attention": [
            {"b": 1, "heads": heads, "n": 3000, "d": head, "causal": True},
            {"b": 5 * many, **tower, "causal": False},
        ],
        "transition": [{"b": b, "n": 2880, "d": width} for b in sorted({1, many})],
        "bipartite_match": [{"b": 1, "n": 2880, "r": 720}],
        "gather_tokens": rows,
        "scatter_tokens": rows[1:],
        "value_similarity": [{"b": 5 * many, **tower}],
        "packed_attention": [{"segments": 64, "length": 64, "heads": 16, "d": 80}],
        "strided_merge": [{"b": many, "n": 576, "d": 64, "k": 10}],
        "left_compact": [{"b": many, "n": 2880, "k": 320}],
        "topk": [{"b": many, "n": 2880, "k": 320}],
    }


def _tiny() -> dict[str, list[dict[str, Any]]]:
    """Odd and small, for tests and for the interpreter."""
    row = {"b": 2, "n": 21, "d": 16, "k": 5}
    found = {
        name: [row] for name in ("farthest_first", "max_sum", "dpp_map", "merge_sum", "merge_tokens", "gather_tokens")
    }
    heads = {"b": 1, "heads": 4, "n": 21, "d": 16}
    short = {key: row[key] for key in ("b", "n", "k")}
    return found | {
        "merge_mean": [row, {**row, "backward": True}],
        "compact": [{**row, "head": 8}],
        "match_tokens": [{"b": 2, "n": 21, "d": 16, "r": 4}],
        "attention_rows": [{**heads, "kv": 2, "rows": 3}],
        "received_attention": [{**heads, "causal": causal} for causal in (True, False)],
        "transition": [{"b": 2, "n": 21, "d": 16}],
        "bipartite_match": [{"b": 2, "n": 21, "r": 4}],
        "scatter_tokens": [row],
        "value_similarity": [heads],
        "packed_attention": [{"segments": 3, "length": 7, "heads": 2, "d": 16}],
        "strided_merge": [row],
        "left_compact": [short],
        "topk": [short],
    }


SIZES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "7b": _sizes(4096, 32, 4, 128, many=8),
    "0.5b": _sizes(1024, 16, 2, 64, many=1),
    "tiny": _tiny(),
}
"""The width of a model -> operator -> what its builder is called with."""


def requests(sizes: str, operators: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every case of some operators: the first size of each of them, then the second, and so on."""
    table = {name: SIZES[sizes][name] for name in BUILDERS if name in operators}
    for turn in range(max(map(len, table.values()), default=0)):
        for name, numbers in table.items():
            if turn < len(numbers):
                yield name, numbers[turn]
