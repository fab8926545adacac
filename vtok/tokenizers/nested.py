"""Nested dropout: how many tokens a training step keeps, and what stands for the others (FlexTok section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.tokenizers.config import SAMPLERS


def sample_keep(sampler: str, count: int, batch: int, generator: torch.Generator | None = None) -> Tensor:
    """(batch,) long on the CPU, each in 1..count.

    - ``"uniform"``: every length is as likely as any other;
    - ``"pow2"``: 1, 2, 4, ... and ``count``, each as likely;
    - ``"uniform_pow2"``: uniform, then up to the next power of two, so half of all draws keep everything;
    - ``"mix"``: the first half of the batch pow2, the rest ``count``;
    - ``"none"``: ``count``.

    Raises:
        VtokError: unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise VtokError(f"there is no sampler {sampler!r}; known are {', '.join(SAMPLERS)}")
    if sampler == "none":
        return torch.full((batch,), count)
    if sampler == "uniform":
        return torch.randint(1, count + 1, (batch,), generator=generator)
    powers = torch.tensor(powers_of_two(count))
    if sampler == "uniform_pow2":
        drawn = torch.randint(1, count + 1, (batch,), generator=generator)
        return powers[torch.searchsorted(powers, drawn)]
    keep = powers[torch.randint(0, len(powers), (batch,), generator=generator)]
    if sampler == "mix":
        keep[batch // 2 :] = count
    return keep


def powers_of_two(count: int) -> list[int]:
    """1, 2, 4, ... below ``count``, then ``count``."""
    return [2**e for e in range((count - 1).bit_length())] + [count]


class NestedDropout(nn.Module):
    """Tokens behind the first ``keep`` of each sample become one learned vector; the sequence stays as long."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.mask, std=0.02)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """(B, K, width) from x (B, K, width) and keep (B,)."""
        kept = torch.arange(x.shape[1], device=x.device) < keep.to(x.device)[:, None]
        return torch.where(kept[..., None], x, self.mask.to(x.dtype))
