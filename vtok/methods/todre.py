"""ToDRE (arXiv 2505.18757): a diverse subset before the decoder, and none at all once text stops looking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.view import DecoderView, Shape, Stage, View


@register("todre")
@dataclass(frozen=True)
class ToDRE(Method):
    """Stage 1 (paper section 3.2): greedy diversity from a pivot. Stage 2 (section 3.3): drop all visual tokens of a
    sample behind decoder layer ``decision * depth`` when both attention masses between text and visual tokens are
    below ``tau``.

    With a causal mask and the image before the question, visual tokens see no text, so the second mass is 0 and the
    first alone decides.

    Args:
        pivot: ``"cls"`` (most attended by the class token; random where there is none), ``"random"``, ``"center"``.
        objective: ``"sum"`` (v2: smallest sum of similarities to the chosen) or ``"min"`` (v1: k-center).
        decision: share of the depth after which stage 2 decides; ``None`` leaves stage 2 out.
        tau: threshold on the masses.
        seed: of the random pivot.
    """

    summary = "max-sum diversity, then all-or-nothing at 7/8 depth"
    paper = "arXiv 2505.18757"
    site = "input"
    positions = "reindex"
    late = "decision"
    presets = {"25%": {"keep": 0.25}, "10%": {"keep": 0.10}}  # noqa: RUF012

    pivot: str = "cls"
    objective: str = "sum"
    decision: float | None = 7 / 8
    tau: float = 0.10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pivot not in ("cls", "random", "center"):
            raise VtokError(f'todre pivot={self.pivot!r} is unknown; take "cls", "random" or "center"')
        if self.objective not in ("sum", "min"):
            raise VtokError(f'todre objective={self.objective!r} is unknown; take "sum" (v2) or "min" (v1)')

    def variants(self, shape: Shape) -> list[dict[str, Any]]:
        return [{"decision": None}, {"decision": 0.5}]

    def stages(self, shape: Shape) -> Sequence[Stage]:
        reads = frozenset({"saliency"}) if self.pivot == "cls" and shape.has_cls else frozenset()
        first = Stage("input", select=self.select, reads=reads)
        layer = None if self.decision is None else int(self.decision * shape.depth) + 1
        if layer is None or layer >= shape.depth:
            return (first,)
        return first, Stage("decoder", layer, self.decide, reads=frozenset({"attention"}), floor=0)

    def select(self, view: View, count: int) -> Tensor:
        return kernels.max_sum(view.features.detach(), count, self._pivot(view), objective=self.objective)

    def _pivot(self, view: View) -> Tensor:
        """(G,) the token that everything starts from; of the thumbnail where there is one."""
        if self.pivot == "center":
            own = view.parts[0] if view.parts else None
            middle = view.size // 2 if own is None else own.height // 2 * own.width + own.width // 2
            return torch.full((view.features.shape[0],), min(middle, view.size - 1), device=view.features.device)
        scores = view.random(self.seed) if self.pivot == "random" or view.saliency is None else view.saliency
        if view.base:
            scores = scores.masked_fill(view.tokens >= view.base, float("-inf"))
        return kernels.topk(scores, 1)[:, 0]

    def decide(self, view: DecoderView, count: int) -> Tensor:
        """All or nothing, per sample (equations 6-8)."""
        text_to_visual, visual_to_text = view.mass()
        gone = (text_to_visual < self.tau) & (visual_to_text < self.tau)
        return ~gone[:, None].expand(-1, view.size)
