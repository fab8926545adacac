"""What a method sees: a group of spans of equal length, without any model.

All tensors carry a leading group axis G; the spans of a group have the same number of tokens n and the same layout.
The engine fills the views; a test or a notebook can build them by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.protocol import Part


@dataclass
class Selection:
    """A method's answer where indices alone do not say it all.

    Attributes:
        indices: (G, k) positions within the view that stay, ascending.
        features: (G, k, D) what stands at these positions from now on (merged tokens), or ``None``.
        groups: (G, n) for each token of the view the position in ``indices`` it was poured into, -1 where dropped.
        front: put the kept tokens first in this order instead of at their own places (VisionZip's released layout).
        counts: how many of its row's indices each span keeps, where that differs; what lies behind means nothing.
        weights: (G, k, n) share of each token of the view in each kept one, where features are such averages and more:
            what else belongs to the picture (Qwen3-VL's DeepStack planes) is averaged alike.
    """

    indices: Tensor
    features: Tensor | None = None
    groups: Tensor | None = None
    front: bool = False
    counts: Sequence[int] | None = None
    weights: Tensor | None = None


@dataclass
class View:
    """Spans at one point of the model.

    Attributes:
        features: (G, n, D) the tokens as they stand.
        tokens: (G, n) index of each token within its image.
        parts: rectangles of the image's original token grid.
        places: place of each span's image in its own prompt (seeds of random choices; the batch row never matters).
        layer: the stage acts before this layer (``None`` at the input site).
        base: the first ``base`` tokens of the image show the whole picture (any-resolution thumbnail), else 0.
        saliency: (G, n) attention of the class token, or the family's substitute; ``None`` unless read.
    """

    features: Tensor
    tokens: Tensor
    parts: tuple[Part, ...] = ()
    places: Sequence[int] = ()
    layer: int | None = None
    base: int = 0
    saliency: Tensor | None = None

    @property
    def size(self) -> int:
        """n, the number of tokens of each span."""
        return self.tokens.shape[1]

    def random(self, seed: int) -> Tensor:
        """(G, n) uniform numbers, equal on every device and for every batch: drawn on the CPU per image.

        The draw depends on the seed, the image's place in its prompt and the layer, over the *original* tokens, so
        it does not move when an earlier stage drops something.
        """
        total = max(sum(part.length for part in self.parts), self.size)
        rows = []
        for place in self.places or range(self.features.shape[0]):
            generator = torch.Generator().manual_seed(_mix(seed, place, -1 if self.layer is None else self.layer))
            rows.append(torch.rand(total, generator=generator))
        draws = torch.stack(rows).to(self.features.device)
        return draws.gather(1, self.tokens.clamp_max(total - 1))


@dataclass
class TowerView(View):
    """Spans inside or right after the vision tower: one tile or frame each; ``layer`` counts its blocks.

    Attributes:
        prefix: number of prefix tokens; q, k, v hold them before the n patches, ``features`` does not.
        has_cls: the first prefix token is a class token.
        q, k, v: (G, H, prefix + n, d) projections of the block that has just run (after its rotary embedding).
        scale: factor on q.k in this tower.
        carry: (G, n) what the method's ``observe`` returned last, following the tokens; ``None`` at first.
        prefix_features: (G, prefix, D) prefix tokens as they stand.
        sizes: (G, n) how many original tokens each token stands for.
        target: tokens that must be left when the tower ends.
        unit: patches per cell; ``features`` and scores of a packed tower are per patch, cuts per cell.
        received: (G, prefix + n) attention each token receives over all heads and queries, for fusions that ask.
        standing: (G, n) bool: in exported graphs, dropped tokens may hold their places until the number that is left is
            the same for all pictures; they neither attend nor count. ``None``: all stand.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    prefix: int = 0
    has_cls: bool = False
    scale: float = 1.0
    carry: Tensor | None = None
    target: int = 0
    unit: int = 1
    sizes: Tensor | None = None
    prefix_features: Tensor | None = None
    received: Tensor | None = None
    standing: Tensor | None = None

    def attended(self) -> Tensor | None:
        """(G, 1, prefix + patches) bool: which keys stand, as a mask of attention rows; ``None``: all."""
        if self.standing is None:
            return None
        patches = self.standing.repeat_interleave(self.unit, 1) if self.unit > 1 else self.standing
        return F.pad(patches, (self.prefix, 0), value=True)[:, None]

    def per_cell(self, scores: Tensor) -> Tensor:
        """Mean of per-patch scores (G, cells * unit) over each cell: (G, cells)."""
        return scores.unflatten(1, (-1, self.unit)).mean(-1) if self.unit > 1 else scores


@dataclass
class DecoderView(View):
    """Spans before a decoder layer. Attention of the layer just run is recomputed from its own q and k, by row.

    Attributes:
        spans: the engine's numbers of these spans (opaque).
        source: the engine's row computer.
    """

    spans: Sequence[int] = ()
    source: Any = None

    def attention(self, rows: str = "last", of: str = "previous") -> Tensor:
        """(G, n) attention that each visual token receives, averaged over heads and over the given rows.

        Args:
            rows: ``"last"`` (the last prompt token) or ``"instruction"`` (all tokens after the last image).
            of: ``"previous"`` (the layer that has just run) or ``"next"`` (the layer about to run, on these tokens).
        """
        return self.source.attention(self, rows, of)

    def transition(self) -> Tensor:
        """(G, n) accumulated token-transition values of the layers that the stage asked for."""
        return self.source.transition_of(self)

    def projections(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_last (G, H, d), k (G, Hkv, n, d), v_last (G, Hkv, d), v (G, Hkv, n, d) of the layer that has just run."""
        return self.source.projections(self)

    def mass(self) -> tuple[Tensor, Tensor]:
        """(G,) attention mass text -> visual and (G,) visual -> text of each span's whole sample (ToDRE eq. 6, 7)."""
        return self.source.mass(self)


def _mix(seed: int, place: int, layer: int) -> int:
    """A 63-bit seed from three small numbers (splitmix64 finaliser: neighbours give unrelated draws)."""
    value = (seed * 0x9E3779B97F4A7C15 + place * 0xBF58476D1CE4E5B9 + (layer + 2) * 0x94D049BB133111EB) & (2**64 - 1)
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 & (2**64 - 1)
    value ^= value >> 27
    return value & (2**63 - 1)


Select = Callable[[Any, int], "Tensor | Selection"]
Observe = Callable[[TowerView], Tensor]


@dataclass(frozen=True)
class Fusion:
    """A merge inside a tower block.

    Attributes:
        match: (view, r) -> MergePlan over the patches; prefix tokens are never touched.
        where: ``"middle"`` (between attention and feed-forward) or ``"before"`` (before the attention).
        weights: view -> (G, n) pooling weights; ``None`` means sizes.
        reuse_attention: ``"before"`` only: fuse the attention of before the merge (MCTF) instead of recomputing it.
        proportional: attention counts a token as often as it stands for original tokens (log-size key bias).
    """

    match: Callable[..., Any]
    where: str = "middle"
    weights: Callable[..., Tensor] | None = None
    reuse_attention: bool = False
    proportional: bool = True


@dataclass(frozen=True)
class Stage:
    """One action of a method.

    Attributes:
        site: ``"encoder"``, ``"input"`` or ``"decoder"``.
        layer: acts before this layer of the tower or decoder (``None``: input site, or the tower's output).
        select: (view, count) -> (G, count) ascending indices, a (G, n) bool mask where the count depends on the data,
            or a ``Selection``.
        observe: tower only: view -> (G, n) running score, called after every block up to ``layer``.
        fuse: tower only: a merge inside block ``layer`` instead of a cut.
        reads: what the engine must record: ``"qkv"``, ``"attention"``, ``"transition"``, ``"saliency"``.
        share: decoder only: tokens left relative to what entered the decoder.
        floor: fewest tokens the stage may leave.
        observed: layers whose transitions are accumulated (decoder) or whose projections ``observe`` sees (tower;
            empty: all before the cut).
    """

    site: str
    layer: int | None = None
    select: Select | None = None
    observe: Observe | None = None
    fuse: Fusion | None = None
    reads: frozenset[str] = frozenset()
    share: float = 1.0
    floor: int = 1
    observed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What a method may know of a model.

    Attributes:
        depth: decoder layers (0 for a bare ViT).
        tower_depth: blocks of the vision tower that lead to the features.
        has_cls: the tower has a class token.
        packed: the tower works on packed cells (Qwen).
        tiled: one image may come as several tiles.
        family: the adapter's family name (for messages only).
    """

    depth: int
    tower_depth: int
    has_cls: bool
    packed: bool
    tiled: bool
    family: str = ""
    full_layers: tuple[int, ...] | None = field(default=None)
    width: int = 0
