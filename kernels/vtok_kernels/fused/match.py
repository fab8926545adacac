"""Matching without the matrix: scores, their row maxima and the plan, in memory of O(N).

One launch for the best partner of every token (tiles of scores live in registers) and one for the plan; two ways, two
of each. The plan needs no sort: a threshold is found by bisecting the bits of the scores.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import reference, register
from ..match import check_tokens_match, pour_best
from ..merge import MergePlan
from ._launch import INTERPRETED, devices, next_power, priority

ROWS = COLUMNS = 64
"""Tile of scores."""

PROGRAMS = 264
"""Two a multiprocessor of an H100: below that, several programs share the columns of a block of rows."""

LONGEST = 16384
"""Tokens that one program plans for; beyond, the plan is made of torch's operators."""


@triton.jit
def _norms_kernel(x, x_batch, x_row, x_channel, norms, n, d, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """1 / length of each row; a zero row's stays finite."""
    b = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, d, CHANNELS):
        channel = (start + tl.arange(0, CHANNELS)).to(tl.int64)
        at = x + b * x_batch + row[:, None] * x_row + channel[None, :] * x_channel
        value = tl.load(at, mask=(row < n)[:, None] & (channel < d)[None, :], other=0).to(tl.float32)
        squares += value * value
    length = tl.sqrt(tl.sum(squares, 1))
    tl.store(norms + b * n + row, 1.0 / tl.maximum(length, 1.1754943508222875e-38), mask=row < n)


@triton.jit
def _best_kernel(
    x, x_batch, x_row, x_channel, norms, bias, bias_batch, bias_row, fixed, fixed_batch, gone, value, partner,
    n, d, queries, keys, share, splits, protected, temperature,
    EVEN: tl.constexpr, LOGARITHM: tl.constexpr, BIAS: tl.constexpr, FIXED: tl.constexpr, GONE: tl.constexpr,
    HALF: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Highest score of a block of queries within one share of the keys, and where: queries at even places and keys at
    odd ones, or the other way around."""
    b = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_place = (2 * row + (0 if EVEN else 1)).to(tl.int64)
    row_norm = tl.load(norms + b * n + row_place, mask=row < queries, other=0)
    if BIAS:
        row_bias = tl.load(bias + b * bias_batch + row_place * bias_row, mask=row < queries, other=0).to(tl.float32)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    where = tl.zeros([ROWS], tl.int32)
    for start in range(split * share, tl.minimum((split + 1) * share, keys), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        place = (2 * column + (1 if EVEN else 0)).to(tl.int64)
        norm = tl.load(norms + b * n + place, mask=column < keys, other=0)
        score = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, d, CHANNELS):
            channel = (first + tl.arange(0, CHANNELS)).to(tl.int64)
            q_at = x + b * x_batch + row_place[:, None] * x_row + channel[None, :] * x_channel
            k_at = x + b * x_batch + place[None, :] * x_row + channel[:, None] * x_channel
            q = tl.load(q_at, mask=(row < queries)[:, None] & (channel < d)[None, :], other=0)
            k = tl.load(k_at, mask=(column < keys)[None, :] & (channel < d)[:, None], other=0)
            if WIDEN:
                score = tl.dot(q.to(tl.float32), k.to(tl.float32), score)
            elif HALF:
                score = tl.dot(q, k, score)
            else:
                # Unit rows first, as fp32 products of long rows could overflow; three TF32 products are fp32's one.
                score = tl.dot(q * row_norm[:, None], k * norm[None, :], score, input_precision="tf32x3")
        if HALF:
            score = score * row_norm[:, None] * norm[None, :]
        if LOGARITHM:
            score = tl.log(tl.maximum((score + 1) / 2, 1e-8)) / temperature
        if BIAS:
            other = tl.load(bias + b * bias_batch + place * bias_row, mask=column < keys, other=0).to(tl.float32)
            if EVEN:
                score = (score + row_bias[:, None]) + other[None, :]
            else:
                score = (score + other[None, :]) + row_bias[:, None]
        usable = (column < keys) & (place >= protected)
        if FIXED:
            usable &= tl.load(fixed + b * fixed_batch + place, mask=column < keys, other=1) == 0
        if GONE:
            usable &= tl.load(gone + b * keys + column, mask=column < keys, other=1) == 0
        score = tl.where(usable[None, :], score, float("-inf"))
        highest, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
        better = highest > best
        where = tl.where(better, start + at, where)
        best = tl.where(better, highest, best)
    allowed = row_place >= protected
    if FIXED:
        allowed &= tl.load(fixed + b * fixed_batch + row_place, mask=row < queries, other=1) == 0
    best = tl.where(allowed, best, float("-inf"))
    to = (b * splits + split) * queries + row
    tl.store(value + to, best, mask=row < queries)
    tl.store(partner + to, where, mask=row < queries)


@triton.jit
def _choose(value, partner, b, queries, splits, count, BLOCK: tl.constexpr):
    """Which `count` queries have the highest scores, the lower index first among equals; and everyone's partner."""
    i = tl.arange(0, BLOCK)
    inside = i < queries
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for split in range(0, splits):
        at = (b * splits + split) * queries + i
        own = tl.load(value + at, mask=inside, other=float("-inf"))
        better = own > best
        where = tl.where(better, tl.load(partner + at, mask=inside, other=0), where)
        best = tl.where(better, own, best)
    best = tl.where(best == 0, 0.0, best)  # -0.0 and 0.0 are equal, their bits are not
    bits = best.to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)  # ordered like the scores
    rank = tl.where(inside, rank, 0)
    threshold = tl.zeros([1], tl.uint32)  # the count-th highest rank, from its highest bit on
    bit = tl.full([1], 2147483648, tl.uint32)
    for _ in range(32):
        raised = threshold | bit
        enough = tl.sum((rank >= raised).to(tl.int32), 0) >= count
        threshold = tl.where(enough, raised, threshold)
        bit = bit >> 1
    above = rank > threshold
    equal = (rank == threshold) & inside
    left = count - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left)), where


@triton.jit
def _sources_kernel(value, partner, gone, queries, splits, count, BLOCK: tl.constexpr):
    """Which of A go forward, for the way back."""
    b = tl.program_id(0).to(tl.int64)
    chosen, _ = _choose(value, partner, b, queries, splits, count, BLOCK)
    i = tl.arange(0, BLOCK)
    tl.store(gone + b * queries + i, chosen.to(tl.int8), mask=i < queries)


@triton.jit
def _plan_kernel(
    value, partner, back_value, back_partner, dst, roots, n, r_forward, r_backward, splits, back_splits,
    TWO_WAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slots in the order of their representatives: a token's slot counts the roots before it."""
    b = tl.program_id(0).to(tl.int64)
    size_a, size_b = (n + 1) // 2, n // 2
    i = tl.arange(0, BLOCK)
    gone_a, to_b = _choose(value, partner, b, size_a, splits, r_forward, BLOCK)
    root_a, root_b = (i < size_a) & (gone_a == 0), i < size_b
    if TWO_WAY:
        gone_b, to_a = _choose(back_value, back_partner, b, size_b, back_splits, r_backward, BLOCK)
        root_b = root_b & (gone_b == 0)
    pair = root_a.to(tl.int32) + root_b.to(tl.int32)
    slot_a = tl.cumsum(pair, 0) - pair
    slot_b = slot_a + root_a.to(tl.int32)
    first = roots + b * (n - r_forward - r_backward)
    tl.store(first + slot_a, (2 * i).to(tl.int64), mask=root_a)
    tl.store(first + slot_b, (2 * i + 1).to(tl.int64), mask=root_b)
    if TWO_WAY:
        slot_b = tl.where(gone_b, tl.gather(slot_a, to_a, 0), slot_b)  # before A follows it: chains A -> B -> A
    slot_a = tl.where(gone_a, tl.gather(slot_b, to_b, 0), slot_a)
    tl.store(dst + b * n + 2 * i, slot_a.to(tl.int64), mask=i < size_a)
    tl.store(dst + b * n + 2 * i + 1, slot_b.to(tl.int64), mask=i < size_b)


Partial = tuple[Tensor, Tensor]
"""Best values (B, splits, M) fp32 and partners (B, splits, M) int32 of a share of the keys each."""


class _Matching:
    """One call's tensors, for one launch a direction."""

    def __init__(
        self, metric: Tensor, protected: Tensor | int | None, bias: Tensor | None, temperature: float | None
    ) -> None:
        self.metric, self.bias, self.temperature = metric, bias, temperature
        self.batch, self.n, self.d = metric.shape
        self.protected = protected if isinstance(protected, int) else 0
        self.fixed = None
        if isinstance(protected, Tensor):
            self.fixed = (
                protected.reshape(-1, self.n).to(metric.device, non_blocking=True).contiguous().view(torch.uint8)
            )
        self.norms = torch.empty((self.batch, self.n), dtype=torch.float32, device=metric.device)
        channels = min(next_power(self.d), 512)
        rows = max(1, 2048 // channels)
        _norms_kernel[(triton.cdiv(self.n, rows), self.batch)](
            metric, *metric.stride(), self.norms, self.n, self.d, ROWS=rows, CHANNELS=channels
        )

    def best(self, even: bool, gone: Tensor | None = None) -> Partial:
        """Of even places among odd ones, or of odd places among the even ones that are not `gone`."""
        size_a, size_b = (self.n + 1) // 2, self.n // 2
        queries, keys = (size_a, size_b) if even else (size_b, size_a)
        blocks, columns = triton.cdiv(queries, ROWS), triton.cdiv(keys, COLUMNS)
        wanted = max(1, min(columns, PROGRAMS // max(1, blocks * self.batch)))
        share = triton.cdiv(columns, wanted) * COLUMNS
        splits = triton.cdiv(keys, share)
        value = torch.empty((self.batch, splits, queries), dtype=torch.float32, device=self.metric.device)
        partner = torch.empty((self.batch, splits, queries), dtype=torch.int32, device=self.metric.device)
        bias, fixed = self.bias, self.fixed
        half = self.metric.dtype != torch.float32
        widen = INTERPRETED and self.metric.dtype == torch.bfloat16  # the interpreter multiplies bf16's bits
        _best_kernel[(blocks, splits, self.batch)](
            self.metric, *self.metric.stride(), self.norms,
            self.norms if bias is None else bias, *((0, 0) if bias is None else bias.stride()),
            self.norms if fixed is None else fixed, 0 if fixed is None or fixed.shape[0] == 1 else self.n,
            self.norms if gone is None else gone, value, partner,
            self.n, self.d, queries, keys, share, splits, self.protected, float(self.temperature or 1),
            EVEN=even, LOGARITHM=self.temperature is not None, BIAS=bias is not None, FIXED=fixed is not None,
            GONE=gone is not None, HALF=half, WIDEN=widen, ROWS=ROWS, COLUMNS=COLUMNS,
            CHANNELS=max(16, min(next_power(self.d), 64 if half else 32)), num_warps=4,
        )  # fmt: skip
        return value, partner


def _joined(partial: Partial) -> tuple[Tensor, Tensor]:
    """Best of all shares: the first share among equals, which has the lower indices."""
    value, split = partial[0].max(1)
    return value, partial[1].gather(1, split.unsqueeze(1)).squeeze(1).long()


@register("match_tokens", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def match_tokens(
    metric: Tensor,
    r: int,
    *,
    protected: Tensor | int | None = None,
    two_way: bool = False,
    bias: Tensor | None = None,
    temperature: float | None = None,
) -> MergePlan:
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    small = metric.dtype in kinds and 0 < metric.shape[0] < 65536 and metric.shape[-1] > 0
    if not small or (bias is not None and bias.dtype not in kinds):
        return reference("match_tokens")(
            metric, r, protected=protected, two_way=two_way, bias=bias, temperature=temperature
        )
    r = check_tokens_match(metric, r, protected, two_way, bias, temperature)
    batch, n, _ = metric.shape
    if r == 0:
        return MergePlan.identity(batch, n, metric.device)
    matching = _Matching(metric.detach(), protected, None if bias is None else bias.detach(), temperature)
    forward = matching.best(True)
    if n > LONGEST:
        return pour_best(
            n, r, _joined(forward),
            (lambda gone: _joined(matching.best(False, gone.to(torch.int8)))) if two_way else None,
        )  # fmt: skip
    size_a = (n + 1) // 2
    block = next_power(size_a)
    warps = 4 if block <= 1024 else 16
    r_forward = r // 2 if two_way else r
    backward = forward
    if two_way:
        gone = torch.empty((batch, size_a), dtype=torch.int8, device=metric.device)
        _sources_kernel[(batch,)](*forward, gone, size_a, forward[0].shape[1], r_forward, BLOCK=block, num_warps=warps)
        backward = matching.best(False, gone)
    dst = torch.empty((batch, n), dtype=torch.long, device=metric.device)
    roots = torch.empty((batch, n - r), dtype=torch.long, device=metric.device)
    _plan_kernel[(batch,)](
        *forward, *backward, dst, roots, n, r_forward, r - r_forward, forward[0].shape[1], backward[0].shape[1],
        TWO_WAY=two_way, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return MergePlan(dst, n - r, roots)
