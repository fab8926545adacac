"""Greedy selection in Triton: the products of all tokens on tensor cores, then one launch that picks for a whole batch.

Max-min and max-sum keep a span in the registers of one program, which reads one row of the products a pick. A DPP also
reads all earlier factors a pick, more than one multiprocessor can: programs share a span's columns, and agree on each
pick through one word each in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import reference, register
from ..greedy import check_selection
from ._launch import INTERPRETED, devices, next_power, priority

LONGEST = 8192
"""Tokens whose products are held, 256 MiB an item; beyond, the reference makes rows when it needs them."""

COLUMNS = 64
"""Least columns of a DPP that a program gets: fewer would wait for each other longer than they work."""

HALVES = (torch.float16, torch.bfloat16)


@triton.jit
def _gram_kernel(
    x, gram, inverse, n, width, x_b, x_n, x_d, UPCAST: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):
    """One tile of the lower triangle of x x^T and its mirror image, which makes the result symmetric to the bit.

    Every entry sums its channels in one order, so equal rows tie. Tiles on the diagonal leave 1 / length of their rows,
    0 for a zero row.
    """
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    across = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)
    across = tl.where(across * (across + 1) // 2 > tile, across - 1, across)
    across = tl.where((across + 1) * (across + 2) // 2 <= tile, across + 1, across)
    down = tile - across * (across + 1) // 2
    row = (across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = (down * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    x += b * x_b
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, width, CHANNELS):
        channel = (start + tl.arange(0, CHANNELS)).to(tl.int64)
        left_at = x + row[:, None] * x_n + channel[None, :] * x_d
        right_at = x + column[None, :] * x_n + channel[:, None] * x_d
        left = tl.load(left_at, mask=(row < n)[:, None] & (channel < width)[None, :], other=0.0)
        right = tl.load(right_at, mask=(column < n)[None, :] & (channel < width)[:, None], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        # Three TF32 products are fp32's one; halves are exact as they are.
        product = tl.dot(left, right, product, input_precision="tf32x3")
    gram += b * n * n
    inside = (row < n)[:, None] & (column < n)[None, :]
    tl.store(gram + row[:, None] * n + column[None, :], product, mask=inside)
    if across == down:
        square = tl.sum(tl.where(row[:, None] == column[None, :], product, 0.0), 1)
        length = tl.sqrt(tl.where(square > 0.0, square, 1.0))
        tl.store(inverse + b * n + row, tl.where(square > 0.0, 1.0 / length, 0.0), mask=row < n)
    else:
        tl.store(gram + column[None, :] * n + row[:, None], product, mask=inside)


@triton.jit
def _nearest_kernel(gram, inverse, nearest, n, BLOCK: tl.constexpr):
    """Cosine distance of one token a program to its nearest other token."""
    token = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    own = tl.load(inverse + b * n + token)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        other = start + tl.arange(0, BLOCK)
        product = tl.load(gram + (b * n + token) * n + other, mask=other < n, other=0.0)
        cosine = product * (tl.load(inverse + b * n + other, mask=other < n, other=0.0) * own)
        highest = tl.maximum(highest, tl.where((other < n) & (other != token), cosine, float("-inf")))
    tl.store(nearest + b * n + token, tl.maximum(1.0 - tl.max(highest, 0), 0.0))


@triton.jit
def _choose(score, taken, inside):
    """Where the score is highest among what is not taken; the lower index among equals, NaN first, as torch does."""
    score = tl.where(score == score, score, float("inf"))
    # A finite floor: an untaken token of score -inf still comes before taken ones.
    score = tl.maximum(score, -3.4028234663852886e38)
    return tl.argmax(tl.where((taken == 0) & inside, score, float("-inf")), 0)


@triton.jit
def _pick_kernel(
    gram, inverse, weights, first, picks, n, k, weights_b, weights_n, first_b,
    OBJECTIVE: tl.constexpr, WEIGHTED: tl.constexpr, GIVEN: tl.constexpr, SORT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One span a program: k picks by distance ("far"), running sum ("sum") or running maximum ("min") of cosines."""
    b = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    inside = token < n
    scale = tl.load(inverse + b * n + token, mask=inside, other=0.0)
    weight = tl.full((BLOCK,), 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + b * weights_b + token.to(tl.int64) * weights_n, mask=inside, other=0.0)
        weight = weight.to(tl.float32)
    taken = tl.zeros((BLOCK,), tl.int32)
    if GIVEN:
        # A pick that does not exist must not become an address.
        pick = tl.minimum(tl.maximum(tl.load(first + b * first_b), 0), n - 1).to(tl.int32)
    else:
        distance = tl.load(first + b * n + token, mask=inside, other=0.0)
        pick = _choose(distance * weight, taken, inside).to(tl.int32)
    if OBJECTIVE == "far":
        state = tl.full((BLOCK,), float("inf"), tl.float32)
    elif OBJECTIVE == "sum":
        state = tl.zeros((BLOCK,), tl.float32)
    else:
        state = tl.full((BLOCK,), float("-inf"), tl.float32)
    for step in range(k):
        taken = tl.where(token == pick, 1, taken)
        if not SORT:
            tl.store(picks + b * k + step, pick.to(tl.int64))
        own = tl.load(inverse + b * n + pick)
        cosine = tl.load(gram + (b * n + pick) * n + token, mask=inside, other=0.0) * (scale * own)
        if OBJECTIVE == "far":
            state = tl.minimum(state, tl.maximum(1.0 - cosine, 0.0))
            score = state * weight
        elif OBJECTIVE == "sum":
            state += cosine
            score = -state
        else:
            state = tl.maximum(state, cosine)
            score = -state
        pick = _choose(score, taken, inside).to(tl.int32)
    if SORT:
        place = tl.cumsum(taken, 0) - 1
        tl.store(picks + b * k + place, token.to(tl.int64), mask=taken != 0)


@triton.jit
def _dpp_kernel(
    gram, inverse, relevance, factors, residual, mail, picks, n, k, low, high, relevance_b, relevance_n,
    RELEVANT: tl.constexpr, TOGETHER: tl.constexpr, PROGRAMS: tl.constexpr, BOXES: tl.constexpr,
    BLOCK: tl.constexpr, EARLIER: tl.constexpr,
):  # fmt: skip
    """Steps low to high of an incremental Cholesky factorisation, BLOCK columns a program.

    A step takes the best of the PROGRAMS words of the step before, adds a row of factors, and mails its own best column
    as one word: the bits of its residual (not negative, so they order as integers; -1 once taken), then ~index. No word
    is 0, and none is written twice, so a word that is not 0 is the whole message. TOGETHER: programs run side by side
    and wait for each other; otherwise a launch is one step.
    """
    program = tl.program_id(0)
    b = (program // PROGRAMS).to(tl.int64)
    part = program % PROGRAMS
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < n
    scale = tl.load(inverse + b * n + column, mask=inside, other=0.0)
    r = tl.full((BLOCK,), 1.0, tl.float32)
    if RELEVANT:
        r = tl.load(relevance + b * relevance_b + column.to(tl.int64) * relevance_n, mask=inside, other=0.0)
        r = r.to(tl.float32)
    gram += b * n * n
    factors += b * k * n
    mail += b * k * PROGRAMS
    box = tl.arange(0, BOXES)
    if low == 0:
        # r^2 by construction; the rounded squares of unit rows would decide between equals.
        left = tl.where(inside, tl.where(scale > 0.0, r * r, 0.0), -1.0)
    else:
        left = tl.load(residual + b * n + column, mask=inside, other=-1.0)
    for step in range(low, high):
        if step > 0:
            at = mail + (step - 1) * PROGRAMS + box
            words = tl.load(at, mask=box < PROGRAMS, other=-9223372036854775807, volatile=True)
            if TOGETHER:
                while tl.min((words != 0).to(tl.int32), 0) == 0:
                    words = tl.load(at, mask=box < PROGRAMS, other=-9223372036854775807, volatile=True)
                # Factors that were written before the words are read after them.
                words = tl.inline_asm_elementwise(
                    "{ fence.acq_rel.gpu; mov.b64 $0, $1; }", "=l,l", [words], tl.int64, is_pure=False, pack=1
                )
                tl.debug_barrier()
            best = tl.max(words, 0)
            pick = 0xFFFFFFFF - (best & 0xFFFFFFFF)
            if part == 0:
                tl.store(picks + b * k + step - 1, pick)
            if step < k:
                pivot = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                own = tl.load(inverse + b * n + pick)
                own_r = 1.0
                if RELEVANT:
                    own_r = tl.load(relevance + b * relevance_b + pick * relevance_n).to(tl.float32)
                product = tl.load(gram + pick * n + column, mask=inside, other=0.0)
                explained = tl.zeros((BLOCK,), tl.float32)
                for start in range(0, step - 1, EARLIER):
                    row = (start + tl.arange(0, EARLIER)).to(tl.int64)
                    before = row < step - 1
                    factor_at = factors + row[:, None] * n + column[None, :]
                    factor = tl.load(factor_at, mask=before[:, None] & inside[None, :], other=0.0)
                    # Another program's, maybe: past the first-level cache.
                    its = tl.load(factors + row * n + pick, mask=before, other=0.0, cache_modifier=".cg")
                    explained += tl.sum(factor * its[:, None], 0)
                # A pick inside the span of earlier ones explains nothing new; dividing by its noise would.
                useful = pivot > own_r * own_r * 1.1920928955078125e-07
                root = tl.sqrt(tl.where(useful, pivot, 1.0))
                new = tl.where(useful, (own_r * r * (product * (scale * own)) - explained) / root, 0.0)
                tl.store(factors + (step - 1) * n + column, new, mask=inside)
                left = tl.where((left < 0.0) | (column == pick), -1.0, tl.maximum(left - new * new, 0.0))
                left = tl.where(left == left, left, float("inf"))
        if step < k:
            value = tl.max(left, 0)
            place = (part * BLOCK + tl.argmax(left, 0)).to(tl.int64)
            word = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0xFFFFFFFF - place)
            tl.debug_barrier()
            tl.atomic_xchg(mail + step * PROGRAMS + part, word, sem="release")
    tl.store(residual + b * n + column, left, mask=inside)


def covers(x: Tensor, k: int, *per_token: Tensor | None) -> bool:
    """Whether kernels serve this; what they leave, wrong arguments too, the reference answers."""
    known = x.dtype in (torch.float32, *HALVES) and x.dim() == 3 and 0 < k <= x.shape[1] <= LONGEST
    return known and x.shape[0] > 0 and all(t is None or t.device == x.device for t in per_token)


def gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """x x^T (B, N, N) in fp32, and 1 / length of each row (B, N), 0 for a zero row."""
    batch, n, width = x.shape
    products = torch.empty(batch, n, n, dtype=torch.float32, device=x.device)
    inverse = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    half = x.dtype in HALVES
    # 2,880 tokens are 276 large tiles, two a multiprocessor of an H100; 576 would be 15, so small ones: 45.
    block = 128 if half and n > 1024 else (64 if n > 32 else 32)
    if INTERPRETED:
        block = min(block, max(16, next_power(n) // 2))
    tiles = triton.cdiv(n, block)
    _gram_kernel[(tiles * (tiles + 1) // 2, batch)](
        x, products, inverse, n, width, *x.stride(), UPCAST=INTERPRETED and half, BLOCK=block,
        CHANNELS=64 if half else 32, num_warps=8 if block == 128 else 4, num_stages=4 if half else 3,
    )  # fmt: skip
    return products, inverse


def nearest_other(products: Tensor, inverse: Tensor) -> Tensor:
    """Cosine distance (B, N) of each token to its nearest other token."""
    batch, n = inverse.shape
    nearest = torch.empty_like(inverse)
    _nearest_kernel[(n, batch)](products, inverse, nearest, n, BLOCK=min(next_power(n), 1024))
    return nearest


def _pick(x: Tensor, k: int, first: Tensor | None, weights: Tensor | None, objective: str, sort: bool) -> Tensor:
    batch, n, _ = x.shape
    products, inverse = gram(x)
    start = nearest_other(products, inverse) if first is None else first
    weight = inverse if weights is None else weights
    picks = torch.empty(batch, k, dtype=torch.long, device=x.device)
    block = next_power(n)
    _pick_kernel[(batch,)](
        products, inverse, weight, start, picks, n, k, *weight.stride(), start.stride(0), OBJECTIVE=objective,
        WEIGHTED=weights is not None, GIVEN=first is not None, SORT=sort, BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return picks


@register("farthest_first", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def farthest_first(
    x: Tensor, k: int, *, weights: Tensor | None = None, first: Tensor | None = None, sort: bool = True
) -> Tensor:
    """`vtok_kernels.farthest_first` in two launches, three without `first`."""
    if not covers(x, k, weights, first):
        return reference("farthest_first")(x, k, weights=weights, first=first, sort=sort)
    check_selection(x, k, first=first, weights=weights)
    return _pick(x, k, first, weights, "far", sort)


@register("max_sum", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def max_sum(x: Tensor, k: int, pivot: Tensor, *, objective: str = "sum", sort: bool = True) -> Tensor:
    """`vtok_kernels.max_sum` in two launches."""
    if not covers(x, k, pivot) or objective not in ("sum", "min"):
        return reference("max_sum")(x, k, pivot, objective=objective, sort=sort)
    check_selection(x, k, first=pivot, name="pivot")
    return _pick(x, k, pivot, None, objective, sort)


def _programs(n: int, batch: int, device: torch.device) -> int:
    """Programs that share a span: all of them must run at once, or one would wait for a word that never comes."""
    if device.type != "cuda":
        return triton.cdiv(n, 16)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(n, COLUMNS), processors // batch))


@register("dpp_map", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def dpp_map(x: Tensor, k: int, relevance: Tensor | None = None, *, sort: bool = True) -> Tensor:
    """`vtok_kernels.dpp_map` in two launches."""
    if not covers(x, k, relevance):
        return reference("dpp_map")(x, k, relevance, sort=sort)
    check_selection(x, k, relevance=relevance)
    batch, n, _ = x.shape
    products, inverse = gram(x)
    block = next_power(triton.cdiv(n, _programs(n, batch, x.device)))
    programs = triton.cdiv(n, block)
    r = inverse if relevance is None else relevance
    factors = torch.empty(batch, k, n, dtype=torch.float32, device=x.device)
    residual = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    mail = torch.zeros(batch, k, programs, dtype=torch.long, device=x.device)
    picks = torch.empty(batch, k, dtype=torch.long, device=x.device)
    together = x.device.type == "cuda" and programs > 1
    steps = [(0, k + 1)] if together or programs == 1 else [(step, step + 1) for step in range(k + 1)]
    for low, high in steps:
        _dpp_kernel[(batch * programs,)](
            products, inverse, r, factors, residual, mail, picks, n, k, low, high, *r.stride(),
            RELEVANT=relevance is not None, TOGETHER=together, PROGRAMS=programs, BOXES=next_power(programs),
            BLOCK=block, EARLIER=max(1, min(32, 4096 // block)), num_warps=4 if block <= 256 else 16,
            **({"launch_cooperative_grid": True} if together else {}),
        )  # fmt: skip
    return picks.sort(dim=1).values if sort else picks
