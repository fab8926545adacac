"""Which visual tokens a model's answers hang on: learnt from gradients, asked before any question.

Tokens that are merely unlike the rest need not matter (specks of a background do not), and what matters need not be
unlike. ZOO-Prune (arXiv 2509.24837) weighs diversity by sensitivity that it measures at the projector; here a small
head learns how much answers change with a token, and farthest-first traversal weighs distances by that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: weights are shares of a picture's saliency to this power, over the largest, and no smaller than FLOOR: with the share
#: itself few tokens all fall on what is asked about most (docs/decisions.md)
POWER, FLOOR = 0.5, 0.1


class SaliencyHead(nn.Module):
    """Logits of each token's share of its picture's saliency.

    Args:
        dim: channels of the tokens.
        hidden: units between.
    """

    def __init__(self, dim: int, hidden: int = 128) -> None:
        super().__init__()
        self.read = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., N) logits of standardised tokens (..., N, D); untrained all alike."""
        return self.out(nn.functional.gelu(self.read(x)))[..., 0]


def weights(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, N) factors on distances, between ``FLOOR`` and 1, from logits (B, N).

    Args:
        logits: of ``SaliencyHead``.
        mask: (B, N) bool, False on cells that show nothing.
    """
    logits = logits.float()
    seen = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    return (POWER * (logits - seen.amax(-1, keepdim=True))).exp().clamp(FLOOR, 1.0)


def energy(gradient: Tensor, spread: Tensor) -> Tensor:
    """(...) squared length of gradients (..., D) of an answer's log-probability, channels in units of their spread."""
    return (gradient.float() * spread).square().sum(-1)


def saliency_loss(logits: Sequence[Tensor], energies: Sequence[Tensor]) -> Tensor:
    """Cross-entropy to each token's share of the gradient's length, one question at a time: learnt from many, the head
    knows the mean over questions, each of which counts the same.

    Args:
        logits: of pictures, (n,) each.
        energies: of the same tokens; NaN where it was not measured. Pictures without any teach nothing.
    """
    total, count = sum(own.sum() * 0.0 for own in logits), 0
    for own, measured in zip(logits, energies, strict=True):
        known = measured.isfinite()
        length = measured[known].sqrt()
        if length.sum() > 0:
            total = total - (length / length.sum() * own[known].float().log_softmax(-1)).sum()
            count += 1
    return torch.as_tensor(total) / max(1, count)
