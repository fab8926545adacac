"""Dense towers (CLIP, SigLIP, timm, open_clip): shorten (B, prefix + N, D) between or inside the blocks.

Tiles of one call may end up with different lengths (budgets per image, schedules that follow the data). The batch is
then as long as its longest tile: real tokens first, the rest masked as keys, so that every tile gets what it would
get alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.engine.dense_fusing import DenseFusing
from vtok.engine.dense_output import DenseOutput
from vtok.engine.host import host_sizes
from vtok.engine.tiles import TileState
from vtok.engine.towers import Tower, Wrapped
from vtok.errors import VtokError
from vtok.view import Selection, Stage, TowerView


class DenseTower(DenseFusing, DenseOutput, Tower):
    """Runs the encoder stages of a session on a dense tower."""

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        if self.spec.keeps_prefix:
            raise VtokError(
                f"this model hands the class token of its tower on to the language model, which {session.name} cannot "
                "serve; use a method that acts behind the tower, such as divprune"
            )
        stages = [stage for stage in session.stages if stage.site == "encoder"]
        self.cuts = [stage for stage in stages if stage.select is not None and stage.layer is not None]
        self.final = [stage for stage in stages if stage.select is not None and stage.layer is None]
        self.fusions = [stage for stage in stages if stage.fuse is not None]
        self.observe = next((stage.observe for stage in stages if stage.observe is not None), None)
        self.last_cut = max((stage.layer or 0 for stage in self.cuts), default=-1)
        self.first = min((stage.layer for stage in stages if stage.layer is not None), default=None)
        self.state: TileState | None = None
        self.pending: tuple[list[int], Tensor | None] | None = None
        self.newline = 0.0 if session.methods[0].newlines == "drop" else 1.0
        self.compat = bool(getattr(session.methods[0], "compat", False))

    # -- hooks --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        super().install()
        spec, hook = self.spec, self.session.hook
        # a run begins at the first block: timm's forward_features passes by the root's own forward
        hook(spec.layers[0].register_forward_pre_hook(self._begin, with_kwargs=True))
        if spec.projector is None:
            hook(spec.layers[-1].register_forward_hook(self._end))
        watched = set(self.observed(self.last_cut)) if self.observe is not None else set()
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
        root = self.spec.root
        if torch.is_grad_enabled() and any(getattr(part, "grad_checkpointing", False) for part in root.modules()):
            raise VtokError(
                f"{type(root).__name__} recomputes its blocks in the backward pass, where {self.session.name} cannot "
                "repeat what it did; call set_grad_checkpointing(False)"
            )
        self.state = None
        self.waiting = True

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
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
        if state is None or (number > self.spec.feature_layer + 1 and not (state.ragged or state.merged)):
            return None
        if self.observe is not None and number - 1 in state.taps and number <= self.last_cut:
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
        return self.spec.blocks.with_mask(x, mask, args, kwargs)

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
        gone = state.kept()
        optional = [name for name in ("carry", "sizes") if getattr(state, name) is not None]
        taps = [tap for taps in state.taps.values() for tap in taps]
        patches, state.tokens, *moved = kernels.compact(
            [x[:, prefix:], state.tokens, *(getattr(state, name) for name in optional), *(t[:, prefix:] for t in taps)],
            index,
        )
        state.counts = counts
        for name in optional:
            setattr(state, name, moved.pop(0))
        state.dst = torch.where(gone & ~state.kept(), -1, state.dst) if not state.merged else state.dst
        for number, taps in state.taps.items():
            state.taps[number] = [torch.cat((tap[:, :prefix], moved.pop(0)), 1) for tap in taps]
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
