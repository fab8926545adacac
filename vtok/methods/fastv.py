"""FastV (arXiv 2403.06764, ECCV 2024): after layer K - 1, keep what the last prompt token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.view import DecoderView, Shape


@register("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """Rank visual tokens by the attention they get in decoder layer ``k - 1`` (paper section 4.1), cut before ``k``.

    The attention row is recomputed from that layer's own q and k; nothing else of the map is formed.

    Args:
        k: first layer that runs on the reduced prompt (2 in the paper, 3 in the authors' Hugging Face scripts).
        query: rows whose attention counts: ``"last"`` prompt token (released) or ``"instruction"`` (mean over the text
            after the image).
        compat: the first prompt of a batch decides for all, as released; the default ranks each picture by itself.
    """

    summary = "attention of the last token after layer K"
    paper = "arXiv 2403.06764"
    site = "decoder"
    reads = frozenset({"attention"})
    presets: ClassVar[dict[str, Any]] = {
        "K2R50": {"keep": (2 + 30 * 0.5) / 32, "k": 2},
        "K2R75": {"keep": (2 + 30 * 0.25) / 32, "k": 2},
        "K3R50": {"keep": (3 + 29 * 0.5) / 32, "k": 3},
        "K3R75": {"keep": (3 + 29 * 0.25) / 32, "k": 3},
    }

    k: int = 2
    query: str = "last"
    compat: bool = False

    def __post_init__(self) -> None:
        if self.query not in ("last", "instruction"):
            raise VtokError(f'fastv query={self.query!r} is unknown; take "last" or "instruction"')

    def default_layer(self, shape: Shape) -> int | None:
        object.__setattr__(self, "layer", self.k)
        return super().default_layer(shape)

    def variants(self, shape: Shape) -> list[dict[str, Any]]:
        return [{"k": k} for k in sorted({3, shape.depth // 4, shape.depth // 2})]

    def score(self, view: DecoderView) -> Tensor:
        scores = view.attention(self.query)
        if self.compat:  # pictures at the same place of their prompts
            places = list(view.places)
            scores = scores[[places.index(place) for place in places]]
        return scores
