"""TokenBridge (arXiv 2503.16430): continuous tokens to a few bits a channel, after training and without any.

Each channel is read as a normal distribution and cut into bins of equal probability; a bin is decoded to its mean. For
storing or caching continuous tokens: a tokenizer's (``quantiser="kl"`` or ``"none"``), or visual tokens of a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtok.errors import VtokError

#: standard deviations within which a channel is resolved
CLIP = 3.0


def normal_bins(bits: int, clip: float = CLIP) -> tuple[Tensor, Tensor]:
    """(2^bits - 1,) inner edges and (2^bits,) means of equally likely bins of a standard normal cut off at +-clip.

    Raises:
        VtokError: bits outside 1..8.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise VtokError(f"bits={bits!r} must be a whole number from 1 to 8, so that a channel fits a byte")
    low = torch.special.ndtr(torch.tensor(-clip, dtype=torch.float64))
    share = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
    probability = low + share * (1 - 2 * low)
    edges = torch.special.ndtri(probability)
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    means = (density[:-1] - density[1:]) / probability.diff()
    return edges[1:-1].float(), means.float()


@dataclass(frozen=True)
class TokenBridge:
    """Codes of continuous tokens (..., d), ``bits`` a channel.

    Args:
        bits: a channel, 1 to 8; 6 in the paper.
        centre: (d,) or a number: what is taken for a channel's mean.
        spread: (d,) or a number: what is taken for its standard deviation. The default is the paper's, which maps +-5
            to +-3 standard deviations.

    Raises:
        VtokError: bits outside 1..8, or a spread that is not positive.
    """

    bits: int = 6
    centre: Tensor = field(default_factory=lambda: torch.zeros(()))
    spread: Tensor = field(default_factory=lambda: torch.tensor(5.0 / CLIP))

    def __post_init__(self) -> None:
        normal_bins(self.bits)
        for name in ("centre", "spread"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float32))
        if not bool((self.spread > 0).all()):
            raise VtokError("spread must be positive in every channel; TokenBridge.fit measures it on tokens")

    @classmethod
    def fit(cls, tokens: Tensor, bits: int = 6) -> TokenBridge:
        """With each channel's own mean and standard deviation, measured on tokens (..., d).

        Raises:
            VtokError: fewer than two tokens, or some that are not finite.
        """
        rows = _finite(tokens).flatten(0, -2)
        if len(rows) < 2:
            raise VtokError("one token says nothing about spread; give at least two")
        return cls(bits, rows.mean(0), rows.std(0).clamp_min(1e-6))

    def encode(self, tokens: Tensor) -> Tensor:
        """(..., d) uint8 codes of tokens (..., d)."""
        edges = normal_bins(self.bits)[0].to(tokens.device)
        unit = (_finite(tokens) - self.centre.to(tokens.device)) / self.spread.to(tokens.device)
        return torch.bucketize(unit, edges).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """(..., d) fp32 tokens of codes (..., d).

        Raises:
            VtokError: codes beyond 2^bits.
        """
        if codes.is_floating_point() or (codes.numel() and int(codes.max()) >= 2**self.bits):
            raise VtokError(f"codes must be whole numbers below {2**self.bits}, as encode with bits={self.bits} gives")
        values = normal_bins(self.bits)[1].to(codes.device)[codes.long()]
        return values * self.spread.to(codes.device) + self.centre.to(codes.device)

    def pack(self, codes: Tensor) -> Tensor:
        """(bytes,) uint8: codes of any shape, ``bits`` each without gaps, highest bit first."""
        place = torch.arange(self.bits - 1, -1, -1, device=codes.device)
        bits = (codes.flatten()[:, None].long() >> place & 1).flatten()
        bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).unflatten(0, (-1, 8))
        return (bits << torch.arange(7, -1, -1, device=codes.device)).sum(1).to(torch.uint8)

    def unpack(self, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Codes of that shape from what ``pack`` gave.

        Raises:
            VtokError: another number of bytes than the shape needs.
        """
        count = math.prod(shape)
        if packed.numel() != math.ceil(count * self.bits / 8):
            raise VtokError(f"{packed.numel()} bytes do not hold {count} codes of {self.bits} bits; give their shape")
        bits = (packed.long()[:, None] >> torch.arange(7, -1, -1, device=packed.device) & 1).flatten()
        bits = bits[: count * self.bits].unflatten(0, (count, self.bits))
        weight = 2 ** torch.arange(self.bits - 1, -1, -1, device=packed.device)
        return (bits * weight).sum(1).to(torch.uint8).reshape(shape)


def _finite(tokens: Tensor) -> Tensor:
    if tokens.ndim < 2 or not tokens.is_floating_point() or not bool(tokens.isfinite().all()):
        raise VtokError("tokens must be finite floats (..., channels)")
    return tokens.float()
