"""ToMe (arXiv 2210.09461, ICLR 2023): merge the most similar pairs of tokens between attention and feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import vtok_kernels as kernels
from vtok.method import Method, register
from vtok.methods._fusion import fusion_layers, keys_metric
from vtok.view import Fusion, Shape, Stage, TowerView


@register("tome")
@dataclass(frozen=True)
class ToMe(Method):
    """Bipartite soft matching on the attention keys, size-weighted merging, proportional attention (section 3).

    Args:
        layers: blocks that merge; default: spread evenly over the tower, as few as the budget allows (at most half of
            the tokens can go in one), at least 4, since matching costs time in every one.
        prop_attn: a merged token counts in attention as often as it stands for original tokens.
        compat: merge in every block by the same number, as published.
    """

    summary = "bipartite merging of similar tokens inside the tower"
    paper = "arXiv 2210.09461"
    site = "encoder"
    positions = "reindex"
    presets: ClassVar[dict[str, Any]] = {"192": {"keep": 192}, "128": {"keep": 128}, "64": {"keep": 64}}

    layers: tuple[int, ...] | None = None
    prop_attn: bool = True
    compat: bool = False

    def stages(self, shape: Shape) -> Sequence[Stage]:
        fuse = Fusion(self.match, "middle", proportional=self.prop_attn)
        layers = self.layers or fusion_layers(shape, everywhere=self.compat)
        return [Stage("encoder", layer, fuse=fuse, reads=frozenset({"qkv"})) for layer in layers]

    @kernels.no_grad
    def match(self, view: TowerView, r: int) -> kernels.MergePlan:
        """Pour the ``r`` best matched tokens of every other position into their partners (A1.1 of the paper's D)."""
        return kernels.match_tokens(keys_metric(view), r, protected=view.prefix)
