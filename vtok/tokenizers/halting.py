"""A head that says in one pass how many tokens a picture needs (after KARL, arXiv 2507.07995).

KARL tokenizes once, measures the reconstruction's error, and teaches a head that a picture which reached this error
with T tokens may halt behind token T when asked for that error. Here nested dropout already decodes a random prefix
in every step; its error teaches the head, conditional on the error that is asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.errors import VtokError
from vtok.tokenizers.blocks import Norm

#: probability from which a prefix is held to be enough (KARL)
THRESHOLD = 0.75


class HaltingHead(nn.Module):
    """Logits that the prefix up to each register reaches a wanted error.

    Args:
        width: of the registers.
        hidden: units between.
        waves: sinusoids of the wanted error's logarithm.
    """

    def __init__(self, width: int, hidden: int = 128, waves: int = 16) -> None:
        super().__init__()
        self.waves = waves
        self.norm = Norm(width)
        self.read = nn.Linear(width, hidden)
        self.asked = nn.Linear(2 * waves + 1, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, registers: Tensor, quality: Tensor) -> Tensor:
        """(B, K) logits of registers (B, K, width) and wanted errors quality (B,), positive."""
        octave = quality.float().to(registers.device).clamp_min(1e-6).log2()[:, None]
        rate = 2.0 ** torch.linspace(-4, 2, self.waves, device=octave.device)
        asked = torch.cat([octave / 4, (octave * rate).sin(), (octave * rate).cos()], -1)
        hidden = self.read(self.norm(registers)) + self.asked(asked.to(registers.dtype))[:, None]
        return self.out(torch.tanh(hidden))[..., 0]


def halting_loss(logits: Tensor, keep: Tensor, error: Tensor, quality: Tensor) -> Tensor:
    """Cross-entropy on what one measured prefix tells about the others.

    Where ``keep`` tokens reach the wanted error, so do more; where they do not, neither do fewer.

    Args:
        logits: (B, K) of ``HaltingHead`` for ``quality``.
        keep: (B,) tokens of the measured prefix, in 1..K.
        error: (B,) its error.
        quality: (B,) the wanted error.
    """
    reached = (error <= quality).to(logits.device)
    length = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    keep = keep.to(logits.device)[:, None]
    known = torch.where(reached[:, None], length >= keep, length <= keep)
    target = reached[:, None].to(logits.dtype).expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * known
    return (loss.sum(1) / known.sum(1)).mean()


def ask(error: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(B,) wanted errors to train with, on the CPU: near the measured ones, where the answer is not plain."""
    return error.detach().cpu() * torch.exp2(torch.randn(len(error), generator=generator))


def halt(logits: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """(B,) long: the shortest prefix whose probability passes, K where none does."""
    passed = logits >= math.log(threshold / (1 - threshold))
    first = passed.int().argmax(1) + 1
    return torch.where(passed.any(1), first, logits.shape[1])


def wanted(quality: float, batch: int) -> Tensor:
    """(batch,) of one wanted error.

    Raises:
        VtokError: no positive number.
    """
    if isinstance(quality, bool) or not isinstance(quality, (int, float)) or not quality > 0:
        raise VtokError(f"quality={quality!r} must be a positive mean absolute error of pixels in [0, 1], such as 0.05")
    return torch.full((batch,), float(quality))
