"""Packed towers (Qwen): whole 2x2 cells are cut or merged, per frame, and inside windows where there are windows.

All pictures of a call lie in one (seq, D) sequence, so frames may end up with any length: only ``cu_seqlens``, the
window lengths and the rotary tables have to follow. The merger's output is put back to full length, so the library's
own un-permutation and splitting stay right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.engine.cells import CellState
from vtok.engine.host import host_sizes, on_device
from vtok.engine.packed_fusing import PackedFusing
from vtok.engine.rows import rotate
from vtok.engine.spans import Encoded
from vtok.engine.towers import Tower, Wrapped, distribute
from vtok.errors import VtokError
from vtok.protocol import Medium
from vtok.view import Selection, Stage, TowerView


class PackedTower(PackedFusing, Tower):
    """Runs the encoder stages of a session on a packed tower."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        stages = [stage for stage in session.stages if stage.site == "encoder"]
        self.cuts = [stage for stage in stages if stage.select is not None and stage.layer is not None]
        self.final = [stage for stage in stages if stage.select is not None and stage.layer is None]
        self.fusions = [stage for stage in stages if stage.fuse is not None]
        self.observe = next((stage.observe for stage in stages if stage.observe is not None), None)
        self.state: CellState | None = None
        self.compat = bool(getattr(session.methods[0], "compat", False))

    def install(self) -> None:
        spec, hook = self.spec, self.session.hook
        last_cut = max((stage.layer or 0 for stage in self.cuts), default=0)
        watched = set(self.observed(last_cut)) if self.observe is not None else {(s.layer or 0) - 1 for s in self.cuts}
        watched |= {spec.feature_layer} if self.final else set()
        watched |= {stage.layer or 0 for stage in self.fusions if "qkv" in stage.reads}
        for number in sorted(watched):
            for tap in spec.blocks.taps(spec.layers[number]):
                hook(tap.register_forward_hook(partial(self._tap, number)))
        for number, layer in enumerate(spec.layers):
            hook(layer.register_forward_pre_hook(partial(self._before_block, number), with_kwargs=True))
        for stage in self.fusions:
            layer = spec.layers[stage.layer or 0]
            self.session.wrapped.append(Wrapped(layer, "forward", partial(self._fuse, stage)))
        if self.fusions:
            self.use_xformers()
            merging = {stage.layer for stage in self.fusions}
            for number in range(min(layer or 0 for layer in merging) + 1, len(spec.layers)):
                if number not in merging:
                    around = partial(self._after_merges, number)
                    self.session.wrapped.append(Wrapped(spec.layers[number], "forward", around))
        if not spec.mergers:
            raise VtokError(f"{type(spec.root).__name__} has no patch merger to put dropped cells back after")
        hook(spec.mergers[0].register_forward_pre_hook(self._before_merger))
        for merger in spec.mergers:
            hook(merger.register_forward_hook(self._after_merger))

    # -- hooks --------------------------------------------------------------------------------------------------

    def _tap(self, number: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.state is not None:
            self.state.taps[number] = [output]

    def _before_block(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        state = self.state
        if state is None:
            return None
        x = args[0]
        if number and self.observe is not None and (number - 1) in state.taps:
            self._observe(number, x, state)
        for stage in self.cuts:
            if stage.layer == number:
                x = self._cut(stage, number, x, state)
        if number - 1 != self.spec.feature_layer:
            state.taps.pop(number - 1, None)
        kwargs = dict(kwargs)
        if state.tables is None:
            state.tables = kwargs["position_embeddings"]
        self._geometry(number, x, state, kwargs)
        state.rotary = {number: kwargs["position_embeddings"]}
        return (x, *args[1:]), kwargs

    def _geometry(self, number: int, x: Tensor, state: CellState, kwargs: dict[str, Any]) -> None:
        """Rotary tables and segment bounds of the cells that stand."""
        if len(state.cells) == len(state.order) and not state.merged:
            return
        unit = self.spec.unit
        if state.place is not None:
            kwargs["position_embeddings"] = self.spec.root.rotary_pos_emb(x, state.place.flatten(0, 1))
        else:
            rows = (state.cells[:, None] * unit + torch.arange(unit, device=x.device)).flatten()
            assert state.tables is not None
            kwargs["position_embeddings"] = tuple(table[rows] for table in state.tables)
        kwargs["cu_seqlens"] = self._bounds(number, state, kwargs["cu_seqlens"])

    def _bounds(self, number: int, state: CellState, given: Tensor) -> Tensor:
        full = self.spec.full_layers
        if full is None or number in full:
            lengths = on_device([count for count in state.counts if count], given.device)
        else:
            lengths = torch.unique_consecutive(state.window[state.cells], return_counts=True)[1]
        ends = (lengths * self.spec.unit).cumsum(0)
        return torch.cat((ends.new_zeros(1), ends)).to(given.dtype)

    # -- views --------------------------------------------------------------------------------------------------

    def _groups(self, state: CellState) -> list[tuple[int, int, list[int]]]:
        together: dict[tuple[int, int], list[int]] = {}
        for number, key in enumerate(zip(state.counts, state.targets, strict=True)):
            together.setdefault(key, []).append(number)
        return [(count, target, frames) for (count, target), frames in together.items()]

    def _rows(self, state: CellState, count: int, frames: list[int], device: Any) -> Tensor:
        """(G, count) rows of these frames in the current sequence of cells."""
        starts = on_device([state.frames()[frame][0] for frame in frames], device)
        return starts[:, None] + torch.arange(count, device=device)

    def _patches(self, rows: Tensor) -> Tensor:
        """(G, n) cell rows to (G, n * unit) patch rows."""
        unit = self.spec.unit
        return (rows[..., None] * unit + torch.arange(unit, device=rows.device)).flatten(1)

    def _view(self, number: int, x: Tensor, state: CellState, rows: Tensor, target: int, block: int) -> TowerView:
        """Frames (or windows) whose cells are at ``rows``; q, k, v of ``block`` where they were tapped."""
        patches = self._patches(rows)
        q = k = v = None
        layer = self.spec.layers[block]
        if block in state.taps:
            projections = self.spec.blocks.split(layer, state.taps[block])
            q, k, v = (t[patches].transpose(1, 2) for t in projections)
            cos, sin = (table[patches] for table in state.rotary[block])
            q, k = (
                rotate(q.float(), cos.float(), sin.float()).to(q.dtype),
                rotate(k.float(), cos.float(), sin.float()).to(k.dtype),
            )
        return TowerView(
            features=x[patches],
            tokens=state.cells[rows],
            places=[0] * rows.shape[0],
            layer=number,
            q=q,
            k=k,
            v=v,
            scale=self.spec.blocks.scale(layer),
            carry=None if state.carry is None else state.carry[rows],
            sizes=None if state.sizes is None else state.sizes[rows],
            target=target,
            unit=self.spec.unit,
        )

    # -- cuts ---------------------------------------------------------------------------------------------------

    def _observe(self, number: int, x: Tensor, state: CellState) -> None:
        assert self.observe is not None
        carry = torch.zeros(len(state.cells), device=x.device) if state.carry is None else state.carry.clone()
        for count, target, frames in self._groups(state):
            if count > target:
                rows = self._rows(state, count, frames, x.device)
                carry[rows] = self.observe(self._view(number, x, state, rows, target, number - 1)).to(carry.dtype)
        state.carry = carry

    def _cut(self, stage: Stage, number: int, x: Tensor, state: CellState) -> Tensor:
        assert stage.select is not None
        keep = torch.ones(len(state.cells), dtype=torch.bool, device=x.device)
        counts = list(state.counts)
        for count, target, frames in self._groups(state):
            if count <= target:
                continue
            rows = self._rows(state, count, frames, x.device)
            answer = stage.select(self._view(number, x, state, rows, target, number - 1), target)
            answer = answer.indices if isinstance(answer, Selection) else answer
            if answer.dtype == torch.bool:
                sizes = host_sizes(answer)
            else:
                sizes, answer = [answer.shape[1]] * len(frames), kernels.keep_mask(answer, count)
            keep[rows] = answer
            for frame, size in zip(frames, sizes, strict=True):
                counts[frame] = size
        x = self._narrow(x, keep, counts, state)
        state.stages.append((number, state.standing()))
        return x

    def _narrow(self, x: Tensor, keep: Tensor, counts: list[int], state: CellState) -> Tensor:
        if counts == state.counts:
            return x
        index = kernels.topk(keep[None].float(), sum(counts))[0]
        gone = state.standing()
        state.cells, state.counts = state.cells[index], counts
        state.carry = None if state.carry is None else state.carry[index]
        state.sizes = None if state.sizes is None else state.sizes[index]
        state.place = None if state.place is None else state.place[index]
        lost = gone & ~state.standing()
        state.dst = torch.where(lost[state.dst.clamp_min(0)], -1, state.dst)
        return x[self._patches(index[None])[0]]

    # -- the tower's end ----------------------------------------------------------------------------------------

    def _before_merger(self, module: nn.Module, args: tuple) -> Any:
        state = self.state
        if state is None:
            return None
        x = args[0]
        for stage in self.final:
            x = self._select_output(stage, x, state)
        x = self._trim(x, state)
        return (x, *args[1:])

    def _trim(self, x: Tensor, state: CellState) -> Tensor:
        """Windows of one cell cannot merge: what is left above the budget goes by size, smallest groups first."""
        if not self.fusions or all(c <= t for c, t in zip(state.counts, state.targets, strict=True)):
            return x
        keep = torch.ones(len(state.cells), dtype=torch.bool, device=x.device)
        for start, count, target in state.frames():
            if count > target:
                assert state.sizes is not None
                chosen = kernels.topk(state.sizes[None, start : start + count], target)
                keep[start : start + count] = kernels.keep_mask(chosen, count)[0]
        counts = [min(c, t) for c, t in zip(state.counts, state.targets, strict=True)]
        x = self._narrow(x, keep, counts, state)
        state.stages[-1] = (state.stages[-1][0], state.standing())
        return x

    def _select_output(self, stage: Stage, x: Tensor, state: CellState) -> Tensor:
        """A stage on the tower's last features: cells are chosen or merged, slot with slot."""
        assert stage.select is not None
        unit, number = self.spec.unit, self.spec.feature_layer + 1
        keep = torch.ones(len(state.cells), dtype=torch.bool, device=x.device)
        counts, x = list(state.counts), x.clone()
        for count, target, frames in self._groups(state):
            if count <= target:
                continue
            rows = self._rows(state, count, frames, x.device)
            answer = stage.select(self._view(number, x, state, rows, target, number - 1), target)
            answer = answer if isinstance(answer, Selection) else Selection(answer)
            if answer.features is not None:
                places = self._patches(rows.gather(1, answer.indices))
                x = x.index_put((places.flatten(),), answer.features.flatten(0, 1).to(x.dtype))
            if answer.groups is not None:
                own = state.cells[rows]
                local = answer.groups
                target_cell = own.gather(1, answer.indices).gather(1, local.clamp_min(0))
                state.dst[own] = torch.where(local >= 0, target_cell, -1)
                state.merged = True
            keep[rows] = kernels.keep_mask(answer.indices, count)
            for frame in frames:
                counts[frame] = answer.indices.shape[1]
        dst = state.dst
        x = self._narrow(x, keep, counts, state)
        state.dst = dst if state.merged else state.dst
        state.stages.append((None, state.standing()))
        assert unit * len(state.cells) == x.shape[0]
        return x

    def _after_merger(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        state = self.state
        if state is None:
            return None
        if module is not self.spec.mergers[0]:
            sizes = torch.ones(len(state.cells), device=state.cells.device) if state.sizes is None else state.sizes
            state.taken.append(sizes.new_zeros(len(state.order)).index_copy(0, state.cells, sizes))
        if len(state.cells) == len(state.order):
            return None
        return output.new_zeros(len(state.order), output.shape[1]).index_copy(0, state.cells.to(output.device), output)

    # -- encode -------------------------------------------------------------------------------------------------

    def encode(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], original: Any, args: Any, kwargs: Any
    ) -> tuple[Any, list[Encoded]]:
        grid = torch.as_tensor(call[f"{modality}_grid_thw"])
        pixels = call["pixel_values_videos" if modality == "video" else "pixel_values"]
        self.state = state = self._state(media, grid, pixels)
        whole = state.counts == state.targets
        if whole:
            self.state = None
        try:
            output = original(*args, **kwargs)
        finally:
            self.state = None
        if whole:
            return output, [Encoded(medium, medium.length) for medium in media]
        if not state.stages:
            raise VtokError(
                f"{self.session.name} acts inside the vision tower, but {type(self.spec.root).__name__} never ran its "
                "blocks in this call; pass pixels, not precomputed features"
            )
        if state.merged:
            self._pour_planes(output, state)
        return output, self._encoded(media, state)

    def _pour_planes(self, output: Any, state: CellState) -> None:
        """DeepStack planes are taken before the last merges: a merged cell gets the mean of its members' rows."""
        planes = getattr(output, "deepstack_features", None) or []
        target = torch.where(state.dst >= 0, state.order[state.dst.clamp_min(0)], -1)
        raster = torch.empty_like(target).index_copy(0, state.order, target)
        for number, (parts, taken) in enumerate(zip(planes, state.taken, strict=True)):
            joined = isinstance(parts, Tensor)  # transformers 5.17 hands the planes of all pictures out in one
            whole = parts if joined else torch.cat(tuple(parts))
            sizes = torch.empty_like(taken).index_copy(0, state.order, taken)
            where = raster[None].to(whole.device)
            poured = kernels.merge_mean(whole[None], where, len(whole), sizes[None].to(whole.device))[0]
            planes[number] = poured if joined else poured.split([len(part) for part in parts])

    def _state(self, media: Sequence[Medium], grid: Tensor, pixels: Tensor) -> CellState:
        device = next(self.spec.root.parameters()).device
        device = pixels.device if device.type == "meta" else device  # offloaded weights come in layer by layer
        targets, counts = [], []
        for medium in media:
            cells = [part.length for part in medium.parts]
            targets += distribute(min(self.session.tower_count(medium.length), medium.length), cells)
            counts += cells
        total = sum(counts)
        windows = self.session.adapter.windows(grid)
        if windows is None:
            order = torch.arange(total)
            window = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        else:
            order, lengths = windows
            window = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        everything = torch.arange(total, device=device)
        state = CellState(order.to(device), window.to(device), targets, counts, everything, everything)
        if self.fusions:
            from transformers.vision_utils import get_vision_position_ids

            places = get_vision_position_ids(grid, int(self.spec.unit**0.5)).unflatten(0, (-1, self.spec.unit))
            state.grid_places = places.to(device).float()[state.order]
        return state

    def _encoded(self, media: Sequence[Medium], state: CellState) -> list[Encoded]:
        """What stands of each medium, by raster cell."""
        raster = torch.zeros_like(state.order)
        raster[state.order] = torch.arange(len(state.order), device=state.order.device)  # raster -> processing position
        standing = state.standing()[raster]
        stages = [(layer, mask[raster]) for layer, mask in state.stages]
        encoded, frame = [], 0
        for medium in media:
            own = slice(medium.tiles.start, medium.tiles.stop)
            frames = len(medium.parts)
            count = sum(state.counts[frame : frame + frames])
            if count == medium.length:
                encoded.append(Encoded(medium, count))
            else:
                item = Encoded(medium, count, kernels.topk(standing[own][None].float(), count)[0])
                item.stages = [(layer, mask[own]) for layer, mask in stages]
                if state.merged:
                    target = state.dst[raster[own]]
                    item.groups = torch.where(target >= 0, state.order[target.clamp_min(0)] - medium.tiles.start, -1)
                encoded.append(item)
            frame += frames
        return encoded
