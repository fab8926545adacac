"""Merging inside the blocks of a dense tower (ToMe, MCTF)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.engine.tiles import TileState
from vtok.engine.towers import merge_goal, received
from vtok.errors import VtokError
from vtok.view import Stage, TowerView


class DenseFusing:
    """The merging half of ``DenseTower``; everything it calls on ``self`` besides is there."""

    session: Any
    spec: Any
    state: TileState | None
    fusions: list[Stage]
    compat: bool
    _key_mask: Any
    _view: Any

    def _fuse(self, stage: Stage, original: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state, number, fuse = self.state, stage.layer or 0, stage.fuse
        due = state is not None and any(c > t for c, t in zip(state.counts, state.targets, strict=True))
        if state is None or fuse is None or not (due or state.merged):
            return original(x, *args, **kwargs)
        block, blocks = self.spec.layers[number], self.spec.blocks
        if fuse.where == "middle":
            x = x + blocks.attend(block, x, self._key_mask(state, x), kwargs)
            x, _ = self._merge(stage, number, x, state)
            return x + blocks.feed(block, x)
        bias = self._key_mask(state, x)
        q, k, v = blocks.project(block, x)
        state.taps[number] = [q, k, v]
        x, plans = self._merge(stage, number, x, state)
        if fuse.reuse_attention:
            values = blocks.values(block, x)
            heads = values.new_zeros(values.shape)
            for rows, plan, weights in plans:
                own_q, own_k = (part[rows][:, :, : plan.dst.shape[1]] for part in (q, k))
                own_bias = None if bias is None else bias[rows][..., : plan.dst.shape[1]]
                heads[rows, :, : plan.n_out] = kernels.reuse_attention(
                    plan, own_q, own_k, values[rows][:, :, : plan.n_out], scale=blocks.scale(block),
                    weights=weights, bias=own_bias,
                )  # fmt: skip
            x = x + blocks.output(block, heads)
        else:
            x = x + blocks.attend(block, x, self._key_mask(state, x), kwargs)
        return x + blocks.feed(block, x)

    def _merge(self, stage: Stage, number: int, x: Tensor, state: TileState) -> tuple[Tensor, list[tuple]]:
        """Merge every group of tiles by its own plan; tiles that end up shorter are padded at the end. Beside the
        tokens: rows, plan and weights of each group."""
        assert stage.fuse is not None
        later = [other for other in self.fusions if (other.layer or 0) >= number]
        prefix = self.spec.prefix
        if state.sizes is None:
            state.sizes = torch.ones(state.tokens.shape, device=x.device)
        parts: list[tuple] = []
        for count, target, rows in state.groups():
            r = count - merge_goal(count, target, len(later), self.compat)
            view = self._fusion_view(number, x, state, count, target, rows)
            plan = stage.fuse.match(view, max(0, r))
            if len(later) == 1 and plan.n_out - prefix > target:
                raise self.unreachable(target, state.total)
            sizes = torch.cat((torch.ones(len(rows), prefix, device=x.device), state.sizes[rows][:, :count]), 1)
            weights = sizes if stage.fuse.weights is None else stage.fuse.weights(view)
            (merged,), (summed,) = plan.pour([view.features], [sizes], weights.to(view.features.dtype))
            parts.append((rows, plan, merged, summed, weights))
        return self._rebuild(number, x, state, parts), [(rows, plan, weights) for rows, plan, *_, weights in parts]

    def unreachable(self, target: int, total: int) -> VtokError:
        """The refusal of a budget that so few merges do not reach."""
        least = -(-total // 2 ** len(self.fusions))
        return VtokError(
            f"{self.session.name} merges in {len(self.fusions)} blocks, each at most halving, so it cannot leave "
            f"{target} of {total} tokens of a tile; ask for at least {least}, or give it more layers="
        )

    def _rebuild(self, number: int, x: Tensor, state: TileState, parts: list[tuple]) -> Tensor:
        prefix = self.spec.prefix
        width = max(plan.n_out for _, plan, *_ in parts)
        tiles = len(state.counts)
        out = x.new_zeros(tiles, width, x.shape[2])
        sizes = torch.ones(tiles, width, device=x.device)
        tokens = torch.zeros(tiles, width - prefix, dtype=torch.long, device=x.device)
        dst, counts = state.dst.clone(), list(state.counts)
        for rows, plan, merged, size, _ in parts:
            out[rows, : plan.n_out], sizes[rows, : plan.n_out] = merged, size.to(sizes.dtype)
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
        return out

    def _fusion_view(
        self, number: int, x: Tensor, state: TileState, count: int, target: int, rows: list[int]
    ) -> TowerView:
        """A view that includes the prefix tokens: matching alternates over the whole sequence, as published."""
        taps = state.taps.get(number, [])
        mass = None
        if len(taps) >= 3 and taps[0].ndim == 4:
            q, k, v = (tap[rows][:, :, : self.spec.prefix + count] for tap in taps[:3])
            bias = self._key_mask(state, x)
            own_bias = None if bias is None else bias[rows][:, 0, 0, : self.spec.prefix + count]
            mass = received(q, k, self.spec.blocks.scale(self.spec.layers[number]), own_bias)
            view = self._view(number, x, state, count, target, rows, prefix=True, block=-1)
            view.q, view.k, view.v = q, k, v
        else:
            view = self._view(number, x, state, count, target, rows, prefix=True, block=number)
        view.received = mass
        return view
