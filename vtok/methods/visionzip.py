"""VisionZip (arXiv 2412.04467, CVPR 2025): the tokens the class token looks at, and a few merged from the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.method import BARE, Method, register
from vtok.view import Selection, Stage, TowerView

ALONE = "it works on what the tower hands to a projector, and a bare vision transformer has none"


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Method):
    """Dominant tokens by attention at the feature layer, contextual tokens merged by key similarity (section 3.2).

    Without a class token, dominance is the attention a patch receives (column mean).

    Args:
        contextual: share of the budget that is merged tokens (10 of 64 published).
        compat: the released arithmetic: the class token is the first of the dominant ones, a contextual token is its
            target *plus* the mean of what joins it, tokens are laid out class token, dominant, contextual. The default
            spends the class token's place on one more patch, averages each group, and leaves tokens at their places.
    """

    summary = "dominant tokens by class attention, contextual ones merged"
    paper = "arXiv 2412.04467"
    site = "encoder"
    layer = None
    reads = frozenset({"qkv"})
    positions = "reindex"
    refusals: ClassVar[dict[str, str]] = dict.fromkeys(BARE, ALONE)
    presets: ClassVar[dict[str, Any]] = {
        "192": {"keep": 192, "contextual": 30 / 192},
        "128": {"keep": 128, "contextual": 20 / 128},
        "64": {"keep": 64, "contextual": 10 / 64},
    }

    contextual: float = 10 / 64
    compat: bool = False

    def stages(self, shape: Any) -> tuple[Stage, ...]:
        return (Stage("encoder", None, self.select, reads=self.reads),)

    def refuse(self, shape: Any) -> str | None:
        if shape.depth == 0:
            return ALONE
        return super().refuse(shape)

    def select(self, view: TowerView, count: int) -> Selection:
        if view.unit > 1 and self.compat:
            return self._select(view, count, cls=False)
        return self._select(view, count, cls=self.compat and view.has_cls)

    def _select(self, view: TowerView, count: int, cls: bool) -> Selection:
        merged = max(0, min(round(count * self.contextual), count - 1 - int(cls)))
        dominant = kernels.topk(self.dominance(view), count - merged - int(cls))
        if not merged and not cls:
            return Selection(dominant)
        stays = kernels.keep_mask(dominant, view.size)
        rest = kernels.topk((~stays).float(), view.size - dominant.shape[1])
        targets, joins = kernels.strided_merge(self.metric(view).gather(1, _wide(rest, self.metric(view))), merged)
        features = view.features if view.unit == 1 else view.features.unflatten(1, (-1, view.unit)).flatten(2)
        contextual, places = self._contextual(features, rest, targets, joins)
        owner = torch.zeros_like(stays, dtype=torch.long)
        owner = owner.scatter(1, dominant, _slots(dominant, int(cls)))
        owner = owner.scatter(1, rest, joins + dominant.shape[1] + int(cls))
        chosen = features.gather(1, _wide(dominant, features))
        indices, tokens = torch.cat((dominant, places), 1), torch.cat((chosen, contextual), 1)
        if cls:
            assert view.prefix_features is not None
            # the class token stands at the first dropped place: it has none of its own
            spare = rest.gather(1, _first_free(rest, places))
            indices = torch.cat((spare, indices), 1)
            tokens = torch.cat((view.prefix_features[:, :1].to(tokens.dtype), tokens), 1)
            return Selection(indices, tokens, owner, front=True)
        order = indices.argsort(1)
        rank = order.argsort(1)
        tokens = tokens.gather(1, _wide(order, tokens))
        if view.unit > 1:
            tokens = tokens.unflatten(2, (view.unit, -1)).flatten(1, 2)
        return Selection(indices.gather(1, order), tokens, rank.gather(1, owner))

    def dominance(self, view: TowerView) -> Tensor:
        """(G, n) attention of the class token, or received over all queries where there is none."""
        assert view.q is not None and view.k is not None
        if view.has_cls:
            rows = kernels.attention_rows(view.q[:, :, :1], view.k, scale=view.scale)[:, 0]
        else:
            rows = kernels.received_attention(view.q, view.k, scale=view.scale)
        return view.per_cell(rows[:, view.prefix :])

    def metric(self, view: TowerView) -> Tensor:
        """(G, n, d) keys averaged over heads (and over the patches of a cell)."""
        assert view.k is not None
        keys = view.k[:, :, view.prefix :].float().mean(1)
        return keys.unflatten(1, (-1, view.unit)).mean(2) if view.unit > 1 else keys

    def _contextual(self, features: Tensor, rest: Tensor, targets: Tensor, joins: Tensor) -> tuple[Tensor, Tensor]:
        """Merged tokens and the places they stand at."""
        others = features.gather(1, _wide(rest, features))
        places = rest[:, targets]
        plan = kernels.MergePlan(joins, len(targets))
        if not self.compat:
            return plan.merge(others), places
        is_target = torch.zeros(rest.shape[1], dtype=torch.bool, device=rest.device)
        is_target[targets] = True
        weight = (~is_target).to(others.dtype)[None, :, None]
        members = plan.sum((~is_target).to(others.dtype).expand(rest.shape)).clamp_min(1)
        return others[:, targets] + plan.sum(others * weight) / members[..., None], places


def _wide(index: Tensor, like: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, like.shape[-1])


def _slots(index: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + index.shape[1], device=index.device).expand_as(index)


def _first_free(rest: Tensor, places: Tensor) -> Tensor:
    """(G, 1) position in ``rest`` of the first token that is no contextual target."""
    taken = (rest[:, :, None] == places[:, None]).any(-1)
    return taken.to(torch.uint8).argmin(1, keepdim=True)
