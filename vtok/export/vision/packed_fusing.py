"""Merging whole cells inside the blocks of a packed tower, window by window, at lengths known beforehand."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from vtok.engine.towers import merge_goal, received, segment_goals
from vtok.export.vision.cells import Cells
from vtok.view import Fusion, Stage


class PackedFusing:
    """The merging half of ``PackedGraph``; everything it calls on ``self`` besides is there."""

    spec: Any
    inside: Any
    unit: int
    places: Tensor
    project: Any
    turn: Any
    attend: Any
    view: Any
    _tables: Any

    def fuse(self, stage: Stage, number: int, cells: Cells) -> Cells:
        """Block ``number`` with its merge."""
        block, blocks, fuse = self.spec.layers[number], self.spec.blocks, stage.fuse
        assert fuse is not None
        if fuse.where == "middle":
            cells.x = cells.x + self.attend(number, cells)
            cells = self._merge(fuse, number, cells)
        else:
            q, k, v = cells.projections = self.project(number, cells)
            cells.turned = self.turn(q, cells), self.turn(k, cells), v
            cells = self._merge(fuse, number, cells)
            cells.x = cells.x + self.attend(number, cells)
        cells.x = cells.x + blocks.feed(block, cells.x)
        return cells

    def _merge(self, fuse: Fusion, number: int, cells: Cells) -> Cells:
        """Merge inside every window (the picture where there are none), slot with slot."""
        later = sum((other.layer or 0) >= number for other in self.inside.fusions)
        batch = cells.cells.shape[0]
        if cells.sizes is None:
            cells.sizes = torch.ones_like(cells.cells, dtype=torch.float32)
        if cells.place is None:
            cells.place = self.places.expand(batch, -1, -1, -1)
        lengths = cells.lengths or (cells.count,)
        goal = merge_goal(cells.count, cells.target, later, self.inside.compat)
        goals = segment_goals(goal, lengths) if self.spec.full_layers is not None else [goal]
        starts = [sum(lengths[:number]) for number in range(len(lengths))]
        together: dict[tuple[int, int], list[int]] = {}
        for segment, key in enumerate(zip(lengths, goals, strict=True)):
            together.setdefault(key, []).append(segment)
        left, order, parts = list(lengths), [], []
        for (length, own_goal), segments in together.items():
            rows = torch.tensor([list(range(starts[s], starts[s] + length)) for s in segments], device=cells.x.device)
            own = self._segment(fuse, number, cells, rows, max(0, length - own_goal))
            for segment in segments:
                left[segment] = own[0].shape[1] // len(segments)
            order += segments
            parts.append(own)
        back = _back(order, left, cells.x.device)
        x, positions, sizes, place = (torch.cat(found, 1)[:, back] for found in zip(*parts, strict=True))
        after = dataclasses.replace(
            cells, x=x.unflatten(2, (self.unit, -1)).flatten(1, 2), cells=positions, sizes=sizes,
            place=place.unflatten(2, (self.unit, 2)), lengths=tuple(left), alike=False, carry=None,
            projections=None, turned=None,
        )  # fmt: skip
        assert after.place is not None
        after.rotary = self._tables(after.x, after.place.flatten(1, 2))
        return after

    def _segment(
        self, fuse: Fusion, number: int, cells: Cells, rows: Tensor, r: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Windows at rows (S, length), each less by ``r``: cells (B, S * left, unit * D), positions, sizes, places."""
        assert cells.sizes is not None and cells.place is not None
        shape, flat = tuple(rows.shape), rows.flatten()

        def windowed(x: Tensor) -> Tensor:
            return x[:, flat].unflatten(1, shape).flatten(0, 1)

        def joined(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, shape[0])).flatten(1, 2)

        whole = windowed(cells.x.unflatten(1, (-1, self.unit)).flatten(2))
        positions, sizes, place = windowed(cells.cells), windowed(cells.sizes), windowed(cells.place.flatten(2))
        if r == 0:
            return joined(whole), joined(positions), joined(sizes), joined(place)
        patches = cells.patches(rows).flatten()

        def projected(x: Tensor) -> Tensor:
            own = x[:, :, patches].unflatten(2, (shape[0], -1))
            return own.transpose(1, 2).flatten(0, 1)

        view = self.view(number, cells)
        view.features, view.tokens, view.sizes = whole.unflatten(2, (self.unit, -1)).flatten(1, 2), positions, sizes
        view.scale = self.spec.blocks.scale(self.spec.layers[number])
        assert cells.projections is not None and cells.turned is not None
        # similarity is taken before the rotary embedding; attention after it
        view.q, view.k, view.v = (projected(part) for part in cells.projections)
        bias = sizes.log().repeat_interleave(self.unit, 1)
        q, k = (projected(part).float() for part in cells.turned[:2])
        view.received = view.per_cell(received(q, k, view.scale, bias))
        plan = fuse.match(view, r)
        weights = sizes if fuse.weights is None else fuse.weights(view)
        (merged, place), (summed,) = plan.pour([whole, place], [sizes], [weights.to(whole.dtype), sizes])
        return joined(merged), joined(positions.gather(1, plan.representative)), joined(summed), joined(place)


def _back(order: list[int], lengths: list[int], device: Any) -> Tensor:
    """From segments in the given order to their own order: an index of their members."""
    starts, start = {}, 0
    for segment in order:
        starts[segment] = start
        start += lengths[segment]
    index = [starts[segment] + place for segment in range(len(lengths)) for place in range(lengths[segment])]
    return torch.tensor(index, device=device)
