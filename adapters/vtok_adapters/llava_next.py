"""LLaVA-NeXT: a thumbnail and a grid of tiles, unpadded to the picture's aspect, a newline after every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
    unpad_image,
)

from vtok.protocol import Medium, Part
from vtok_adapters.llava import LlavaLike


class LlavaNext(LlavaLike):
    """LLaVA-NeXT (1.6)."""

    family = "llava_next"
    classes = ("LlavaNextForConditionalGeneration", "LlavaNextModel")
    tiled = True

    def media(self, modality: str, call: Mapping[str, Any]) -> Sequence[Medium]:
        media, start = [], 0
        for size, tiles in zip(call["image_sizes"], self._tiles(call), strict=True):
            end = start + tiles
            if tiles == 1:
                media.append(Medium("image", (Part(self.side, self.side, newlines=1),), slice(start, end)))
            else:
                height, width = self._canvas(size)
                grid = Part(height, width, newlines=1, per_row=True)
                media.append(Medium("image", (Part(self.side, self.side), grid), slice(start, end), base=self.side**2))
            start = end
        return media

    def _tiles(self, call: Mapping[str, Any]) -> list[int]:
        config: Any = self.base.config
        return [
            image_size_to_num_patches(
                image_size=size, grid_pinpoints=config.image_grid_pinpoints, patch_size=config.vision_config.image_size
            )
            for size in call["image_sizes"]
        ]

    def _canvas(self, size: Any) -> tuple[int, int]:
        """Height and width of the unpadded grid, in patches: by the model's own unpadding of a blank canvas."""
        config: Any = self.base.config
        rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        blank = unpad_image(torch.empty(1, rows * self.side, columns * self.side), size)
        return blank.shape[1], blank.shape[2]

    def pack(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], values: Tensor, newline: float
    ) -> list[Tensor]:
        base: Any = self.base
        packed, _ = base.pack_image_features(
            [values[medium.tiles] for medium in media],
            call["image_sizes"],
            vision_feature_select_strategy=base.config.vision_feature_select_strategy,
            image_newline=values.new_full((values.shape[-1],), newline),
        )
        return list(packed)
