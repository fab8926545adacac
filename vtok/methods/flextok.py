"""FlexTok (arXiv 2502.13967, ICML 2025) as visual input: an ordered sequence; each prefix is a coarser picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.method import Method, register
from vtok.methods._grid import positions, share_parts
from vtok.protocol import Part
from vtok.resampler import OrderedResampler, files
from vtok.resampler.layout import Plan, plan
from vtok.resampler.starts import FARTHEST, PICKED, SALIENT, SCHEMES, Starts, averaged, farthest, planned
from vtok.tokenizers import anchors
from vtok.view import Selection, Shape, Stage, TowerView, View

#: quality of keep="auto" where none is given: how likely the model must say what it says with all tokens
QUALITY = 0.8


@register("flextok")
@dataclass(frozen=True)
class FlexTok(Method):
    """The first ``keep`` of an ordered sequence of tokens, coarse to fine: averages over boxes of the picture, or
    tokens of it, farthest first; with trained weights what a resampler makes of them (see docs/resampler.md).

    It acts before LLaVA's projector and after Qwen's merger. An average stands at the free placeholder nearest to its
    box's centre, with that place's position; a token of the picture at its own.

    Args:
        weights: folder of a trained resampler, the name of an installed one, or an ``OrderedResampler``. ``None``:
            nothing is learnt.
        scheme: the sequence without weights: averages over boxes, ``"quadtree"`` (all four children of a box) or
            ``"haar"`` (three, the fourth is in their parent), or ``"farthest"``: tokens, the next always the least like
            all before it. Trained weights have their own.
        auto: a picture gets as many tokens, at most ``keep``, as make the model's answer the one without compression
            with this probability, in (0, 1), over questions like those it was trained on; needs weights that were
            trained for it. ``keep="auto"`` is 0.8 where none is given.
    """

    summary = "ordered tokens from coarse to fine, averages or trained"
    paper = "arXiv 2502.13967"
    site = "input"
    positions = "keep"
    whole = True
    presets: ClassVar[dict[str, Any]] = {"256": {"keep": 256}, "64": {"keep": 64}, "17": {"keep": 17}}

    weights: str | OrderedResampler | None = field(default=None, repr=False)
    scheme: str = "quadtree"
    auto: float | None = None

    def __post_init__(self) -> None:
        if self.scheme == SALIENT:
            raise VtokError("flextok scheme='salient' needs trained weights, which bring it along: pass weights= alone")
        if self.scheme not in SCHEMES:
            raise VtokError(f"flextok scheme={self.scheme!r} is unknown; known are {', '.join(SCHEMES)}")
        if self.auto is not None and not 0 < self.auto < 1:
            raise VtokError(f"flextok auto={self.auto:g} is no quality; give a number between 0 and 1, such as 0.8")
        if self.auto is not None and self.weights is None:
            raise VtokError(
                "flextok auto= asks how many tokens a picture needs, which only trained weights can tell; pass weights="
            )

    def prepare(self, model: nn.Module) -> Method:
        if self.weights is None:
            return self
        from vtok.api import adapter_of

        source = "these weights" if isinstance(self.weights, nn.Module) else f"the weights {self.weights}"
        resampler = self.resampler or files.load(str(self.weights))
        door = files.door(adapter_of(model))
        files.check(resampler.config, door, source)
        if self.auto is not None and not resampler.config.halting:
            raise VtokError(
                f"{source} were trained without a halting head, so they cannot tell how many tokens a picture needs; "
                "give a number as keep, or distil with --halting"
            )
        prepared = dataclasses.replace(self)
        # not an option: weights that were given by name stay so in reports and files
        object.__setattr__(prepared, "_loaded", resampler.to(door.device))
        return prepared

    @property
    def resampler(self) -> OrderedResampler | None:
        """The trained weights, once ``prepare`` has loaded them or where they were given as they are."""
        found = self.weights if isinstance(self.weights, OrderedResampler) else self.__dict__.get("_loaded")
        return found if isinstance(found, OrderedResampler) else None

    def options(self) -> dict[str, Any]:
        options = super().options()
        if isinstance(self.weights, OrderedResampler):
            options["weights"] = f"OrderedResampler {self.digest()}"
        return options

    def digest(self) -> str:
        return "" if self.resampler is None else files.digest(self.resampler)

    def variants(self, shape: Shape) -> list[dict[str, Any]]:
        return [] if self.weights is not None else [{"scheme": scheme} for scheme in SCHEMES if scheme != self.scheme]

    def automatic(self) -> tuple[Method, int | float] | None:
        # above half of an image's tokens there is little left to save
        return dataclasses.replace(self, auto=QUALITY if self.auto is None else self.auto), 0.5

    def stored(self, folder: Path) -> Method:
        if self.weights is None:
            return self
        files.save(self.resampler or files.load(str(self.weights)), folder / self.name)
        return dataclasses.replace(self, weights=self.name)

    def restored(self, folder: Path) -> Method:
        if self.weights != self.name:
            return self
        return dataclasses.replace(self, weights=str(folder / self.name))

    def stages(self, shape: Shape) -> Sequence[Stage]:
        return (Stage("input" if shape.packed else "encoder", select=self.select),)

    def select(self, view: View, count: int) -> Selection:
        """The first tokens of each picture (of each frame, by area), in raster order of where they stand."""
        picks = self._scheme in PICKED and self.auto is None
        alike = complete(view)
        if picks and alike is not None:
            return self._together(view, alike, count)
        if picks and torch.compiler.is_exporting():
            raise VtokError(
                "flextok picks tokens of tiles whose padding a graph cannot see; take averages (no weights, or weights "
                "with another scheme than farthest or salient), or export to hf"
            )
        groups = layouts(view)
        if picks and len(groups) == 1:
            return self._together(view, groups[0][1], count)
        found: dict[int, tuple[_Laid, Tensor]] = {}
        for rows, grids in groups:
            pictures = _shared(grids, count)
            read = [self._tokens(view.features[rows][:, where], grid, share) for where, grid, share in pictures]
            for own, row in enumerate(rows):
                parts = [(where, plans[own]) for (where, _, _), (_, plans) in zip(pictures, read, strict=True)]
                laid = _lay(parts, view.size)
                tokens = torch.cat([x[own, : len(plans[own].places)] for x, plans in read])
                found[row] = laid, tokens[laid.order.to(tokens.device)]
        return _selection(view, [found[row] for row in range(view.features.shape[0])])

    def _together(self, view: View, grids: Sequence[tuple[Tensor, tuple[int, int]]], count: int) -> Selection:
        """Picked tokens of rows that lie alike: no loop over rows, so that graphs of any number of pictures can be
        made of it."""
        device, kept, tokens = view.features.device, [], []
        for where, grid, share in _shared(grids, count):
            where = where.to(device)
            found, first, _ = self._read(view.features[:, where], grid, share)
            assert first.picks is not None
            tokens.append(found)
            kept.append(where[first.picks])
        indices, order = torch.cat(kept, 1).sort(1)
        return Selection(indices, kernels.gather_tokens(torch.cat(tokens, 1), order))

    def fixed(self, view: View, count: int) -> tuple[Tensor, Callable[[Tensor], Tensor] | None] | None:
        if self._scheme in PICKED:
            return None
        ((_, grids),) = layouts(view)
        pictures = _shared(grids, count)
        laid = _lay([(where, plan(share, grid, self._scheme)) for where, grid, share in pictures], view.size)
        device = view.features.device

        def tokens(features: Tensor) -> Tensor:
            read = [self._read(features[:, where.to(device)], grid, share)[0] for where, grid, share in pictures]
            return torch.cat(read, 1)[:, laid.order.to(device)]

        return laid.kept.to(device), tokens

    @property
    def _scheme(self) -> str:
        return self.scheme if self.resampler is None else self.resampler.config.scheme

    def _tokens(self, x: Tensor, grid: tuple[int, int], count: int) -> tuple[Tensor, list[Plan]]:
        """(R, count, D) ordered tokens of x (R, rows * columns, D), and where each picture's stand, as many as it
        needs."""
        tokens, first, registers = self._read(x, grid, count)
        sizes = [count] * len(x)
        if self.auto is not None and registers is not None and self.resampler is not None:
            sizes = self.resampler.enough(registers, self.auto).tolist()
        return tokens, planned(first, sizes, grid, self._scheme)

    def _read(self, x: Tensor, grid: tuple[int, int], count: int) -> tuple[Tensor, Starts, Tensor | None]:
        """(R, count, D) ordered tokens, what they started as, and what trained registers hold."""
        resampler = self.resampler
        if resampler is None:
            first = _untrained(x, grid, count, self.scheme)
            return first.tokens, first, None
        most = resampler.config.tokens
        if self.auto is not None:
            count = min(count, most)
        if count > most:
            raise VtokError(
                f"these weights give up to {most} tokens of a picture, and {count} were asked for; take keep={most} or "
                "less, or leave weights out"
            )
        read = resampler.read(x.to(next(resampler.parameters()).dtype), grid, count)
        return read.tokens.to(x.dtype), read.starts, read.registers


def _untrained(x: Tensor, grid: tuple[int, int], count: int, scheme: str) -> Starts:
    if scheme == FARTHEST:
        return farthest(x, grid, count)
    return averaged(x, grid, anchors.boxes(count, scheme).to(x.device))


def _shared(grids: Sequence[tuple[Tensor, tuple[int, int]]], count: int) -> list[tuple[Tensor, tuple[int, int], int]]:
    """Pictures with their share of the tokens, those that get any."""
    shares = share_parts([Part(*grid) for _, grid in grids], count)
    return [(where, grid, share) for (where, grid), share in zip(grids, shares, strict=True) if share]


@dataclass(frozen=True)
class _Laid:
    """How the tokens of a view's pictures lie in the sequence.

    Attributes:
        order: (k,) token by place in the sequence: raster order of where they stand.
        kept: (k,) positions in the view, ascending.
        owner: (n,) place in the sequence of the finest token that shows each token of the view, -1 for none.
        weights: (k, n) share of each token of the view.
    """

    order: Tensor
    kept: Tensor
    owner: Tensor
    weights: Tensor


def complete(view: View) -> list[tuple[Tensor, tuple[int, int]]] | None:
    """Positions and grid of each picture of every row, where nothing is missing; without a loop over rows."""
    if view.size != sum(part.length for part in view.parts):
        return None
    starts = accumulate((part.length for part in view.parts[:-1]), initial=0)
    return [
        (positions(part) + start, (part.height, part.width)) for part, start in zip(view.parts, starts, strict=True)
    ]


def layouts(view: View) -> list[tuple[list[int], list[tuple[Tensor, tuple[int, int]]]]]:
    """Rows of a view that lie alike, with positions and grid of each of their pictures.

    Raises:
        VtokError: another stage has thinned the pictures.
    """
    alike = complete(view)
    if alike is not None:
        return [(list(range(view.tokens.shape[0])), alike)]
    found: dict[tuple[int, int], list[int]] = {}
    if isinstance(view, TowerView) and view.parts:
        # a tile without its padding: what is left is a rectangle
        y, x = view.tokens // view.parts[0].width, view.tokens % view.parts[0].width
        sides = torch.stack((y.amax(1) - y.amin(1), x.amax(1) - x.amin(1)), 1) + 1
        for row, (height, width) in enumerate(sides.tolist()):
            found.setdefault((height, width), []).append(row)
    if not found or any(height * width != view.size for height, width in found):
        raise VtokError(
            "flextok averages over whole pictures and another stage has thinned this one; put flextok first, and "
            "compose it with methods that act behind it"
        )
    everything = torch.arange(view.size)
    return [(rows, [(everything, grid)]) for grid, rows in found.items()]


def _lay(parts: Sequence[tuple[Tensor, Plan]], total: int) -> _Laid:
    """Lay out the tokens of pictures given by their positions and plans."""
    places = torch.cat([where[own.places] for where, own in parts])
    order = places.argsort()
    rank = order.argsort()
    owner, weights = torch.full((total,), -1), torch.zeros(len(places), total)
    start = 0
    for where, own in parts:
        count = len(own.places)
        owner[where] = torch.where(own.owner < 0, -1, rank[own.owner + start])
        weights[start : start + count, where] = own.weights
        start += count
    return _Laid(order, places[order], owner, weights[order])


def _selection(view: View, rows: Sequence[tuple[_Laid, Tensor]]) -> Selection:
    """Rows put together, those with fewer tokens filled up."""
    counts = [len(laid.kept) for laid, _ in rows]
    device = view.features.device
    stacked = lambda values: pad_sequence(list(values), batch_first=True).to(device)  # noqa: E731
    weights = None
    if not isinstance(view, TowerView):  # only what has passed the tower has planes beside it
        weights = stacked(laid.weights for laid, _ in rows)
    return Selection(
        stacked(laid.kept for laid, _ in rows),
        pad_sequence([tokens for _, tokens in rows], batch_first=True),
        stacked(laid.owner for laid, _ in rows),
        counts=None if len(set(counts)) == 1 else counts,
        weights=weights,
    )
