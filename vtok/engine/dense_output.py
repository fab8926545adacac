"""From a dense tower to the placeholders: stages on its output, budgets per tile, and packing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.engine.host import on_device
from vtok.engine.spans import Encoded
from vtok.engine.tiles import TileState
from vtok.engine.towers import distribute
from vtok.errors import VtokError
from vtok.protocol import Medium, Part
from vtok.view import Selection, Stage


class DenseOutput:
    """The output half of ``DenseTower``; everything it calls on ``self`` besides is there."""

    session: Any
    spec: Any
    state: TileState | None
    final: list[Stage]
    compat: bool
    newline: float
    pending: tuple[list[int], Tensor | None] | None
    taps: list[Tensor]
    pack: Any
    _view: Any
    _drop_padding: Any

    def _before_projector(self, module: nn.Module, args: tuple) -> Any:
        state = self.state
        if state is None or not self.final:
            return None
        x = args[0]
        for stage in self.final:
            x = self._select_output(stage, x, state)
        return (x, *args[1:])

    def _select_output(self, stage: Stage, x: Tensor, state: TileState) -> Tensor:
        """A stage on the tower's output features, (tiles, n, D) without prefix."""
        assert stage.select is not None
        number, prefix = self.spec.feature_layer + 1, self.spec.prefix
        padded = torch.cat((x.new_zeros(x.shape[0], prefix, x.shape[2]), x), 1) if prefix else x
        if not self.compat:
            padded = self._drop_padding(padded, state)
        found: dict[int, tuple[list[int], Selection]] = {}
        for count, target, rows in state.groups():
            view = self._view(number, padded, state, count, target, rows)
            view.parts = tile_parts(state.total)
            everything = torch.arange(count, device=x.device).expand(len(rows), count)
            if count <= target:
                found[rows[0]] = (rows, Selection(everything, view.features))
                continue
            answer = stage.select(view, target)
            if not isinstance(answer, Selection):
                answer = Selection(answer)
            if answer.features is None:
                answer.features = kernels.gather_tokens(view.features, answer.indices)
            found[rows[0]] = (rows, answer)
        width = max(answer.indices.shape[1] for _, answer in found.values())
        out = x.new_zeros(x.shape[0], width, x.shape[2])
        tokens = torch.zeros(x.shape[0], width, dtype=torch.long, device=x.device)
        counts, dst = list(state.counts), state.dst.clone()
        for rows, answer in found.values():
            size = answer.indices.shape[1]
            assert answer.features is not None
            out[rows, :size] = answer.features.to(x.dtype)
            own = state.tokens[rows]
            tokens[rows, :size] = own.gather(1, answer.indices)
            state.front = state.front or answer.front
            local = answer.groups
            if local is None:
                local = torch.full_like(own[:, : counts[rows[0]]], -1)
                local = local.scatter(1, answer.indices, torch.arange(size, device=x.device).expand(len(rows), size))
            target_token = torch.where(local >= 0, tokens[rows].gather(1, local.clamp_min(0)), -1)
            dst[rows] = torch.full_like(dst[rows], -1).scatter(1, own[:, : counts[rows[0]]], target_token)
            state.merged = state.merged or answer.groups is not None
            for row, count in zip(rows, answer.counts or [size] * len(rows), strict=True):
                counts[row] = count
        state.counts, state.tokens, state.dst = counts, tokens, dst
        state.stages.append((None, state.kept()))
        return out

    def _after_projector(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Back to one row per patch: survivors at their own places, zeros elsewhere."""
        state = self.state
        if state is None or (max(state.counts) == state.total and not state.front and not self.final):
            return None
        slots = (
            torch.arange(output.shape[1], device=output.device).expand(output.shape[:2])
            if state.front
            else state.tokens
        )
        return kernels.scatter_tokens(output, slots.to(output.device), state.total, state.real().to(output.device))

    def encode(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], original: Any, args: Any, kwargs: Any
    ) -> tuple[Any, list[Encoded]]:
        tiles = max(medium.tiles.stop for medium in media)
        per_tile = self.session.adapter.tile_length(modality)
        valid = self.valid_patches(modality, call, media, tiles, per_tile)
        self.pending = (self.tile_targets(media, valid, tiles, per_tile), valid)
        self.state, self.taps = None, []
        try:
            output = original(*args, **kwargs)
            state = self.state
            if state is None:
                raise VtokError(
                    f"{self.session.name} acts inside the vision tower, but {type(self.spec.root).__name__} never ran "
                    "its blocks in this call; pass pixels, not precomputed features"
                )
            return output, self._encoded(modality, call, media, state, output)
        finally:
            self.pending = self.state = None

    def valid_patches(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], tiles: int, per_tile: int
    ) -> Tensor | None:
        """(tiles, N) bool: patches that the family's packing keeps, or ``None`` when it keeps all."""
        if not self.session.shape.tiled or modality != "image":
            return None
        valid = torch.ones(tiles, per_tile, dtype=torch.bool)
        for medium, packed in zip(media, self.patch_index(modality, call, media, tiles, per_tile), strict=True):
            if medium.interpolated or self.session.tower_count(medium.length) >= medium.length:
                continue  # every patch counts
            valid[medium.tiles] = False
            valid.view(-1)[packed[packed >= 0]] = True
        return None if bool(valid.all()) else valid

    def patch_index(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], tiles: int, per_tile: int
    ) -> list[Tensor]:
        """Flat (tile, patch) number at each placeholder, -1 at newlines; on the host."""
        flat = torch.arange(tiles * per_tile, dtype=torch.float64).view(tiles, per_tile, 1)
        return [packed[:, 0].round().long() for packed in self.pack(modality, call, media, flat, -1.0)]

    def tile_targets(self, media: Sequence[Medium], valid: Tensor | None, tiles: int, per_tile: int) -> list[int]:
        """Patches that each tile must be left with."""
        targets = [per_tile] * tiles
        for medium in media:
            goal = self.session.tower_count(medium.length)
            numbers = range(medium.tiles.start, medium.tiles.stop)
            if goal >= medium.length:
                continue
            if medium.interpolated:
                share = [max(1, round(per_tile * goal / medium.length))] * len(numbers)
            elif self.compat or valid is None:
                share = distribute(goal, [per_tile] * len(numbers))
            else:
                share = distribute(goal, valid[medium.tiles].sum(1).tolist())
            for number, count in zip(numbers, share, strict=True):
                targets[number] = count
        return targets

    def _encoded(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], state: TileState, output: Any
    ) -> list[Encoded]:
        """What stands of each medium, in placeholder order."""
        whole = [self.session.tower_count(medium.length) >= medium.length for medium in media]
        if all(whole):
            return [Encoded(medium, medium.length) for medium in media]
        weights = self.pack(modality, call, media, state.kept().float()[..., None], self.newline)
        stages = [(n, self.pack(modality, call, media, k.float()[..., None], self.newline)) for n, k in state.stages]
        index = None
        if state.merged:
            index = self.patch_index(modality, call, media, len(state.counts), state.total)
        encoded = []
        for number, medium in enumerate(media):
            if whole[number]:
                encoded.append(Encoded(medium, medium.length))
                continue
            weight = weights[number][:, 0]
            if medium.interpolated:
                item = self._resampled(medium, weight, output, number)
            else:
                kept = weight > 0.5
                count = int(kept.sum()) if self.session.shape.tiled else state.counts[medium.tiles.start]
                tokens = kernels.topk(kept[None].float(), count)[0]
                item = Encoded(medium, count, tokens)
            standing = torch.zeros(medium.length, dtype=torch.bool, device=weight.device)
            standing[item.tokens] = True
            # a resampled token stands for as long as one of its patches does, and what stands at last always did
            least = 0.0 if medium.interpolated else 0.5
            item.stages = [(layer, (packed[number][:, 0] > least) | standing) for layer, packed in stages]
            if item.stages:
                item.stages[-1] = (item.stages[-1][0], standing)
            if index is not None and not medium.interpolated:
                item.groups = packed_groups(index[number].to(state.dst.device), state.dst)
            if state.front and not self.session.shape.tiled:
                row = medium.tiles.start
                item.tokens = state.tokens[row, : item.count]
                item.slots = torch.arange(item.count, device=weight.device)
            encoded.append(item)
        return encoded

    def _resampled(self, medium: Medium, weight: Tensor, output: Any, number: int) -> Encoded:
        """A run that was resampled from the tiles: divide by the share of real tokens, keep the best supported."""
        count = min(self.session.tower_count(medium.length), medium.length)
        # resampling kernels round differently with the batch's shape: ties must not depend on that
        tokens = kernels.topk((weight[None] * 4096).round(), count)[0]
        features = output.pooler_output[number]
        there = slice(len(features))  # transformers 5.17 appends a video's newline token later
        scaled = features / weight[there].clamp_min(1e-3).to(features.dtype)[:, None]
        newlines = newline_mask(medium)[there].to(features.device)
        scaled = torch.where(newlines[:, None], features, scaled)
        if isinstance(output.pooler_output, Tensor):
            output.pooler_output = output.pooler_output.index_put((on_device(number, features.device),), scaled)
        else:
            output.pooler_output = [scaled if i == number else own for i, own in enumerate(output.pooler_output)]
        return Encoded(medium, count, tokens)


def tile_parts(total: int) -> tuple[Part, ...]:
    """The grid of a tile of ``total`` patches, where tiles are square."""
    side = math.isqrt(total)
    return (Part(side, side),) if side * side == total else ()


def newline_mask(medium: Medium) -> Tensor:
    """(length,) bool: newline tokens of a run."""
    marks: list[bool] = []
    for part in medium.parts:
        if part.per_row:
            marks += ([False] * part.width + [True] * part.newlines) * part.height
        else:
            marks += [False] * (part.height * part.width) + [True] * part.newlines
    return torch.tensor(marks)


def packed_groups(index: Tensor, dst: Tensor) -> Tensor:
    """Merge targets per tile patch to merge targets per placeholder."""
    tiles, total = dst.shape
    offset = torch.arange(tiles, device=dst.device)[:, None] * total
    flat = torch.where(dst >= 0, dst + offset, -1).flatten()
    where = torch.full((tiles * total + 1,), -1, device=dst.device)
    real = index >= 0
    where[index[real]] = torch.arange(len(index), device=dst.device)[real]
    target = torch.where(real, flat[index.clamp_min(0)], -1)
    return torch.where(target >= 0, where[target.clamp_min(0)], -1)
