"""Which tokens to merge: bipartite soft matching (ToMe, MCTF) and VisionZip's strided targets."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ._common import check_shape, check_tokens, no_grad, ranking, score_dtype, unit
from .backend import operator
from .merge import MergePlan


@operator
@no_grad
def cosine_scores(x: Tensor) -> Tensor:
    """Cosine of tokens at even places (A) to tokens at odd places (B): x (B, N, D) -> (B, ceil(N/2), floor(N/2)).

    ToMe's rule (arXiv 2210.09461), with the attention keys averaged over heads as x. fp32 (float64 for float64 input).
    """
    check_tokens("x", x, 3, "(B, N, D)")
    unit_x = unit(x)
    return unit_x[:, ::2] @ unit_x[:, 1::2].transpose(1, 2)


@operator
@no_grad
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
    check_shape("attention_received", attention_received, (x.shape[0], x.shape[1]))
    bias = mctf_bias(attention_received.to(score_dtype(x)), sizes.to(score_dtype(x)), tau)
    return _biased(cosine_scores(x), bias, tau[0])


@no_grad
def mctf_bias(attention_received: Tensor, sizes: Tensor, tau: tuple[float, float, float] = (1, 20, 40)) -> Tensor:
    """The part of `mctf_scores` that is of rank one: what each token adds, as a source or as a destination.

    ``mctf_scores(x, a, s, tau)`` is what ``match_tokens(x, r, bias=mctf_bias(a, s, tau), temperature=tau[0])`` ranks.

    Parameters
    ----------
    attention_received : (B, N)
        a, as of `received_attention`.
    sizes : (B, N) or (B, N, 1)
        s, patches in each token.
    tau : (float, float, float)
        Temperatures of similarity (not used here), information and size.

    Returns
    -------
    (B, N)
        fp32 (float64 for float64 input). No gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit or a temperature is not positive.
    """
    check_tokens("attention_received", attention_received, 2, "(B, N)")
    shape = (attention_received.shape[0], attention_received.shape[1])
    check_shape("sizes", sizes, shape, (*shape, 1))
    if min(tau) <= 0:
        raise ValueError(f"tau is {tau}, but a temperature divides a logarithm: pass three positive numbers.")

    def log_rarity(value: Tensor) -> Tensor:
        inverse = -value.to(score_dtype(attention_received)).clamp_min(1e-8).log()
        return inverse - inverse.amax(1, keepdim=True)

    return log_rarity(attention_received) / tau[1] + log_rarity(sizes.reshape(shape)) / tau[2]


def _biased(cosines: Tensor, bias: Tensor | None, temperature: float | None) -> Tensor:
    """Scores of `match_tokens` from cosines (B, M, K). Works in place."""
    if temperature is not None:
        cosines = cosines.add_(1).div_(2).clamp_min_(1e-8).log_().div_(temperature)
    if bias is not None:
        bias = bias.to(cosines.dtype)
        cosines = cosines.add_(bias[:, ::2, None]).add_(bias[:, None, 1::2])
    return cosines


def merge_limit(n: int, protected: Tensor | int | None = None, *, two_way: bool = False) -> int:
    """Largest r that `bipartite_match` and `match_tokens` can merge in one round of n tokens.

    No more than half of the unprotected tokens (ToMe's bound), no more than there are sources, and none without a
    destination. With a mask by sample, the smallest limit of the batch. A mask on an accelerator is waited for.
    A number stands for a mask of the first places.
    """
    if protected is None or isinstance(protected, int):
        first = min(protected or 0, n)
        free = [[(n + 1) // 2 - (first + 1) // 2, n // 2 - first // 2]]
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


Best = tuple[Tensor, Tensor]
"""The highest score (B, M) of each token, and the place (B, M) of the partner that gives it."""


def _best(scores: Tensor, dim: int) -> Best:
    value, partner = scores.max(dim)  # the first among equals
    return value, partner


def pour_best(n: int, r: int, forward: Best, backward: Callable[[Tensor], Best] | None = None) -> MergePlan:
    """Plan in which the r best of A pour into their partners.

    Parameters
    ----------
    n, r : int
        Tokens, and how many of them go.
    forward : (B, ceil(N/2)) and (B, ceil(N/2))
        For each A the highest score and its B; -inf at protected places.
    backward : callable, optional
        Two ways: floor(r/2) go from A; then, for each B, given which A have gone (B, ceil(N/2)), the highest score
        among those that are left and its A.
    """
    batch, device = forward[0].shape[0], forward[0].device

    def top(best: Best, count: int) -> tuple[Tensor, Tensor]:
        sources = ranking(best[0])[:, :count]
        return sources, best[1].gather(1, sources)

    r_forward = r if backward is None else r // 2
    target = torch.arange(n, device=device).repeat(batch, 1)
    sources, partners = top(forward, r_forward)
    target.scatter_(1, 2 * sources, 2 * partners + 1)
    if backward is not None:
        gone = torch.zeros_like(forward[0], dtype=torch.bool).scatter(1, sources, True)
        sources, partners = top(backward(gone), r - r_forward)
        target.scatter_(1, 2 * sources + 1, 2 * partners)
        target = target.gather(1, target)  # the longest chain has two steps

    is_root = target == torch.arange(n, device=device)
    dst = (is_root.cumsum(1) - 1).gather(1, target)
    roots = ranking(is_root.to(torch.uint8))[:, : n - r]
    return MergePlan(dst, n - r, roots)


def _check_match(batch: int, n: int, r: int, protected: Tensor | int | None, two_way: bool) -> int:
    """r, cut to what can be merged."""
    if r < 0:
        raise ValueError(f"r is {r}, but the number of tokens to remove cannot be negative: pass r >= 0.")
    if isinstance(protected, Tensor):
        check_shape("protected", protected, (n,), (batch, n))
    elif protected is not None and protected < 0:
        raise ValueError(f"protected is {protected}: pass how many of the first places stay, or a bool mask.")
    return min(r, merge_limit(n, protected, two_way=two_way))


_LARGEST_SCORES = 2**20
"""Scores of an item that are alive at once: 4 MiB in fp32, N = 2,048. Beyond, blocks of rows, twice for two ways."""


def _added(unit_x: Tensor, bias: Tensor | None, protected: Tensor | int | None) -> Tensor:
    """(B, N) what is added to every score of a token: its bias, -inf where it is protected."""
    batch, n, _ = unit_x.shape
    add = unit_x.new_zeros(batch, n) if bias is None else bias.to(unit_x.dtype)
    if protected is None:
        return add
    if not isinstance(protected, Tensor):
        protected = torch.arange(n, device=add.device) < protected
    return add.masked_fill(protected.reshape(-1, n).to(add.device, non_blocking=True), -torch.inf)


def _match_blocks(unit_x: Tensor, r: int, add: Tensor, two_way: bool, temperature: float | None) -> MergePlan:
    """`match_tokens` of unit rows in memory that is linear in N; ``add`` as of `_added`."""
    batch, n, _ = unit_x.shape
    a, b = unit_x[:, ::2], unit_x[:, 1::2]
    size = max(1, _LARGEST_SCORES // b.shape[1])

    def blocks(add_a: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, a.shape[1], size):
            part = _biased(a[:, start : start + size] @ b.transpose(1, 2), None, temperature)
            yield start, part.add_(add_a[:, start : start + size, None]).add_(add[:, None, 1::2])

    def backward(gone: Tensor) -> Best:
        value = add.new_full((batch, b.shape[1]), -torch.inf)
        partner = torch.zeros(value.shape, dtype=torch.long, device=add.device)
        for start, scores in blocks(add[:, ::2].masked_fill(gone, -torch.inf)):
            high, place = _best(scores, 1)
            partner = torch.where(high > value, place + start, partner)  # the first among equals
            value = torch.maximum(high, value)
        return value, partner

    rows = [_best(scores, 2) for _, scores in blocks(add[:, ::2])]
    forward = torch.cat([value for value, _ in rows], 1), torch.cat([partner for _, partner in rows], 1)
    return pour_best(n, r, forward, backward if two_way else None)


def _match(scores: Tensor, r: int, protected: Tensor | int | None, two_way: bool) -> MergePlan:
    """`bipartite_match` by scores that are its own: it writes into them."""
    n = scores.shape[1] + scores.shape[2]
    if isinstance(protected, Tensor):
        fixed = protected.reshape(-1, n).to(scores.device, non_blocking=True)
        scores.masked_fill_(fixed[:, ::2, None], -torch.inf).masked_fill_(fixed[:, None, 1::2], -torch.inf)
    elif protected:
        scores[:, : (protected + 1) // 2] = -torch.inf
        scores[:, :, : protected // 2] = -torch.inf

    def backward(gone: Tensor) -> Best:
        return _best(scores.masked_fill_(gone.unsqueeze(-1), -torch.inf), 1)

    return pour_best(n, r, _best(scores, 2), backward if two_way else None)


@operator
@no_grad
def bipartite_match(
    scores: Tensor, r: int, *, protected: Tensor | int | None = None, two_way: bool = False
) -> MergePlan:
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
    protected : (N,) or (B, N) bool, or int, optional
        Places that are neither source nor destination; a number: that many first places. A mask on the CPU, so that
        the output length is known without waiting for an accelerator.
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
    n = size_a + size_b
    if size_a - size_b not in (0, 1):
        raise ValueError(
            f"scores are {size_a} x {size_b}, but alternate tokens give ceil(N/2) x floor(N/2): use cosine_scores."
        )
    r = _check_match(batch, n, r, protected, two_way)
    if r == 0:
        return MergePlan.identity(batch, n, scores.device)
    return _match(scores.clone() if two_way or protected is not None else scores, r, protected, two_way)


@operator
@no_grad
def match_tokens(
    metric: Tensor,
    r: int,
    *,
    protected: Tensor | int | None = None,
    two_way: bool = False,
    bias: Tensor | None = None,
    temperature: float | None = None,
) -> MergePlan:
    """`bipartite_match` by cosine from the tokens themselves: the N/2 x N/2 scores of many tokens are never held.

    Parameters
    ----------
    metric : (B, N, D)
        What cosines are taken of: ToMe's keys, averaged over heads; MCTF's block input.
    r, protected, two_way
        As of `bipartite_match`.
    bias : (B, N), optional
        Added to the scores of each token with every partner, as of `mctf_bias`.
    temperature : float, optional
        The score is ``log((cosine + 1) / 2) / temperature`` in place of the cosine: MCTF's scale, on which `bias` adds
        up to its product of criteria.

    Returns
    -------
    MergePlan
        As of `bipartite_match`.

    Raises
    ------
    ValueError
        If the shapes do not fit, r is negative, protected is not bool or temperature not positive.
    """
    r = check_tokens_match(metric, r, protected, two_way, bias, temperature)
    if r == 0:
        return MergePlan.identity(metric.shape[0], metric.shape[1], metric.device)
    if ((metric.shape[1] + 1) // 2) * (metric.shape[1] // 2) > _LARGEST_SCORES:
        unit_x = unit(metric)
        return _match_blocks(unit_x, r, _added(unit_x, bias, protected), two_way, temperature)
    return _match(_biased(cosine_scores(metric), bias, temperature), r, protected, two_way)


def check_tokens_match(
    metric: Tensor,
    r: int,
    protected: Tensor | int | None,
    two_way: bool,
    bias: Tensor | None,
    temperature: float | None,
) -> int:
    """r of `match_tokens`, cut to what can be merged, or an error."""
    check_tokens("metric", metric, 3, "(B, N, D)")
    if bias is not None:
        check_shape("bias", bias, (metric.shape[0], metric.shape[1]))
    if temperature is not None and temperature <= 0:
        raise ValueError(f"temperature is {temperature}, but it divides a logarithm: pass a positive number.")
    return _check_match(metric.shape[0], metric.shape[1], r, protected, two_way)


@operator
@no_grad
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
