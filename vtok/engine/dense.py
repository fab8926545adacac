"""Dense towers (CLIP, SigLIP, timm, open_clip): shorten (B, prefix + N, D) between or inside the blocks.

Tiles of one call may end up with different lengths (budgets per image, schedules that follow the data). The batch is
then as long as its longest tile: real tokens first, the rest masked as keys, so that every tile gets what it would
get alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.engine.spans import Encoded
from vtok.engine.towers import Tower, Wrapped, distribute, host_sizes, merge_goal
from vtok.errors import VtokError
from vtok.protocol import Medium
from vtok.view import Selection, Stage, TowerView


@dataclass
class TileState:
    """Tiles of one tower run.

    Attributes:
        total: patches per tile at the start.
        targets: patches that each tile must be left with.
        counts: patches of each tile now, on the host.
        tokens: (B, n) original patch of each slot; slots past a tile's count mean nothing.
        dst: (B, total) original patch that each patch was poured into, -1 where dropped.
        sizes: (B, n) original patches per slot, once tokens were merged.
        carry: (B, n) the method's running score.
        valid: (B, total) patches that survive the family's unpadding, where some do not.
        front: kept tokens lie first instead of at their own places.
    """

    total: int
    targets: list[int]
    counts: list[int]
    tokens: Tensor
    dst: Tensor
    sizes: Tensor | None = None
    carry: Tensor | None = None
    valid: Tensor | None = None
    front: bool = False
    merged: bool = False
    prefix_features: Tensor | None = None
    taps: dict[int, list[Tensor]] = field(default_factory=dict)
    stages: list[tuple[int | None, Tensor]] = field(default_factory=list)

    @property
    def ragged(self) -> bool:
        return len(set(self.counts)) > 1

    def real(self) -> Tensor:
        """(B, n) bool: slots that hold a token."""
        counts = torch.tensor(self.counts, device=self.tokens.device)
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None] < counts[:, None]

    def kept(self) -> Tensor:
        """(B, total) bool: original patches that stand."""
        kept = torch.zeros(len(self.counts), self.total, dtype=torch.long, device=self.tokens.device)
        return kept.scatter_add(1, self.tokens, self.real().long()) > 0  # slots past the count may repeat a token

    def groups(self) -> list[tuple[int, int, list[int]]]:
        """(count, target, rows) of the tiles that look alike."""
        together: dict[tuple[int, int], list[int]] = {}
        for row, key in enumerate(zip(self.counts, self.targets, strict=True)):
            together.setdefault(key, []).append(row)
        return [(count, target, rows) for (count, target), rows in together.items()]


class DenseTower(Tower):
    """Runs the encoder stages of a session on a dense tower."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        stages = [stage for stage in session.stages if stage.site == "encoder"]
        self.cuts = [stage for stage in stages if stage.select is not None and stage.layer is not None]
        self.final = [stage for stage in stages if stage.select is not None and stage.layer is None]
        self.fusions = [stage for stage in stages if stage.fuse is not None]
        self.observe = next((stage.observe for stage in stages if stage.observe is not None), None)
        self.first = min((stage.layer for stage in stages if stage.layer is not None), default=None)
        self.state: TileState | None = None
        self.pending: tuple[list[int], Tensor | None] | None = None
        self.newline = 0.0 if session.methods[0].newlines == "drop" else 1.0
        self.compat = bool(getattr(session.methods[0], "compat", False))

    # -- hooks --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        super().install()
        spec, hook = self.spec, self.session.hook
        hook(spec.root.register_forward_pre_hook(self._begin, with_kwargs=True))
        hook(spec.root.register_forward_hook(self._end, always_call=True))
        last_cut = max((stage.layer or 0 for stage in self.cuts), default=-1)
        watched = set(self.observed(last_cut)) if self.observe is not None else set()
        watched |= {(stage.layer or 0) - 1 for stage in self.cuts if "qkv" in stage.reads}
        watched |= {spec.feature_layer for stage in self.final if "qkv" in stage.reads}
        watched |= {stage.layer or 0 for stage in self.fusions if "qkv" in stage.reads}
        for number in sorted(watched):
            taps = spec.blocks.taps(spec.layers[number])
            for order, tap in enumerate(taps):
                hook(tap.register_forward_hook(partial(self._tap, number, order)))
            if not taps:
                hook(spec.layers[number].register_forward_pre_hook(partial(self._input, number), with_kwargs=True))
        for number in range(self.first or 0, len(spec.layers)):
            hook(spec.layers[number].register_forward_pre_hook(partial(self._before_block, number), with_kwargs=True))
        if self.observe is not None:
            for number in range(1, self.first or 0):
                hook(spec.layers[number].register_forward_pre_hook(partial(self._watch, number)))
        for stage in self.fusions:
            layer = spec.layers[stage.layer or 0]
            self.session.wrapped.append(Wrapped(layer, "forward", partial(self._fuse, stage)))
        if self.final:
            hook(spec.layers[spec.feature_layer].register_forward_hook(self._prefix))
        if spec.projector is not None:
            hook(spec.projector.register_forward_pre_hook(self._before_projector))
            hook(spec.projector.register_forward_hook(self._after_projector))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.state = None
        self.waiting = True

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.spec.projector is None or output is None:
            self.finished, self.state = self.state, None

    def _start(self, x: Tensor) -> TileState | None:
        """State at the first watched block of a run: now the number of patches is known."""
        if self.state is not None:
            return self.state
        if not getattr(self, "waiting", False):
            return None
        self.waiting = False
        tiles, total = x.shape[0], x.shape[1] - self.spec.prefix
        if self.pending is not None:
            targets, valid = self.pending
            self.pending = None
        else:
            targets, valid = [self.session.tower_count(total)] * tiles, None
        if len(targets) != tiles:
            raise VtokError(
                f"the vision tower was given {tiles} tiles where {len(targets)} were expected; this layout of pictures "
                "is not known to vtok"
            )
        everything = torch.arange(total, device=x.device).expand(tiles, total)
        self.state = TileState(total, targets, [total] * tiles, everything, everything, valid=valid)
        return self.state

    def _tap(self, number: int, order: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.state is not None or getattr(self, "waiting", False):
            state = self._start(output)
            if state is not None:
                state.taps.setdefault(number, []).append(output)

    def _input(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Blocks without projection modules (open_clip): keep the input, project it when asked."""
        state = self._start(args[0])
        if state is not None:
            state.taps[number] = [args[0]]

    def _prefix(self, module: nn.Module, args: tuple, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        state = self._start(x)
        if state is not None:
            state.prefix_features = x[:, : self.spec.prefix]

    # -- between blocks -----------------------------------------------------------------------------------------

    def _watch(self, number: int, module: nn.Module, args: tuple) -> None:
        state = self._start(args[0])
        if state is not None and number - 1 in state.taps:
            self._observe(number, args[0], state)

    def _before_block(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x = args[0]
        state = self._start(x)
        if state is None or number > self.spec.feature_layer + 1:
            if state is None or not (state.ragged or state.merged):
                return None
        assert state is not None
        if number and self.observe is not None and number - 1 in state.taps and number <= max(s.layer or 0 for s in self.cuts):
            self._observe(number, x, state)
        for stage in self.cuts:
            if stage.layer == number:
                x = self._cut(stage, number, x, state)
        if number - 1 != self.spec.feature_layer:
            state.taps.pop(number - 1, None)
        if number == self.first and self.fusions and not self.compat:
            x = self._drop_padding(x, state)
        mask = self._key_mask(state, x)
        if x is args[0] and mask is None:
            return None
        return self.spec.blocks.with_mask(x, mask, args, kwargs)  # type: ignore[attr-defined]

    def _observe(self, number: int, x: Tensor, state: TileState) -> None:
        """Let the method see block ``number - 1``; tiles that have reached their target are not scored any more."""
        assert self.observe is not None
        carry = torch.zeros(state.tokens.shape, device=x.device) if state.carry is None else state.carry.clone()
        for count, target, rows in state.groups():
            if count > target:
                view = self._view(number, x, state, count, target, rows)
                carry[rows, :count] = self.observe(view).to(carry.dtype)
        state.carry = carry

    def _view(
        self, number: int, x: Tensor, state: TileState, count: int, target: int, rows: list[int], prefix: bool = False,
        block: int | None = None,
    ) -> TowerView:  # fmt: skip
        spec = self.spec
        start = 0 if prefix else spec.prefix
        block = number - 1 if block is None else block
        q = k = v = None
        everything = len(rows) == len(state.counts)
        pick = (lambda t: t) if everything else (lambda t: t[rows])
        if block in state.taps:
            taps = [pick(tap)[:, : spec.prefix + count] for tap in state.taps[block]]
            layer = spec.layers[block]
            q, k, v = spec.blocks.split(layer, taps) if spec.blocks.taps(layer) else spec.blocks.project(layer, *taps)
        return TowerView(
            features=pick(x)[:, start : spec.prefix + count],
            tokens=pick(state.tokens)[:, :count],
            places=[0] * len(rows),
            layer=number,
            q=q,
            k=k,
            v=v,
            prefix=spec.prefix,
            has_cls=spec.has_cls,
            scale=spec.blocks.scale(spec.layers[max(block, 0)]),
            carry=None if state.carry is None else pick(state.carry)[:, :count],
            sizes=None if state.sizes is None else pick(state.sizes)[:, :count],
            target=target,
            prefix_features=None if state.prefix_features is None else pick(state.prefix_features),
        )

    def _cut(self, stage: Stage, number: int, x: Tensor, state: TileState) -> Tensor:
        assert stage.select is not None
        if number == self.first and not self.compat:
            x = self._drop_padding(x, state)
        keep = state.real()
        counts = list(state.counts)
        for count, target, rows in state.groups():
            if count <= target:
                continue
            answer = stage.select(self._view(number, x, state, count, target, rows), target)
            if isinstance(answer, Selection):
                answer = answer.indices
            if answer.dtype == torch.bool:
                left = host_sizes(answer)
            else:
                left = [answer.shape[1]] * len(rows)
                answer = kernels.keep_mask(answer, count)
            for row, size in zip(rows, left, strict=True):
                counts[row] = size
            keep[rows, :count] = answer
        x = self._narrow(x, keep, counts, state)
        state.stages.append((number, state.kept()))
        return x

    def _narrow(self, x: Tensor, keep: Tensor, counts: list[int], state: TileState) -> Tensor:
        """Real tokens first, all tiles as long as the longest."""
        if counts == state.counts:
            return x
        width, prefix = max(counts), self.spec.prefix
        index = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :width]
        patches = kernels.gather_tokens(x[:, prefix:], index)
        gone = state.kept()
        state.counts = counts
        state.tokens = state.tokens.gather(1, index)
        state.carry = None if state.carry is None else state.carry.gather(1, index)
        state.sizes = None if state.sizes is None else state.sizes.gather(1, index)
        state.dst = torch.where(gone & ~state.kept(), -1, state.dst) if not state.merged else state.dst
        for number, taps in state.taps.items():
            state.taps[number] = [torch.cat((t[:, :prefix], kernels.gather_tokens(t[:, prefix:], index)), 1) for t in taps]
        return torch.cat((x[:, :prefix], patches), dim=1) if prefix else patches

    def _drop_padding(self, x: Tensor, state: TileState) -> Tensor:
        """Patches that unpadding will remove anyway must not use up the budget."""
        if state.valid is None:
            return x
        valid = state.valid.to(x.device)
        counts = host_sizes(valid)
        state.valid = None
        return self._narrow(x, valid.gather(1, state.tokens), counts, state)

    def _key_mask(self, state: TileState, x: Tensor) -> Tensor | None:
        """(B, 1, 1, prefix + n) additive key bias: sizes of merged tokens, -inf on slots that hold nothing."""
        proportional = state.merged and any(stage.fuse and stage.fuse.proportional for stage in self.fusions)
        if not (state.ragged or proportional):
            return None
        bias = torch.zeros(state.tokens.shape, device=x.device, dtype=torch.float32)
        if proportional and state.sizes is not None:
            bias = state.sizes.float().clamp_min(1e-6).log()
        if state.ragged:
            bias = bias.masked_fill(~state.real(), float("-inf"))
        front = torch.zeros(bias.shape[0], self.spec.prefix, device=x.device)
        return torch.cat((front, bias), dim=1)[:, None, None].to(x.dtype)

    # -- merging inside a block ---------------------------------------------------------------------------------

    def _fuse(self, stage: Stage, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, number, fuse = self.state, stage.layer or 0, stage.fuse
        due = state is not None and any(c > t for c, t in zip(state.counts, state.targets, strict=True))
        if state is None or fuse is None or not (due or state.merged):
            return original(x, *args, **kwargs)
        block, blocks = self.spec.layers[number], self.spec.blocks
        if fuse.where == "middle":
            x = x + blocks.attend(block, x, self._key_mask(state, x), kwargs)
            x, _ = self._merge(stage, number, x, state, None)
            return x + blocks.feed(block, x)
        bias = self._key_mask(state, x)
        q, k, v = blocks.project(block, x)
        attention = _softmax(q, k, blocks.scale(block), bias) if fuse.reuse_attention else None
        state.taps[number] = [q, k, v] if attention is None else [q, k, v, attention]
        x, attention = self._merge(stage, number, x, state, attention)
        if attention is None:
            x = x + blocks.attend(block, x, self._key_mask(state, x), kwargs)
        else:
            values = blocks.project(block, x)[2]
            x = x + blocks.output(block, attention.to(values.dtype) @ values)
        return x + blocks.feed(block, x)

    def _merge(
        self, stage: Stage, number: int, x: Tensor, state: TileState, attention: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Merge every group of tiles by its own plan; tiles that end up shorter are padded at the end."""
        assert stage.fuse is not None
        later = [other for other in self.fusions if (other.layer or 0) >= number]
        prefix = self.spec.prefix
        if state.sizes is None:
            state.sizes = torch.ones(state.tokens.shape, device=x.device)
        parts: dict[int, tuple] = {}
        for count, target, rows in state.groups():
            r = count - merge_goal(count, target, len(later), self.compat)
            view = self._fusion_view(number, x, state, count, target, rows)
            plan = stage.fuse.match(view, max(0, r))
            if len(later) == 1 and plan.n_out - prefix > target:
                least = -(-state.total // 2 ** len(self.fusions))
                raise VtokError(
                    f"{self.session.name} merges in {len(self.fusions)} blocks, each at most halving, so it cannot leave "
                    f"{target} of {state.total} tokens of a tile; ask for at least {least}, or give it more layers="
                )
            sizes = torch.cat((torch.ones(len(rows), prefix, device=x.device), state.sizes[rows][:, :count]), 1)
            weights = sizes if stage.fuse.weights is None else stage.fuse.weights(view)
            merged = plan.merge(view.features, weights.to(view.features.dtype))
            fused = None
            if attention is not None:
                own = attention[rows][:, :, : prefix + count, : prefix + count]
                fused = kernels.merge_attention(plan, own, weights)
            parts[rows[0]] = (rows, plan, merged, plan.sum(sizes), fused)
        return self._rebuild(number, x, state, parts, attention)

    def _rebuild(
        self, number: int, x: Tensor, state: TileState, parts: dict[int, tuple], attention: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        prefix = self.spec.prefix
        width = max(plan.n_out for _, plan, *_ in parts.values())
        tiles = len(state.counts)
        out = x.new_zeros(tiles, width, x.shape[2])
        sizes = torch.ones(tiles, width, device=x.device)
        tokens = torch.zeros(tiles, width - prefix, dtype=torch.long, device=x.device)
        dst, counts = state.dst.clone(), list(state.counts)
        maps = None if attention is None else attention.new_zeros(*attention.shape[:2], width, width)
        for rows, plan, merged, size, fused in parts.values():
            out[rows, : plan.n_out], sizes[rows, : plan.n_out] = merged, size.to(sizes.dtype)
            if maps is not None:
                maps[rows, :, : plan.n_out, : plan.n_out] = fused
            keeper = plan.representative[:, prefix:] - prefix
            own = state.tokens[rows]
            tokens[rows, : plan.n_out - prefix] = own.gather(1, keeper)
            # where each patch of the start lies now: through its current representative's slot
            slot = torch.zeros(len(rows), state.total, dtype=torch.long, device=x.device)
            count = counts[rows[0]]
            slot = slot.scatter(1, own[:, :count], plan.dst[:, prefix : prefix + count] - prefix)
            before = dst[rows]
            after = tokens[rows].gather(1, slot.gather(1, before.clamp_min(0)))
            dst[rows] = torch.where(before >= 0, after, -1)
            for row in rows:
                counts[row] = plan.n_out - prefix
        state.counts, state.tokens, state.sizes, state.dst = counts, tokens, sizes[:, prefix:], dst
        state.merged, state.carry = True, None
        state.stages.append((number, state.kept()))
        return out, maps

    def _fusion_view(
        self, number: int, x: Tensor, state: TileState, count: int, target: int, rows: list[int]
    ) -> TowerView:
        """A view that includes the prefix tokens: matching alternates over the whole sequence, as published."""
        taps = state.taps.get(number, [])
        received = None
        if len(taps) >= 3 and taps[0].ndim == 4:
            q, k, v = (tap[rows][:, :, : self.spec.prefix + count] for tap in taps[:3])
            bias = self._key_mask(state, x)
            if len(taps) == 4:
                own = taps[3][rows][:, :, : self.spec.prefix + count, : self.spec.prefix + count]
                received = own.mean((1, 2))
            else:
                own_bias = None if bias is None else bias[rows][:, 0, 0, : self.spec.prefix + count]
                received = _received(q, k, self.spec.blocks.scale(self.spec.layers[number]), own_bias)
            view = self._view(number, x, state, count, target, rows, prefix=True, block=-1)
            view.q, view.k, view.v = q, k, v
        else:
            view = self._view(number, x, state, count, target, rows, prefix=True, block=number)
        view.received = received
        return view

    # -- the tower's end ----------------------------------------------------------------------------------------

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
            out[rows, :size] = answer.features.to(x.dtype)  # type: ignore[union-attr]
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
            for row in rows:
                counts[row] = size
        state.counts, state.tokens, state.dst = counts, tokens, dst
        state.stages.append((None, state.kept()))
        return out

    def _after_projector(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Back to one row per patch: survivors at their own places, zeros elsewhere."""
        state = self.state
        if state is None or (max(state.counts) == state.total and not state.front and not self.final):
            return None
        slots = torch.arange(output.shape[1], device=output.device).expand(output.shape[:2]) if state.front else state.tokens
        return kernels.scatter_tokens(output, slots.to(output.device), state.total, state.real().to(output.device))

    # -- encode -------------------------------------------------------------------------------------------------

    def encode(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], original: Any, args: Any, kwargs: Any
    ) -> tuple[Any, list[Encoded]]:
        tiles = max(medium.tiles.stop for medium in media)
        per_tile = self.session.adapter.tile_length(modality)
        valid = self._valid(modality, call, media, tiles, per_tile)
        self.pending = (self._targets(media, valid, tiles, per_tile), valid)
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

    def _valid(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], tiles: int, per_tile: int
    ) -> Tensor | None:
        """(tiles, N) bool: patches that the family's packing keeps, or ``None`` when it keeps all."""
        if not self.session.shape.tiled or modality != "image":
            return None
        valid = torch.ones(tiles, per_tile, dtype=torch.bool)
        for medium, packed in zip(media, self._index(modality, call, media, tiles, per_tile), strict=True):
            if medium.interpolated or self.session.tower_count(medium.length) >= medium.length:
                continue  # every patch counts
            valid[medium.tiles] = False
            valid.view(-1)[packed[packed >= 0]] = True
        return None if bool(valid.all()) else valid

    def _index(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], tiles: int, per_tile: int
    ) -> list[Tensor]:
        """Flat (tile, patch) number at each placeholder, -1 at newlines; on the host."""
        flat = torch.arange(tiles * per_tile, dtype=torch.float64).view(tiles, per_tile, 1)
        return [packed[:, 0].round().long() for packed in self.pack(modality, call, media, flat, -1.0)]

    def _targets(self, media: Sequence[Medium], valid: Tensor | None, tiles: int, per_tile: int) -> list[int]:
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
            index = self._index(modality, call, media, len(state.counts), state.total)
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
            item.stages = [(layer, packed[number][:, 0] > 0.5) for layer, packed in stages]
            if item.stages:
                standing = torch.zeros(medium.length, dtype=torch.bool, device=weight.device)
                standing[item.tokens] = True
                item.stages[-1] = (item.stages[-1][0], standing)
            if index is not None and not medium.interpolated:
                item.groups = _packed_groups(index[number].to(state.dst.device), state.dst)
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
        scaled = features / weight.clamp_min(1e-3).to(features.dtype)[:, None]
        newlines = _newline_mask(medium).to(features.device)
        scaled = torch.where(newlines[:, None], features, scaled)
        if isinstance(output.pooler_output, Tensor):
            output.pooler_output = output.pooler_output.index_put((torch.tensor(number, device=features.device),), scaled)
        else:
            output.pooler_output = [scaled if i == number else own for i, own in enumerate(output.pooler_output)]
        return Encoded(medium, count, tokens)


def _newline_mask(medium: Medium) -> Tensor:
    """(length,) bool: newline tokens of a run."""
    marks: list[bool] = []
    for part in medium.parts:
        if part.per_row:
            marks += ([False] * part.width + [True] * part.newlines) * part.height
        else:
            marks += [False] * (part.height * part.width) + [True] * part.newlines
    return torch.tensor(marks)


def _packed_groups(index: Tensor, dst: Tensor) -> Tensor:
    """Merge targets per tile patch to merge targets per placeholder."""
    tiles, total = dst.shape
    offset = torch.arange(tiles, device=dst.device)[:, None] * total
    flat = torch.where(dst >= 0, dst + offset, -1).flatten()
    where = torch.full((tiles * total + 1,), -1, device=dst.device)
    real = index >= 0
    where[index[real]] = torch.arange(len(index), device=dst.device)[real]
    target = torch.where(real, flat[index.clamp_min(0)], -1)
    return torch.where(target >= 0, where[target.clamp_min(0)], -1)


def _softmax(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """The attention map that MCTF fuses: (B, H, N, N), fp32."""
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    return (logits if bias is None else logits + bias.float()).softmax(-1)


def _received(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention that each token receives, blocked; a key bias travels in one more channel of q and k."""
    if bias is not None:
        ones = torch.full_like(q[..., :1], 1.0 / scale)
        q = torch.cat((q, ones), -1)
        k = torch.cat((k, bias[:, None, :, None].to(k.dtype).expand(-1, k.shape[1], -1, -1)), -1)
    return kernels.received_attention(q, k, scale=scale)
