"""DivPrune (arXiv 2503.02175, CVPR 2025): the subset whose closest pair is farthest apart, greedily."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.method import Method, register
from vtok.view import View


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Method):
    """Max-min diversity on cosine distance (paper section 3.2, algorithm 1).

    The first token is the one farthest from its nearest neighbour; every next one maximises the distance to the
    nearest token already taken.

    Args:
        compat: distances in the model's own precision, as released. The default computes them in fp32.
    """

    summary = "max-min cosine diversity"
    paper = "arXiv 2503.02175"
    site = "input"
    positions = "reindex"
    presets = {"9.8%": {"keep": 0.098}, "192": {"keep": 192}, "128": {"keep": 128}, "64": {"keep": 64}}  # noqa: RUF012

    compat: bool = False

    def select(self, view: View, count: int) -> Tensor:
        if not self.compat:
            return kernels.farthest_first(view.features.detach(), count)
        return _released(view.features.detach(), count)


def _released(features: Tensor, count: int) -> Tensor:
    """The selection on an N x N map of distances in the features' own precision."""
    unit = features / features.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)
    distance = 1 - unit @ unit.transpose(1, 2)
    batch = torch.arange(len(features), device=features.device)
    pick = distance.topk(min(2, distance.shape[1]), dim=1, largest=False).values[:, -1].argmax(1)
    picks = [pick]
    nearest = distance[batch, pick]
    for _ in range(count - 1):
        nearest[batch, pick] = -torch.inf  # released: taken tokens lose by their distance of 0 alone
        pick = nearest.argmax(1)
        picks.append(pick)
        nearest = torch.minimum(nearest, distance[batch, pick])
    return torch.stack(picks, 1).sort(1).values
