"""Statistics of discrete visual tokens, those of "Analyzing the Language of Visual Tokens" (arXiv 2411.05001).

How often codes occur (Zipf's law), how soon a sample has shown all of them (innovation), how much each position says
(entropy), and how far the sequence can be compressed. They need tokens alone, of any tokenizer. Of that paper,
Benford's law, parts of objects and grammars are left out.
"""

from __future__ import annotations

import gzip
import heapq
import lzma
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vtok.errors import VtokError

ABSENT = -1
#: a position whose entropy is below this share of what it could be is dead
DEAD = 0.1
NGRAMS = 4
#: a power law is fitted to as many draws at least
LEAST = 100


@dataclass(frozen=True)
class Zipf:
    """p(rank) proportional to rank ** -exponent.

    Attributes
    ----------
    n : int
        Length of the n-grams.
    exponent, error : float or None
        By maximum likelihood, and its standard error; about 1 for words. ``None`` where next to nothing occurs twice.
    distance : float or None
        Kolmogorov-Smirnov: the largest difference between the two distribution functions.
    distinct : int
        n-grams seen.
    entropy : float
        Bits an n-gram.
    """

    n: int
    exponent: float | None
    error: float | None
    distance: float | None
    distinct: int
    entropy: float


@dataclass(frozen=True)
class Position:
    """What one place of the sequence says.

    Attributes
    ----------
    position : int
        From 0.
    images : int
        That have a token there.
    distinct : int
        Codes seen.
    entropy : float
        Bits.
    ceiling : float
        Bits that it could have: of all codes, or of so few images.
    top : float
        Share of the commonest code.
    channels : float or None
        Entropies of a factorised code's channels, summed, bits; needs fewer images than the code as a whole.
    dead : bool
        Says next to nothing (below ``DEAD`` of the ceiling).
    """

    position: int
    images: int
    distinct: int
    entropy: float
    ceiling: float
    top: float
    channels: float | None
    dead: bool


@dataclass(frozen=True)
class Compression:
    """Bits a token under several codes.

    Attributes
    ----------
    fixed : float
        log2 of the number of codes.
    entropy : float
        Of single tokens, wherever they stand.
    huffman : float
        Of the best prefix code for single tokens.
    saved : float
        Share of ``fixed`` that it saves.
    by_position : float
        Entropy of a token whose position is known.
    gzip, lzma : float
        Of the whole file.
    shuffled : float
        LZMA after each position's tokens were dealt to other images: what ``lzma`` is below it, tokens of an image tell
        of each other.
    """

    fixed: float
    entropy: float
    huffman: float
    saved: float
    by_position: float
    gzip: float
    lzma: float
    shuffled: float


@dataclass(frozen=True)
class Statistics:
    """All of it.

    Attributes
    ----------
    images, tokens : int
        Sequences, and tokens in all.
    codes : int
        Size of the codebook.
    used : int
        Codes seen.
    zipf : tuple of Zipf
        For n-grams of 1 to 4 tokens.
    innovation : tuple of (images, share)
        How many of the codes seen at all, the first images show.
    positions : tuple of Position
        One a place.
    dead_tail : int
        Dead positions behind the last living one.
    compression : Compression
        Bits a token.
    """

    images: int
    tokens: int
    codes: int
    used: int
    zipf: tuple[Zipf, ...]
    innovation: tuple[tuple[int, float], ...]
    positions: tuple[Position, ...]
    dead_tail: int
    compression: Compression

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def statistics(
    tokens: Tensor | Sequence[Tensor], codes: int | None = None, *, levels: Sequence[int] = (), seed: int = 0
) -> Statistics:
    """Measure a sample of token sequences.

    Parameters
    ----------
    tokens : Tensor or sequence of Tensor
        (N, K) whole numbers, or N sequences of different lengths.
    codes : int, optional
        Size of the codebook; one more than the largest token by default.
    levels : sequence of int
        Of a code that is a mixed-radix number, the lowest digit first (FSQ's levels, or twos for binary codes).
    seed : int
        Of splits and shuffles.

    Raises
    ------
    VtokError
        No tokens, tokens that are no whole numbers or out of range, or levels that do not multiply to ``codes``.
    """
    table = padded(tokens)
    here = table != ABSENT
    count = int(here.sum())
    if not count:
        raise VtokError("there are no tokens to count; encode some pictures first")
    largest = int(table.max())
    codes = largest + 1 if codes is None else codes
    if largest >= codes or int(table[here].min()) < 0:
        raise VtokError(f"tokens must be from 0 to {codes - 1}, but there is {largest}; say how many codes there are")
    if levels and math.prod(levels) != codes:
        raise VtokError(f"levels {tuple(levels)} make {math.prod(levels)} codes, not {codes}; give those of the tokens")
    positions = tuple(_position(i, column, codes, levels) for i, column in enumerate(table.T))
    living = [p.position for p in positions if not p.dead]
    seen = _counts(table[here])
    return Statistics(
        images=len(table),
        tokens=count,
        codes=codes,
        used=len(seen),
        zipf=_ngrams(table, seed),
        innovation=_innovation(table),
        positions=positions,
        dead_tail=len(positions) - 1 - (living[-1] if living else -1),
        compression=_compression(table, codes, positions, seed),
    )


def padded(tokens: Tensor | Sequence[Tensor]) -> Tensor:
    """(N, K) long, ``ABSENT`` where a shorter sequence has ended."""
    rows = list(tokens)
    if any(row.is_floating_point() for row in rows):
        raise VtokError(
            "these are continuous tokens, which have no codes to count; take a tokenizer with fsq, vq or binary"
        )
    if not rows or any(row.ndim != 1 for row in rows):
        raise VtokError("tokens must be a table (images, positions) or a list of sequences, with one image at least")
    return torch.nn.utils.rnn.pad_sequence([row.long().cpu() for row in rows], True, ABSENT)


def entropy(counts: Tensor) -> float:
    """Bits of a distribution from counts of it, with Miller and Madow's correction for few draws."""
    total = counts.sum().double()
    share = counts.double() / total
    plain = -torch.xlogy(share, share).sum()
    return float(plain + (len(counts) - 1) / (2 * total)) / math.log(2)


def zipf(counts: Tensor, again: Tensor | None = None) -> tuple[float, float, float] | None:
    """Exponent of a power law of rank, its standard error, and the Kolmogorov-Smirnov distance.

    Ranks by ``counts``, frequencies from ``again``, a second sample: from one sample alone the commonest would always
    seem common, and a uniform distribution would have a slope (Piantadosi 2014). The law ends with the last one that
    the first sample has seen.

    Parameters
    ----------
    counts, again : Tensor
        (V,) how often each occurs; ``again`` is ``counts`` by default.

    Returns
    -------
    tuple of float or None
        ``None`` where fewer than ``LEAST`` of the second sample are left, or all of them are the same.
    """
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    drawn = (counts if again is None else again)[order].double()
    total, logs = drawn.sum(), torch.arange(1, len(drawn) + 1, dtype=torch.float64).log()
    if total < LEAST or len(drawn) < 2:
        return None
    wanted = (drawn * logs).sum() / total
    low, high = -4.0, 40.0
    for _ in range(60):  # the mean log rank falls with the exponent
        middle = (low + high) / 2
        law = torch.softmax(-middle * logs, 0)
        low, high = (middle, high) if (law * logs).sum() > wanted else (low, middle)
    spread = (law * logs.square()).sum() - (law * logs).sum().square()
    distance = (law.cumsum(0) - drawn.cumsum(0) / total).abs().max()
    return middle, float((total * spread).rsqrt()), float(distance)


def huffman(counts: Tensor) -> float:
    """Mean length of the best prefix code, bits; 0 for one symbol alone."""
    heap = counts.tolist()
    total, length = sum(heap), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        length += joined
        heapq.heappush(heap, joined)
    return length / total


def _counts(values: Tensor) -> Tensor:
    return values.unique(return_counts=True)[1]


def _position(number: int, column: Tensor, codes: int, levels: Sequence[int]) -> Position:
    column = column[column != ABSENT]
    counts = _counts(column)
    ceiling = math.log2(min(codes, len(column)))
    bits = min(entropy(counts), ceiling)
    channels = None
    if levels:
        channels, left = 0.0, column
        for level in levels:
            channels += min(entropy(_counts(left % level)), math.log2(level))
            left = left // level
    top = int(counts.max()) / len(column)
    return Position(number, len(column), len(counts), bits, ceiling, top, channels, bits < DEAD * ceiling)


def _ngrams(table: Tensor, seed: int) -> tuple[Zipf, ...]:
    """Of sequences cut into two halves at random: ranks by one, frequencies from the other."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(len(table), dtype=torch.bool)
    first[torch.randperm(len(table), generator=generator)[: len(table) // 2]] = True
    found = []
    grams = table
    for n in range(1, min(NGRAMS, table.shape[1]) + 1):
        if n > 1:  # number the pairs of (what stood before, next token) anew: they stay small
            pairs = grams[:, :-1] * (int(table.max()) + 1) + table[:, n - 1 :]
            grams = pairs.masked_fill((grams[:, :-1] == ABSENT) | (table[:, n - 1 :] == ABSENT), ABSENT)
        here = grams != ABSENT
        if not here.any():
            break
        numbers = grams[here].unique(return_inverse=True)[1]
        grams = grams.masked_scatter(here, numbers)
        size = int(numbers.max()) + 1
        counts = torch.bincount(numbers, minlength=size)
        half = first[:, None].expand_as(here)
        parts = [torch.bincount(grams[here & side], minlength=size) for side in (half, ~half)]
        exponent, error, distance = zipf(*parts) or (None, None, None)
        found.append(Zipf(n, exponent, error, distance, size, entropy(counts)))
    return tuple(found)


def _innovation(table: Tensor) -> tuple[tuple[int, float], ...]:
    """At 1, 2, 4, ... and all images."""
    where = torch.arange(len(table))[:, None].expand_as(table)[table != ABSENT]
    _, code = table[table != ABSENT].unique(return_inverse=True)
    distinct = int(code.max()) + 1
    shown = torch.full((distinct,), len(table)).scatter_reduce(0, code, where, "amin")
    powers = [1 << power for power in range(len(table).bit_length())]
    marks = powers if powers[-1] == len(table) else [*powers, len(table)]
    return tuple((mark, int((shown < mark).sum()) / distinct) for mark in marks)


def _compression(table: Tensor, codes: int, positions: tuple[Position, ...], seed: int) -> Compression:
    flat = table[table != ABSENT]
    counts = _counts(flat)
    fixed = math.log2(codes)
    generator = torch.Generator().manual_seed(seed)
    dealt = table.clone()
    for column in dealt.T:
        own = (column != ABSENT).nonzero().flatten()
        column[own] = column[own[torch.randperm(len(own), generator=generator)]]
    raw, mixed = _bytes(flat, codes), _bytes(dealt[dealt != ABSENT], codes)
    known = sum(p.entropy * p.images for p in positions) / len(flat)
    best = huffman(counts)
    packed = [
        len(data) * 8 / len(flat) for data in (gzip.compress(raw, mtime=0), lzma.compress(raw), lzma.compress(mixed))
    ]
    saved = 1 - best / fixed if fixed else 0.0
    return Compression(fixed, entropy(counts), best, saved, known, *packed)


def _bytes(flat: Tensor, codes: int) -> bytes:
    """One, two, four or eight bytes a token, as few as hold every code."""
    kinds = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}
    kind = kinds[next(size for size in kinds if codes <= 256**size)]
    return flat.to(kind).numpy().tobytes()
