"""Every operator as one writes it from the paper: whole maps, one span after the other, a step at a time.

What users of the field's code run today, and what the fused operators are measured against. The greedy loops keep a
running statistic over rows of a cosine matrix that is made once, which is kinder than recomputing it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Step = Callable[..., tuple[Tensor, Tensor]]


def cosines(x: Tensor) -> Tensor:
    """The Gram product of unit rows, (..., N, N), in x's dtype."""
    x = F.normalize(x, dim=-1)
    return x @ x.transpose(-1, -2)


def nearest_step(distance: Tensor, nearest: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    """A step of farthest-first: statistic (N,) and next pick, from distances (N, N) and the last pick (1,)."""
    nearest = torch.minimum(nearest, distance[pick][0]).index_fill(0, pick, -1.0)
    return nearest, nearest.argmax(keepdim=True)


def sum_step(similarity: Tensor, total: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    """A step of max-sum: what is picked never comes again, its own entry being infinite."""
    total = (total + similarity[pick][0]).index_fill(0, pick, torch.inf)
    return total, total.argmin(keepdim=True)


def farthest_first(x: Tensor, k: int, step: Step = nearest_step) -> list[Tensor]:
    """Max-min diversity of each span of x (B, N, D): picks (k,)."""
    found = []
    for span in x:
        distance = 1 - cosines(span)
        pick = distance.fill_diagonal_(torch.inf).amin(0).argmax(keepdim=True)
        distance.fill_diagonal_(0)
        nearest, picks = torch.full_like(distance[0], torch.inf), [pick]
        while len(picks) < k:
            nearest, pick = step(distance, nearest, pick)
            picks.append(pick)
        found.append(torch.cat(picks))
    return found


def max_sum(x: Tensor, k: int, pivot: Tensor, step: Step = sum_step) -> list[Tensor]:
    """Max-sum diversity of each span from its pivot."""
    found = []
    for span, pick in zip(x, pivot[:, None], strict=True):
        similarity = cosines(span)
        total, picks = torch.zeros_like(similarity[0]), [pick]
        while len(picks) < k:
            total, pick = step(similarity, total, pick)
            picks.append(pick)
        found.append(torch.cat(picks))
    return found


def dpp_map(x: Tensor, k: int, relevance: Tensor) -> list[Tensor]:
    """Greedy determinant of each span, by the incremental Cholesky factor."""
    found = []
    for span, r in zip(x.float(), relevance, strict=True):
        kernel = r[:, None] * cosines(span) * r
        residual = kernel.diagonal().clone()
        rows = torch.zeros(k, len(span), device=x.device)
        picks = [residual.argmax(keepdim=True)]
        for i in range(k - 1):
            pick = picks[-1]
            explained = rows[:i, pick].T @ rows[:i]
            rows[i] = (kernel[pick] - explained)[0] / residual[pick].clamp_min(1e-12).sqrt()
            residual = residual - rows[i] ** 2
            residual[pick] = -torch.inf
            picks.append(residual.argmax(keepdim=True))
        found.append(torch.cat(picks))
    return found


def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: the whole matrix of cosines, its row maxima, sorted."""
    unit = F.normalize(metric, dim=-1)
    value, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
    sources = value.argsort(1, descending=True)
    return sources, partner.gather(1, sources[:, :r])


def match_scores(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The same where the scores are given."""
    value, partner = scores.max(-1)
    sources = value.argsort(1, descending=True)
    return sources, partner.gather(1, sources[:, :r])


def merge(x: Tensor, dst: Tensor, n_out: int, mean: bool) -> Tensor:
    """A product with the matrix (n_out, N) that says where each token goes."""
    matrix = F.one_hot(dst, n_out).transpose(1, 2).to(x.dtype)
    if mean:
        matrix = matrix / matrix.sum(-1, keepdim=True).clamp_min(1)
    return matrix @ x


def compact(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Tensor by tensor and sample by sample."""
    return [torch.stack([row[own] for row, own in zip(x, index, strict=True)]) for x in tensors]


def attention_map(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Eager attention's whole map (B, H, R, N), in fp32 as transformers makes it."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q @ k.transpose(-1, -2)) * scale
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).to(q.dtype)


def block_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Packed attention with a mask over the whole sequence."""
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
    mask = segment[:, None] == segment
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


def transition(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and direction of an update, each by its own pass over both."""
    x, y = x.float(), y.float()
    return y.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12), torch.exp(1 - F.cosine_similarity(x, y, dim=-1))
