"""Which tokens to merge: bipartite soft matching (ToMe, MCTF) and VisionZip's strided targets."""

import torch
from torch import Tensor

from ._common import check_shape, check_tokens, ranking, unit
from .backend import operator
from .merge import MergePlan


@operator
@torch.no_grad()
def cosine_scores(x: Tensor) -> Tensor:
    """Cosine of tokens at even places (A) to tokens at odd places (B): x (B, N, D) -> (B, ceil(N/2), floor(N/2)).

    ToMe's rule (arXiv 2210.09461), with the attention keys averaged over heads as x. fp32 (float64 for float64 input).
    """
    check_tokens("x", x, 3, "(B, N, D)")
    unit_x = unit(x)
    return unit_x[:, ::2] @ unit_x[:, 1::2].transpose(1, 2)


@operator
@torch.no_grad()
def mctf_scores(
    x: Tensor, attention_received: Tensor, sizes: Tensor, tau: tuple[float, float, float] = (1, 20, 40)
) -> Tensor:
    """MCTF's score of merging even place i with odd place j, as a logarithm (arXiv 2403.10030).

    ``log Wsim + log Winfo + log Wsize``: the factors 1/a and 1/s are of rank one, so in logarithms they are biases on
    rows and columns. Values are clamped at 1e-8, which keeps masked columns of the attention finite.

    Parameters
    ----------
    x : (B, N, D)
        Block input, full width.
    attention_received : (B, N)
        a, as of `received_attention`.
    sizes : (B, N) or (B, N, 1)
        s, patches in each token.
    tau : (float, float, float)
        Temperatures of similarity, information and size.

    Returns
    -------
    (B, ceil(N/2), floor(N/2))
        fp32 (float64 for float64 input). No gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit or a temperature is not positive.
    """
    check_tokens("x", x, 3, "(B, N, D)")
    shape = (x.shape[0], x.shape[1])
    check_shape("attention_received", attention_received, shape)
    check_shape("sizes", sizes, shape, (*shape, 1))
    if min(tau) <= 0:
        raise ValueError(f"tau is {tau}, but a temperature divides a logarithm: pass three positive numbers.")
    tau_similarity, tau_information, tau_size = tau
    log_similarity = ((cosine_scores(x) + 1) / 2).clamp_min(1e-8).log()

    def log_rarity(value: Tensor) -> Tensor:
        inverse = -value.to(log_similarity.dtype).clamp_min(1e-8).log()
        return inverse - inverse.amax(1, keepdim=True)

    bias = log_rarity(attention_received) / tau_information + log_rarity(sizes.reshape(shape)) / tau_size
    return log_similarity / tau_similarity + bias[:, ::2, None] + bias[:, None, 1::2]


def merge_limit(n: int, protected: Tensor | None = None, *, two_way: bool = False) -> int:
    """Largest r that `bipartite_match` can merge in one round of n tokens.

    No more than half of the unprotected tokens (ToMe's bound), no more than there are sources, and none without a
    destination. With a mask by sample, the smallest limit of the batch. A mask on an accelerator is waited for.
    """
    if protected is None:
        free = [[(n + 1) // 2, n // 2]]
    else:
        if protected.dtype != torch.bool:
            raise ValueError(f"protected is {protected.dtype}, but a bool mask is needed: True = leave as it is.")
        rows = ~protected.reshape(-1, n)
        free = torch.stack([rows[:, ::2].sum(1), rows[:, 1::2].sum(1)], 1).tolist()

    def limit(free_a: int, free_b: int) -> int:
        half = (free_a + free_b) // 2
        if two_way:
            # Forward, floor(r/2) sources must leave one of A as a destination; backward, ceil(r/2) come from B.
            return max(min(half, 2 * free_b, 2 * free_a - 1), 0)
        return min(half, free_a) if free_b else 0

    return min(limit(a, b) for a, b in free)


def _most_similar(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r rows of scores (B, M, K) with the highest maxima, and their best columns: (B, r) each."""
    best = scores.argmax(-1)
    value = scores.gather(-1, best.unsqueeze(-1)).squeeze(-1)
    rows = ranking(value)[:, :r]
    return rows, best.gather(1, rows)


@operator
@torch.no_grad()
def bipartite_match(scores: Tensor, r: int, *, protected: Tensor | None = None, two_way: bool = False) -> MergePlan:
    """Plan that merges r tokens into their best partners: ToMe's matching, or MCTF's in two directions.

    A = even places, B = odd places. One way (ToMe, arXiv 2210.09461): the r tokens of A with the best partner in B
    pour into it; several may share one. Two ways (MCTF, arXiv 2403.10030): floor(r/2) go from A to B, then, by the same
    scores, the other half from B to what is left of A; chains A -> B -> A happen.

    Parameters
    ----------
    scores : (B, ceil(N/2), floor(N/2))
        Of merging A_i with B_j, as of `cosine_scores` or `mctf_scores`; any monotone scale. Finite.
    r : int
        Tokens to remove, cut to `merge_limit`.
    protected : (N,) or (B, N) bool, optional
        Places that are neither source nor destination. On the CPU, so that the output length is known without waiting
        for an accelerator.
    two_way : bool
        False: ToMe's. True: MCTF's.

    Returns
    -------
    MergePlan
        Slots in the order of their representatives, which are the destinations and the untouched tokens: space keeps
        its order, unlike in the papers' code. Lower index first among equals.

    Raises
    ------
    ValueError
        If the shapes do not fit, r is negative or protected is not bool.
    """
    check_tokens("scores", scores, 3, "(B, ceil(N/2), floor(N/2))")
    batch, size_a, size_b = scores.shape
    n, device = size_a + size_b, scores.device
    if size_a - size_b not in (0, 1):
        raise ValueError(
            f"scores are {size_a} x {size_b}, but alternate tokens give ceil(N/2) x floor(N/2): use cosine_scores."
        )
    if r < 0:
        raise ValueError(f"r is {r}, but the number of tokens to remove cannot be negative: pass r >= 0.")
    if protected is not None:
        check_shape("protected", protected, (n,), (batch, n))
    r = min(r, merge_limit(n, protected, two_way=two_way))
    if r == 0:
        return MergePlan.identity(batch, n, device)

    if protected is not None:
        fixed = protected.reshape(-1, n).to(device, non_blocking=True)
        scores = scores.masked_fill(fixed[:, ::2, None] | fixed[:, None, 1::2], -torch.inf)
    r_forward = r // 2 if two_way else r
    target = torch.arange(n, device=device).repeat(batch, 1)
    sources, partners = _most_similar(scores, r_forward)
    target.scatter_(1, 2 * sources, 2 * partners + 1)
    if two_way:
        merged = torch.zeros(batch, size_a, 1, dtype=torch.bool, device=device).scatter(1, sources.unsqueeze(-1), True)
        sources, partners = _most_similar(scores.masked_fill(merged, -torch.inf).transpose(1, 2), r - r_forward)
        target.scatter_(1, 2 * sources + 1, 2 * partners)
        target = target.gather(1, target)  # the longest chain has two steps

    is_root = target == torch.arange(n, device=device)
    dst = (is_root.cumsum(1) - 1).gather(1, target)
    roots = ranking(is_root.to(torch.uint8))[:, : n - r]
    return MergePlan(dst, n - r, roots)


@operator
@torch.no_grad()
def strided_merge(metric: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Contextual tokens: evenly strided targets, everything else to the most similar one.

    VisionZip, arXiv 2412.04467.

    Parameters
    ----------
    metric : (B, M, D)
        Keys, mean over heads, of the tokens that are left after the dominant ones.
    c : int
        Number of targets, >= 1; M of them if M < c.

    Returns
    -------
    targets : (min(c, M),) long
        ``arange(0, M, max(1, M // c))[:c]``.
    assignment : (B, M) long
        Which target each token joins, as a place in `targets`, so that ``MergePlan(assignment, len(targets))`` is the
        plan. Targets join themselves. VisionZip's own sum, target + mean of the others, is left to the caller.

    Raises
    ------
    ValueError
        If metric is not (B, M, D) with M >= 1, or c < 1.
    """
    check_tokens("metric", metric, 3, "(B, M, D)")
    batch, m, _ = metric.shape
    if c < 1 or m < 1:
        raise ValueError(f"{m} tokens cannot be merged into {c}: both must be at least 1, so skip the merge otherwise.")
    targets = torch.arange(0, m, max(1, m // c), device=metric.device)[:c]
    unit_x = unit(metric)
    assignment = (unit_x @ unit_x[:, targets].transpose(1, 2)).argmax(-1)
    slots = torch.arange(len(targets), device=metric.device).expand(batch, -1)
    return targets, assignment.index_copy(1, targets, slots)
