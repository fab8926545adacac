"""Packed towers (Qwen2-VL, Qwen2.5-VL): one picture of a fixed grid, cells of 2 x 2 patches, windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.vision_utils import get_vision_position_ids

import vtok_kernels as kernels
from vtok.engine.rows import rotate
from vtok.engine.session import make_tower
from vtok.export.fixed import Budget, data_dependent
from vtok.export.vision import windows
from vtok.export.vision.cells import Cells
from vtok.export.vision.graph import FixedTowerView, Tokens, VisionGraph
from vtok.export.vision.packed_fusing import PackedFusing
from vtok.protocol import Medium
from vtok.view import Selection, Stage


class PackedGraph(PackedFusing, VisionGraph):
    """(B, N, patch_dim) pixels of pictures of one grid through a tower in window order."""

    order: Tensor
    window: Tensor
    places: Tensor
    raster: Tensor

    def __init__(self, budget: Budget, medium: Medium, example: Mapping[str, Any]) -> None:
        super().__init__(budget, medium, example)
        self.tower, self.unit = self.spec.root, self.spec.unit
        self.target = budget.tower_count(medium.length)
        # the engine's own, without hooks: it tells cuts and merges apart
        self.inside: Any = make_tower(budget) if budget.tower_stages and self.target < medium.length else None
        grid = torch.as_tensor(example["image_grid_thw"])
        device = next(self.tower.parameters()).device
        found = self.adapter.windows(grid.cpu())
        order, lengths = (torch.arange(medium.length), [medium.length]) if found is None else found
        self.window_lengths = tuple(lengths)
        window = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        places = get_vision_position_ids(grid.cpu(), int(self.unit**0.5)).unflatten(0, (-1, self.unit))[order]
        for name, constant in (("order", order), ("window", window), ("places", places.float())):
            self.register_buffer(name, constant.to(device), False)
        self.register_buffer("raster", order.argsort().to(device), False)
        pixels = example["pixel_values"][None]
        size = tuple(int(side) for side in grid.flatten().tolist())
        self.fix(pixels, {"grid_thw": size})

    def encode(self, pixel_values: Tensor) -> Tokens:
        spec = self.spec
        # a convolution whose stride is its kernel is a product of matrices; as Conv, torch 2.15 gives it a bias of the
        # wrong shape in ONNX, which ONNX Runtime refuses
        embed = self.tower.patch_embed.proj
        x = F.linear(pixel_values.to(embed.weight.dtype), embed.weight.flatten(1), embed.bias)
        x = x.unflatten(1, (-1, self.unit))[:, self.order].flatten(1, 2)
        everything = torch.arange(self.medium.length, device=x.device).expand(x.shape[0], -1)
        cells = Cells(x, everything, self.unit, self.target, self.window_lengths)
        cells.rotary = self._tables(x, self.places.flatten(0, 1))
        for number in range(len(spec.layers)):
            if self.inside is not None:
                cells = self._before(number, cells)
            cells = self._block(number, cells)
        if cells.standing is not None:
            raise data_dependent(self.budget.name)
        if self.inside is not None:
            cells = self._end(cells)
        features = spec.mergers[0](cells.x.flatten(0, 1)).unflatten(0, (-1, cells.count))
        if cells.alike:
            return Tokens(features[:, self.raster], everything)
        index = self.order[cells.cells]
        order = index.argsort(1)
        return Tokens(kernels.gather_tokens(features, order), index.gather(1, order), None, False)

    def _tables(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (1 or B, patches, d) of patches at rows and columns (patches, 2) or (B, patches, 2)."""
        cos, sin = self.tower.rotary_pos_emb(x, places.flatten(0, -2))
        return cos.unflatten(0, (-1, places.shape[-2])), sin.unflatten(0, (-1, places.shape[-2]))

    # -- blocks --------------------------------------------------------------------------------------------------

    def _block(self, number: int, cells: Cells) -> Cells:
        block, blocks = self.spec.layers[number], self.spec.blocks
        for stage in self.inside.fusions if self.inside is not None else ():
            if stage.layer == number:
                return self.fuse(stage, number, cells)
        cells.x = cells.x + self.attend(number, cells)
        cells.x = cells.x + blocks.feed(block, cells.x)
        return cells

    def project(self, number: int, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, patches, d) of block ``number`` before the rotary embedding."""
        q, k, v = self.spec.blocks.project(self.spec.layers[number], cells.x.flatten(0, 1))
        length = cells.x.shape[1]
        q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (q, k, v))
        return q, k, v

    def turn(self, x: Tensor, cells: Cells) -> Tensor:
        """The rotary embedding of (B, H, patches, d), in fp32."""
        assert cells.rotary is not None
        cos, sin = cells.rotary
        return rotate(x.float(), cos.float(), sin.float()).to(x.dtype)

    def attend(self, number: int, cells: Cells) -> Tensor:
        """The attention branch of block ``number``; leaves projections, before and after turning, with the cells."""
        block, blocks, full = self.spec.layers[number], self.spec.blocks, self.spec.full_layers
        q, k, v = cells.projections = self.project(number, cells)
        cells.turned = q, k, v = self.turn(q, cells), self.turn(k, cells), v
        sized = self.inside is not None and any(stage.fuse.proportional for stage in self.inside.fusions)
        bias, scale = cells.key_bias(sized), blocks.scale(block)
        if full is None or number in full:
            heads = windows.whole(q, k, v, bias, scale)
        elif cells.lengths is not None:
            heads = windows.inside(q, k, v, [length * self.unit for length in cells.lengths], bias, scale)
        else:
            window = self.window[cells.cells].repeat_interleave(self.unit, 1)
            heads = windows.masked(q, k, v, window, bias, scale)
        x = heads.transpose(1, 2).flatten(0, 1)
        return blocks.output(block, x).unflatten(0, (-1, cells.x.shape[1]))

    # -- stages --------------------------------------------------------------------------------------------------

    def _before(self, number: int, cells: Cells) -> Cells:
        inside = self.inside
        last = max((stage.layer or 0 for stage in inside.cuts), default=0)
        if inside.observe is not None and 0 < number <= last and number - 1 in inside.observed(last):
            score = inside.observe(self.view(number, cells))
            cells.carry = score if cells.standing is None else torch.where(cells.standing, score, 0.0)
        for stage in inside.cuts:
            if stage.layer == number and cells.count > cells.target:
                cells = self._cut(stage, number, cells)
        return cells

    def _cut(self, stage: Stage, number: int, cells: Cells) -> Cells:
        assert stage.select is not None
        view = self.view(number, cells)
        if cells.standing is not None and cells.carry is not None:
            view.carry = torch.where(cells.standing, cells.carry, -torch.inf)
        answer = stage.select(view, cells.target)
        answer = answer.indices if isinstance(answer, Selection) else answer
        if answer.dtype == torch.bool:
            cells.standing = answer if cells.standing is None else answer & cells.standing
            return cells
        return cells.take(answer)

    def _end(self, cells: Cells) -> Cells:
        """What merging left above the budget, and stages on the tower's last features."""
        if self.inside.fusions and cells.count > cells.target:
            assert cells.sizes is not None
            cells = cells.take(kernels.topk(cells.sizes, cells.target))
        for stage in self.inside.final:
            if cells.count > cells.target:
                view = self.view(len(self.spec.layers), cells)
                indices, features, _ = self.ask(stage, view, cells.target, False, "end")
                cells = cells.take(indices)
                cells.x = features
        return cells

    def view(self, number: int, cells: Cells) -> FixedTowerView:
        """What methods see before block ``number``: projections of the block before, after their rotary embedding."""
        q, k, v = cells.turned or (None, None, None)
        return FixedTowerView(
            features=cells.x,
            tokens=cells.cells,
            layer=number,
            q=q,
            k=k,
            v=v,
            scale=self.spec.blocks.scale(self.spec.layers[max(number - 1, 0)]),
            carry=cells.carry,
            sizes=cells.sizes,
            target=cells.target,
            unit=self.unit,
            standing=cells.standing,
            draws=self.draws,
        )
