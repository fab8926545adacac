"""Operators of visual-token compression, as plain torch behind a registry that fused versions join.

Batched on the leading axis; scores in fp32 (float64 stays); lower index first among equals; no host synchronisation.
"""

from . import _portable  # noqa: F401
from . import cuda as _cuda  # noqa: F401
from . import fused as _fused  # noqa: F401
from . import ops as _ops  # noqa: F401
from ._common import no_grad, ranking
from .attention import attention_rows, received_attention, value_similarity
from .backend import available, get, portable, register, use
from .compact import compact, gather_tokens, left_compact, scatter_tokens
from .greedy import dpp_map, farthest_first, max_sum
from .match import (
    bipartite_match,
    cosine_scores,
    match_tokens,
    mctf_bias,
    mctf_scores,
    merge_limit,
    strided_merge,
)
from .merge import MergePlan, merge_attention, merge_mean, merge_sum, merge_tokens, reuse_attention
from .packed import load_xformers, packed_attention
from .select import keep_mask, random, topk, uniform, uniform_grid
from .transition import transition

__all__ = [
    "MergePlan",
    "attention_rows",
    "available",
    "bipartite_match",
    "compact",
    "cosine_scores",
    "dpp_map",
    "farthest_first",
    "gather_tokens",
    "get",
    "keep_mask",
    "left_compact",
    "load_xformers",
    "match_tokens",
    "max_sum",
    "mctf_bias",
    "mctf_scores",
    "merge_attention",
    "merge_limit",
    "merge_mean",
    "merge_sum",
    "merge_tokens",
    "no_grad",
    "packed_attention",
    "portable",
    "random",
    "ranking",
    "received_attention",
    "register",
    "reuse_attention",
    "scatter_tokens",
    "strided_merge",
    "topk",
    "transition",
    "uniform",
    "uniform_grid",
    "use",
    "value_similarity",
]
