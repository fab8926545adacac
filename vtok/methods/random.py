"""Random pruning: the baseline that costs nothing, and the speed ceiling of every bench."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vtok.method import Method, register
from vtok.view import View


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """Keep a uniform sample of every image, drawn per image from ``seed`` and its place in the prompt."""

    summary = "uniform sample of the visual tokens"
    site = "input"
    blind = True

    seed: int = 0

    def score(self, view: View) -> Tensor:
        return view.random(self.seed)
