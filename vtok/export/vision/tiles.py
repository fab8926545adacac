"""LLaVA-NeXT: several tiles a picture, each with its own budget, packed as the family packs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.engine.dense_output import newline_mask
from vtok.errors import VtokError
from vtok.export.vision.dense import DenseGraph
from vtok.export.vision.graph import Tokens
from vtok.export.vision.run import Run


class TiledGraph(DenseGraph):
    """(B, tiles, 3, H, W) pixels, all pictures of one size in pixels.

    Tiles whose counts and budgets agree go through the tower together, so no tile is padded or masked.
    """

    packed: Tensor
    place: Tensor

    def layout(self, pixels: Tensor, example: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        size = torch.as_tensor(example["image_sizes"]).flatten().tolist()
        return {"image_size": tuple(pixels.shape[-2:]), "image_sizes": tuple(int(side) for side in size)}

    def lay_out(self, example: Mapping[str, Any]) -> None:
        per_tile = self.adapter.tile_length("image")
        self.tile_count = self.medium.tiles.stop
        media = [self.medium]
        flat = torch.arange(self.tile_count * per_tile, dtype=torch.float64).view(self.tile_count, per_tile, 1)
        index = self.adapter.pack("image", example, media, flat, -1.0)[0][:, 0].round().long()
        device = next(self.tower.parameters()).device
        # newline tokens read one row behind all patches
        self.register_buffer("packed", torch.where(index < 0, flat.shape[0] * per_tile, index).to(device), False)
        place = torch.full((flat.shape[0] * per_tile,), -1)
        place[index[index >= 0]] = torch.arange(len(index))[index >= 0]
        self.register_buffer("place", place.to(device), False)
        self.image_newline = self.adapter.base.image_newline
        self.groups: list[tuple[list[int], int]] = []
        if self.inside is None:
            return
        valid = self.inside.valid_patches("image", example, media, self.tile_count, per_tile)
        if valid is not None and self.inside.compat:
            raise VtokError(
                f"{self.budget.name} with compat=True spends budget on patches that unpadding drops, so the number of "
                "tokens follows the picture; leave compat out, or export to hf"
            )
        targets = self.inside.tile_targets(media, valid, self.tile_count, per_tile)
        valid = torch.ones(self.tile_count, per_tile, dtype=torch.bool) if valid is None else valid
        together: dict[tuple[int, int], list[int]] = {}
        for tile, key in enumerate(zip(valid.sum(1).tolist(), targets, strict=True)):
            together.setdefault(key, []).append(tile)
        for (count, target), tiles in together.items():
            if count:
                self.groups.append((tiles, min(count, target)))
                own = kernels.topk(valid[tiles].float(), count)
                self.register_buffer(f"valid_{len(self.groups) - 1}", own.to(device), False)

    def tiles(self, pixel_values: Tensor) -> Tensor:
        return pixel_values.flatten(0, 1)

    def split(self, run: Run) -> list[Run]:
        runs = []
        for number, (tiles, target) in enumerate(self.groups):
            own = run.rows(tiles, self.tile_count, target)
            index = self.get_buffer(f"valid_{number}")
            if index.shape[1] < own.count:
                pictures = own.x.shape[0] // len(tiles)
                own = own.take(index[None].expand(pictures, -1, -1).flatten(0, 1), alike=True)
            runs.append(own)
        return runs

    def gather(self, runs: Sequence[Run], features: Sequence[Tensor], saliency: Tensor | None) -> Tokens:
        if self.inside is None:
            return self._packed(features[0], saliency)
        per_tile, flat, rows = self.place.shape[0] // self.tile_count, [], []
        for (tiles, _), run, own in zip(self.groups, runs, features, strict=True):
            starts = torch.tensor(tiles, device=own.device)[:, None] * per_tile
            flat.append((run.tokens.unflatten(0, (-1, len(tiles))) + starts).flatten(1))
            rows.append(own.unflatten(0, (-1, len(tiles))).flatten(1, 2))
        index = self.place[torch.cat(flat, 1)]
        found = torch.cat(rows, 1)
        if self.inside.newline:
            marks = newline_mask(self.medium).nonzero().flatten().to(found.device)
            index = torch.cat((index, marks.expand(index.shape[0], -1)), 1)
            lines = self.image_newline.to(found.dtype).expand(found.shape[0], len(marks), -1)
            found = torch.cat((found, lines), 1)
        order = index.argsort(1)
        alike = all(run.alike for run in runs)
        return Tokens(kernels.gather_tokens(found, order), index.gather(1, order), None, alike)

    def _packed(self, features: Tensor, saliency: Tensor | None) -> Tokens:
        """All tokens, newlines between them."""
        own = features.unflatten(0, (-1, self.tile_count)).flatten(1, 2)
        line = self.image_newline.to(own.dtype).expand(own.shape[0], 1, -1)
        found = torch.cat((own, line), 1)[:, self.packed]
        index = torch.arange(found.shape[1], device=found.device).expand(found.shape[0], -1)
        if saliency is not None:
            whole = saliency.unflatten(0, (-1, self.tile_count)).flatten(1)
            saliency = torch.cat((whole, torch.zeros_like(whole[:, :1])), 1)[:, self.packed]
        return Tokens(found, index, saliency)
