"""MCTF (arXiv 2403.10030, CVPR 2024): merge by similarity, informativeness and size, both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import vtok_kernels as kernels
from vtok.method import Method, register
from vtok.methods._fusion import fusion_layers
from vtok.view import Fusion, Shape, Stage, TowerView


@register("mctf")
@dataclass(frozen=True)
class MCTF(Method):
    """Multi-criteria scores, bidirectional matching, attention-weighted pooling (section 3), before the attention.

    Args:
        layers: blocks that merge; default as for ToMe.
        tau: temperatures of similarity, informativeness and size (released values).
        two_way: match in both directions.
        reuse_attention: fuse this block's attention and use it again (the paper's one-step-ahead attention, here
            without its N x N map); False recomputes attention on the merged tokens. Qwen towers always recompute.
        compat: merge in every block but the first by the same number, as released.
    """

    summary = "multi-criteria bidirectional merging inside the tower"
    paper = "arXiv 2403.10030"
    site = "encoder"
    positions = "reindex"
    presets: ClassVar[dict[str, Any]] = {"192": {"keep": 192}, "128": {"keep": 128}, "64": {"keep": 64}}

    layers: tuple[int, ...] | None = None
    tau: tuple[float, float, float] = (1.0, 20.0, 40.0)
    two_way: bool = True
    reuse_attention: bool = True
    compat: bool = False

    def stages(self, shape: Shape) -> Sequence[Stage]:
        reuse = self.reuse_attention and not shape.packed
        fuse = Fusion(self.match, "before", self.weights, reuse_attention=reuse)
        layers = self.layers or fusion_layers(shape, first=1, everywhere=self.compat)
        return [Stage("encoder", layer, fuse=fuse) for layer in layers]

    @kernels.no_grad
    def match(self, view: TowerView, r: int) -> kernels.MergePlan:
        """Two-way matching on the product of the three criteria."""
        return kernels.match_tokens(
            cell_features(view),
            r,
            protected=view.prefix,
            two_way=self.two_way,
            bias=kernels.mctf_bias(self._received(view), self._sizes(view), self.tau),
            temperature=self.tau[0],
        )

    def weights(self, view: TowerView) -> Tensor:
        """Pooling weights: received attention times relative size, without gradient."""
        sizes = self._sizes(view)
        return (self._received(view) * sizes / sizes.amax(1, keepdim=True)).detach()

    def _received(self, view: TowerView) -> Tensor:
        assert view.received is not None
        return view.received

    def _sizes(self, view: TowerView) -> Tensor:
        own = view.sizes if view.sizes is not None else torch.ones_like(view.tokens, dtype=torch.float32)
        return F.pad(own.float(), (view.prefix, 0), value=1.0)


def cell_features(view: TowerView) -> Tensor:
    """(G, prefix + n, D) block input, averaged over the patches of a cell."""
    return view.features.unflatten(1, (-1, view.unit)).mean(2) if view.unit > 1 else view.features


def consistency_loss(
    student: Tensor,
    teacher: Tensor,
    student_cls: Tensor,
    teacher_cls: Tensor,
    labels: Tensor,
    *,
    weight: float = 3.0,
    confidence: float = 0.4,
) -> Tensor:
    """MCTF's token-reduction-consistency loss (section 3.4): one network, two passes with different reductions.

    Args:
        student: (B, classes) logits of the pass with the full reduction.
        teacher: (B, classes) logits of the pass with a small random reduction.
        student_cls: (B, D) class token of the student pass. ``teacher_cls``: of the teacher pass (no gradient).
        labels: (B,) class indices.
        weight: of the class-token distance (3 released).
        confidence: samples count in that distance only where the teacher gives the true class more than this (0.4 in
            the released code; not in the paper).

    Returns:
        Scalar: cross-entropy of both passes plus the weighted squared distance of the class tokens.
    """
    sure = teacher.softmax(-1).gather(1, labels[:, None])[:, 0] > confidence
    distance = (student_cls - teacher_cls.detach()).square().mean(-1)
    matched = (distance * sure).sum() / sure.sum().clamp_min(1)
    return F.cross_entropy(student, labels) + F.cross_entropy(teacher, labels) + weight * matched
