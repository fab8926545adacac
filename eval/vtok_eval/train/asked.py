"""What a batch of questions is made of and judged by: pooled tokens, a mask that keeps questions apart, the loss."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F


def pooled(features: Tensor, grid: tuple[int, int], pool: int) -> Tensor:
    """(tokens, D) averaged over squares of the grid; the last squares of an odd grid are smaller."""
    planes = features.view(1, *grid, -1).permute(0, 3, 1, 2)
    return F.avg_pool2d(planes, pool, ceil_mode=True).flatten(2)[0].T


def mask(block: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, L) additive: causal, the prefix (0) for all, a tail for itself, padding (-1) for nobody but itself.

    Dense on purpose: PyTorch's attention kernel for CPUs was three times slower on tails of 14 tokens apart.
    """
    same = block[:, :, None] == block[:, None, :]
    prefix = (block[:, None, :] == 0) & (block[:, :, None] >= 0)
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
    seen = (same | prefix) & causal
    return torch.zeros(seen.shape, dtype=dtype, device=block.device).masked_fill(~seen, float("-inf"))[:, None]


def score(logits: Tensor, target: Tensor, turn: Tensor, tasks: list[str]) -> tuple[Tensor, dict[str, float]]:
    each = F.cross_entropy(logits, target, reduction="none")
    _, number = turn.unique_consecutive(return_inverse=True)
    count = len(tasks)
    zeros = torch.zeros(count, device=logits.device)
    sizes = zeros.index_add(0, number, torch.ones_like(each))
    loss = (zeros.index_add(0, number, each) / sizes).mean()
    wrong = zeros.index_add(0, number, (logits.argmax(-1) != target).float())
    right: dict[str, list[float]] = defaultdict(list)
    for task, misses in zip(tasks, wrong.tolist(), strict=True):
        right[task].append(float(misses == 0))
    return loss, {task: sum(own) / len(own) for task, own in sorted(right.items())}
