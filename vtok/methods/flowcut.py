"""FlowCut (arXiv 2505.19536, NeurIPS 2025): cut by the information flow that the class token sees, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.view import DecoderView, Shape, Stage, TowerView


@register("flowcut")
@dataclass(frozen=True)
class FlowCut(Method):
    """Cumulative flow score inside the tower, cut every other layer by an entropy schedule (paper section 4).

    Per layer: ``S = (a + s) * g`` from the attention row ``a`` and the value row ``s`` of the global token and the
    information density ``g``; ``C = ema * C + (1 - ema) * S``. The global token is the class token; where the tower
    has none, the mean query over the tile (and attention alone, as in the released Qwen2-VL code). On tiled and Qwen
    families a second cut follows inside the decoder, scored by the last prompt token.

    Args:
        every: layers between two cuts, counted back from the feature layer.
        ema: weight of the running score.
        semantic: use the value row ``s``.
        llm_layer: decoder cut comes after this layer; ``None`` leaves it out. Plain LLaVA-1.5 never has one.
        llm_share: tokens left by the decoder cut relative to what enters (0.4 on tiles, 0.5 on Qwen, as released).
        compat: the longest schedule of the batch for every tile, as released; the default schedules each tile alone.
    """

    summary = "information flow of the class token, inside the tower"
    paper = "arXiv 2505.19536"
    site = "encoder"
    positions = "reindex"
    late = "llm_layer"
    presets: ClassVar[dict[str, Any]] = {
        "192": {"keep": 192},
        "128": {"keep": 128},
        "64": {"keep": 64},
        "next-640": {"keep": 700},
        "next-320": {"keep": 350},
        "next-160": {"keep": 175},
    }

    every: int = 2
    ema: float = 0.5
    semantic: bool = True
    llm_layer: int | None = 1
    llm_share: float | None = None
    compat: bool = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise VtokError(f"flowcut every={self.every} is no distance between cuts; give at least 1 layer")

    def refuse(self, shape: Shape) -> str | None:
        if shape.tower_depth == 1:
            return "it follows the flow through the vision tower, and this one has a single block in use"
        return super().refuse(shape)

    def variants(self, shape: Shape) -> list[dict[str, Any]]:
        return [{"llm_layer": None}, {"llm_layer": shape.depth // 4}] if shape.tiled or shape.packed else []

    def stages(self, shape: Shape) -> Sequence[Stage]:
        last = shape.tower_depth - 1
        cuts = [layer for layer in range(2, last + 1) if (last - layer) % self.every == 0] or [last]
        # where most blocks see only windows, the ones that see everything give the scores, and the cuts follow them
        whole = tuple(layer for layer in shape.full_layers or () if 0 < layer + 1 <= last)
        cuts = [layer + 1 for layer in whole] or cuts
        reads, cut = frozenset({"qkv"}), partial(self.cut, cuts[-1])
        stages = [Stage("encoder", at, cut, observe=self.observe, reads=reads, observed=whole) for at in cuts]
        if self.llm_layer is not None and (shape.tiled or shape.packed) and self.llm_layer + 1 < shape.depth:
            share = self.llm_share if self.llm_share is not None else (0.5 if shape.packed else 0.4)
            reads |= {"attention"}
            stages.append(Stage("decoder", self.llm_layer + 1, self.cut_decoder, reads=reads, share=share))
        return stages

    def observe(self, view: TowerView) -> Tensor:
        """The running score after one more layer (steps 1-5)."""
        assert view.v is not None
        attention = self.relation(view)
        flow = attention / attention.sum(1, keepdim=True)
        if self.semantic and view.has_cls:
            mask = view.attended()
            values = kernels.value_similarity(view.v, view.v[:, :, 0], mask=None if mask is None else mask[:, 0])
            values = values[:, view.prefix :]
            flow = flow + values / values.sum(1, keepdim=True)
        density = view.v[:, :, view.prefix :].float().mean(1).abs().sum(-1)
        score = view.per_cell(flow * density)
        return score if view.carry is None else self.ema * view.carry + (1 - self.ema) * score

    def relation(self, view: TowerView) -> Tensor:
        """(G, patches) attention that the global token pays to each patch."""
        assert view.q is not None and view.k is not None
        mask = view.attended()
        if view.has_cls:
            query = view.q[:, :, :1]
        elif mask is None:
            query = view.q.mean(2, keepdim=True)
        else:
            counted = mask[..., None].to(view.q.dtype)
            query = (view.q * counted).sum(2, keepdim=True) / counted.sum(2, keepdim=True)
        return kernels.attention_rows(query, view.k, scale=view.scale, mask=mask)[:, 0, view.prefix :]

    def cut(self, last: int, view: TowerView, target: int) -> Tensor:
        """(G, n) bool: what the entropy schedule leaves; (G, target) indices at the last cut (steps 6-7)."""
        assert view.carry is not None
        left = last - (view.layer or 0)  # the paper's countdown: the last cut goes straight to the target
        if left <= 0:
            return kernels.topk(view.carry, target)
        size = (
            torch.full_like(view.carry[:, 0], view.size)
            if view.standing is None
            else view.standing.sum(1).to(view.carry)
        )
        attention = self.relation(view)
        share = attention / attention.sum(1, keepdim=True)
        entropy = -torch.special.xlogy(share, share).sum(1) / torch.log(size * view.unit)
        gone = ((size - target) / left**0.5 * (1 - entropy**2)).round()
        if self.compat:
            gone = gone.amax().expand_as(gone)
        kept = torch.minimum((size - gone).clamp_min(target), size)
        places = torch.arange(view.size, device=view.carry.device).expand(view.carry.shape)
        rank = torch.zeros_like(places).scatter(1, kernels.ranking(view.carry), places)
        return rank < kept[:, None]

    def cut_decoder(self, view: DecoderView, count: int) -> Tensor:
        """Relation and value rows of the last prompt token over the visual tokens alone (section 4, large pictures)."""
        query, keys, value, values = view.projections()
        scale = query.shape[-1] ** -0.5
        relation = kernels.attention_rows(query[:, :, None], keys, scale=scale)[:, 0]
        similar = kernels.value_similarity(values, value, scale=scale)
        density = values.float().mean(1).abs().sum(-1)
        score = (relation / relation.sum(1, keepdim=True) + similar / similar.sum(1, keepdim=True)) * density
        return kernels.topk(score, count)
