"""TransPrune (arXiv 2507.20630, CVPR 2026): keep the tokens that layers change most, in size and direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.view import DecoderView, Shape, Stage


@register("transprune")
@dataclass(frozen=True)
class TransPrune(Method):
    """Token-transition values accumulated over a few layers, plus instruction-guided attention, prune three times.

    Layer numbers are those of a 32-layer decoder and scale with the depth (paper section 3; released code for the
    direction term, which is 1 - cos without absolute value).

    Args:
        accumulate: layers whose transitions are summed.
        prune_after: the cuts come after these layers.
        ratios: tokens left by each cut relative to the image ("High" of the paper).
        iga: add the attention that text after the image pays in the next layer.
        alpha: weight of that attention against the transitions (0.5: equal, as published).
        compat: transition softmax over the whole batch and counts rounded down, as released; the default takes each
            sample by itself and rounds to the nearest.
    """

    summary = "token transitions and instruction attention, three cuts"
    paper = "arXiv 2507.20630"
    site = "decoder"
    positions = "reindex"
    presets: ClassVar[dict[str, Any]] = {
        "high": {"keep": 0.41015625},
        "low": {"keep": 0.314453125, "ratios": (0.625, 0.1875, 0.0625)},
    }

    accumulate: tuple[int, ...] = (6, 7, 8, 9, 10, 11)
    prune_after: tuple[int, ...] = (6, 8, 11)
    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    iga: bool = True
    alpha: float = 0.5
    compat: bool = False

    def __post_init__(self) -> None:
        if not self.accumulate or not self.prune_after:
            raise VtokError(
                "transprune needs layers to watch (accumulate) and to cut after (prune_after); give one at least"
            )
        if len(self.prune_after) != len(self.ratios):
            raise VtokError(
                f"transprune has {len(self.prune_after)} cuts (prune_after) and {len(self.ratios)} ratios; give as many"
            )

    def stages(self, shape: Shape) -> Sequence[Stage]:
        cuts = [max(1, round((layer + 1) * shape.depth / 32)) for layer in self.prune_after]
        for i in range(1, len(cuts)):
            cuts[i] = max(cuts[i], cuts[i - 1] + 1)
        if cuts[-1] >= shape.depth:
            raise VtokError(f"transprune needs at least {len(cuts) + 1} decoder layers; this model has {shape.depth}")
        first = min(round(self.accumulate[0] * shape.depth / 32), cuts[0] - 1)
        skipped = set(range(self.accumulate[0], self.prune_after[-1] + 1)) - set(self.accumulate)
        reads = frozenset({"transition"} | ({"couple_batch"} if self.compat else set()))
        stages = []
        for number, (cut, ratio) in enumerate(zip(cuts, self.ratios, strict=True)):
            # every layer up to the last cut is observed once, by the stage that comes after it
            layers = range(first if number == 0 else cuts[number - 1], cut)
            observed = tuple(layer for layer in layers if round(layer * 32 / shape.depth) not in skipped)
            select = partial(self.cut, ratio)
            stages.append(Stage("decoder", cut, select, reads=reads, share=ratio, observed=observed))
        return stages

    def cut(self, ratio: float, view: DecoderView, count: int) -> Tensor:
        """What one cut leaves; the released code rounds the share of the image down."""
        exact = sum(part.length for part in view.parts) * ratio
        if self.compat and round(exact) == count:
            count = max(1, int(exact))
        score = _shares(view.transition()) * (1 - self.alpha)
        if self.iga:
            score = score + _shares(view.attention("instruction", of="next")) * self.alpha
        return kernels.topk(score, count)


def _shares(values: Tensor) -> Tensor:
    """Divide by the sum over the image."""
    return values / (values.sum(1, keepdim=True) + 1e-8)
