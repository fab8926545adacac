"""How many tokens a picture needs: enough that a model says what it says with all of them.

KARL (arXiv 2507.07995) teaches a head, in one pass, from which token on a picture's reconstruction is good enough.
Nothing is reconstructed here; what counts is the answer, and the head learns how often it stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.tokenizers.blocks import Norm


class AgreementHead(nn.Module):
    """Logits that answers stay the same with the prefix up to each register.

    Args:
        width: of the registers.
        hidden: units between.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.read = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, registers: Tensor) -> Tensor:
        """(..., k) logits of registers (..., k, width)."""
        return self.out(torch.tanh(self.read(self.norm(registers))))[..., 0]


def enough(logits: Tensor, quality: float) -> Tensor:
    """(B,) long: the shortest prefix from which on all are likely enough to do; all k where none is. A higher quality
    never asks for fewer.

    The first that passes would often be one whose probability is overrated (docs/decisions.md).

    Args:
        logits: (B, k) of ``AgreementHead``.
        quality: probability, in (0, 1).
    """
    passed = (logits.float().sigmoid() >= quality).int()
    lasting = passed.flip(1).cumprod(1).flip(1)
    return torch.where(lasting.any(1), lasting.argmax(1) + 1, logits.shape[1])


def agreement_loss(logits: Sequence[Tensor], same: Tensor) -> Tensor:
    """Cross-entropy on whether answers stayed the same. All pictures of a question must have tokens enough for that,
    each on its own account: their probabilities multiply.

    Args:
        logits: for each of Q questions, those of its pictures at the prefixes that were given, (pictures,).
        same: (Q,) bool: the answer was the one that all tokens give.
    """
    log = torch.stack([F.logsigmoid(own.float()).sum() for own in logits])
    rest = torch.log(-torch.expm1(log.clamp_max(-1e-6)))
    return -torch.where(same.to(log.device), log, rest).mean()


def same_answers(said: Tensor, teacher: Tensor, turn: Tensor) -> Tensor:
    """(Q,) bool: every token of an answer is the teacher's, in the order of the answers' numbers.

    Args:
        said, teacher: (A,) most likely tokens.
        turn: (A,) a number that tokens of one answer share.
    """
    numbers, where = turn.unique(return_inverse=True)
    wrong = torch.zeros(len(numbers), device=turn.device).index_add_(0, where, (said != teacher).float())
    return wrong == 0
