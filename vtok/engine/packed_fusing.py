"""Merging whole cells inside a packed tower, slot with slot, with fractional places for the rotary embedding."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.engine.cells import CellState
from vtok.engine.host import on_device
from vtok.engine.rows import rotate
from vtok.engine.towers import merge_goal, received, segment_goals
from vtok.view import Stage, TowerView

logger = logging.getLogger("vtok")


class PackedFusing:
    """The merging half of ``PackedTower``; everything it calls on ``self`` besides is there."""

    spec: Any
    state: CellState | None
    fusions: list[Stage]
    compat: bool
    _geometry: Any
    _patches: Any
    _view: Any

    def use_xformers(self) -> None:
        """Packed attention by xformers where it is installed and loads beside this torch."""
        if find_spec("xformers") is not None:
            try:
                kernels.load_xformers()
            except ImportError as error:
                logger.warning("vtok: %s", error)

    def _fuse(self, stage: Stage, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, fuse, number = self.state, stage.fuse, stage.layer or 0
        if state is None or fuse is None:
            return original(x, *args, **kwargs)
        block, blocks = self.spec.layers[number], self.spec.blocks
        if fuse.where == "middle":
            x = x + self._attend(number, x, state, kwargs)
            x = self._merge(stage, number, x, state)
            return x + blocks.feed(block, x)
        projections = blocks.project(block, x)
        state.taps[number] = [torch.cat([t.flatten(1) for t in projections], dim=1)]
        x = self._merge(stage, number, x, state)
        self._geometry(number, x, state, kwargs)
        x = x + self._attend(number, x, state, kwargs)
        return x + blocks.feed(block, x)

    def _after_merges(self, number: int, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A block that does not merge, behind one that did: sizes still count in its attention."""
        if self.state is None or not self.state.merged:
            return original(x, *args, **kwargs)
        x = x + self._attend(number, x, self.state, kwargs)
        return x + self.spec.blocks.feed(self.spec.layers[number], x)

    def _attend(self, number: int, x: Tensor, state: CellState, kwargs: dict[str, Any]) -> Tensor:
        """The block's attention branch, every cell counted as often as it stands for original cells.

        The towers take no mask, so with sizes to count the same projections and rotary embedding go through packed
        attention with a key bias.
        """
        block, blocks = self.spec.layers[number], self.spec.blocks
        fuse = self.fusions[0].fuse
        if not (state.merged and state.sizes is not None and fuse is not None and fuse.proportional):
            return blocks.attend(block, x, None, kwargs)
        q, k, v = blocks.project(block, x)
        cos, sin = (table.float() for table in kwargs["position_embeddings"])
        q, k = (
            rotate(t.float().transpose(0, 1)[None], cos[None], sin[None])[0].transpose(0, 1).to(v.dtype) for t in (q, k)
        )
        lengths = kwargs["cu_seqlens"].diff().tolist()
        bias = state.sizes.log().repeat_interleave(self.spec.unit)
        return blocks.output(block, kernels.packed_attention(q, k, v, lengths, scale=blocks.scale(block), bias=bias))

    def _merge(self, stage: Stage, number: int, x: Tensor, state: CellState) -> Tensor:
        """Merge inside every window (every frame where there are none), slot with slot."""
        assert stage.fuse is not None
        fuse, unit = stage.fuse, self.spec.unit
        later = sum(1 for other in self.fusions if (other.layer or 0) >= number)
        state.sizes = torch.ones(len(state.cells), device=x.device) if state.sizes is None else state.sizes
        state.place = state.grid_places if state.place is None else state.place
        lengths, goals = self._segments(state, later)
        slot = torch.arange(len(state.cells), device=x.device)
        weights = state.sizes.clone()
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        together: dict[tuple[int, int], list[int]] = {}
        for segment, key in enumerate(zip(lengths, goals, strict=True)):
            together.setdefault(key, []).append(segment)
        keep = torch.ones(len(state.cells), dtype=torch.bool, device=x.device)
        left = list(lengths)
        for (length, goal), segments in together.items():
            if goal >= length:
                continue
            rows = on_device([starts[s] for s in segments], x.device)[:, None] + torch.arange(length, device=x.device)
            view = self._fusion_view(number, x, state, rows, goal)
            plan = fuse.match(view, length - goal)
            if fuse.weights is not None:
                weights[rows] = fuse.weights(view).to(weights.dtype)
            representative = rows.gather(1, plan.representative)
            slot[rows] = representative.gather(1, plan.dst)
            mask = torch.zeros_like(rows, dtype=torch.bool).scatter(1, plan.representative, True)
            keep[rows] = mask
            for segment in segments:
                left[segment] = plan.n_out
        return self._pour(number, x, state, slot, weights, keep, lengths, left, unit)

    def _pour(
        self, number: int, x: Tensor, state: CellState, slot: Tensor, weights: Tensor, keep: Tensor,
        lengths: list[int], left: list[int], unit: int,
    ) -> Tensor:  # fmt: skip
        """Apply one merge to tokens, sizes, places and the running map."""
        count = sum(left)
        index = kernels.topk(keep[None].float(), count)[0]
        rank = keep.cumsum(0) - 1
        plan = kernels.MergePlan(rank[slot][None], count)
        cells = x.unflatten(0, (-1, unit)).flatten(1)
        assert state.sizes is not None and state.place is not None
        own = state.sizes[None]
        (merged, place), (sizes,) = plan.pour(
            [cells[None], state.place.flatten(1)[None]], [own], [weights[None].to(cells.dtype), own]
        )
        merged, place, sizes = merged[0].unflatten(1, (unit, -1)), place[0].unflatten(1, (unit, 2)), sizes[0]
        target = torch.full_like(state.dst, -1)
        target[state.cells] = state.cells[slot]
        state.dst = torch.where(state.dst >= 0, target[state.dst.clamp_min(0)], -1)
        frame_of = torch.repeat_interleave(torch.arange(len(state.counts)), torch.tensor(state.counts))
        firsts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
        counts = [0] * len(state.counts)
        for frame, size in zip(frame_of[firsts].tolist(), left, strict=True):
            counts[frame] += size
        state.cells, state.sizes, state.place, state.counts = state.cells[index], sizes, place, counts
        state.merged, state.carry = True, None
        state.stages.append((number, state.standing()))
        return merged.flatten(0, 1)

    def _segments(self, state: CellState, later: int) -> tuple[list[int], list[int]]:
        """Cells of every window (or frame) now, and how many each shall be left with by this merge."""
        if self.spec.full_layers is None:
            lengths = list(state.counts)
            owners = [[i] for i in range(len(lengths))]
        else:
            lengths = torch.unique_consecutive(state.window[state.cells], return_counts=True)[1].tolist()
            owners, start, number = [], 0, 0
            for count in state.counts:
                own, end = [], start + count
                while start < end:
                    own.append(number)
                    start += lengths[number]
                    number += 1
                owners.append(own)
        goals = list(lengths)
        for frame, own in enumerate(owners):
            goal = merge_goal(state.counts[frame], state.targets[frame], later, self.compat)
            for segment, left in zip(own, segment_goals(goal, [lengths[i] for i in own]), strict=True):
                goals[segment] = left
        return lengths, goals

    def _fusion_view(self, number: int, x: Tensor, state: CellState, rows: Tensor, target: int) -> TowerView:
        patches = self._patches(rows)
        layer = self.spec.layers[number]
        view = self._view(number, x, state, rows, target, -1)
        if number in state.taps:
            # similarity is taken before the rotary embedding; attention after it
            q, k, v = (t[patches].transpose(1, 2) for t in self.spec.blocks.split(layer, state.taps[number]))
            cos, sin = (table[patches].float() for table in state.rotary[number])
            bias = None if state.sizes is None else state.sizes[rows].log().repeat_interleave(self.spec.unit, 1)
            turned = rotate(q.float(), cos, sin), rotate(k.float(), cos, sin)
            view.received = view.per_cell(received(*turned, view.scale, bias))
            view.q, view.k, view.v = q, k, v
        return view
