"""DivPrune (arXiv 2503.02175, CVPR 2025): the subset whose closest pair is farthest apart, greedily."""

from __future__ import annotations

from dataclasses import dataclass

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
        features = view.features if self.compat else view.features.float()
        return kernels.farthest_first(features.detach(), count)
