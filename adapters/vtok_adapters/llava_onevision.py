"""LLaVA-OneVision: LLaVA-NeXT's tiles from a tower without class token, shrunk when there are many; pooled video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.protocol import Medium, Part
from vtok_adapters.llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision, pictures and video."""

    family = "llava_onevision"
    classes = ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionModel")
    modalities = ("image", "video")

    def media(self, modality: str, call: Mapping[str, Any]) -> Sequence[Medium]:
        if modality == "video":
            return self._videos(call)
        media = []
        for medium, size in zip(super().media(modality, call), call["image_sizes"], strict=True):
            if medium.base:
                height, width = self._canvas(size)
                ratio = math.sqrt(height * width / (self._most_tiles(call) * self.side**2))
                if ratio > 1.1:
                    grid = Part(int(height // ratio), int(width // ratio), newlines=1, per_row=True)
                    medium = Medium("image", (medium.parts[0], grid), medium.tiles, medium.base, interpolated=True)
            media.append(medium)
        return media

    def _videos(self, call: Mapping[str, Any]) -> list[Medium]:
        pixels = call["pixel_values_videos"] if "pixel_values_videos" in call else call["pixel_values"]  # 5.17
        videos, frames = pixels.shape[:2]
        pooled = math.ceil(self.side / 2)
        parts = (Part(pooled, pooled),) * (frames - 1) + (Part(pooled, pooled, newlines=1),)
        return [Medium("video", parts, slice(i * frames, (i + 1) * frames), interpolated=True) for i in range(videos)]

    def _aspect(self, call: Mapping[str, Any]) -> str:
        return call.get("vision_aspect_ratio") or self.base.config.vision_aspect_ratio

    def _most_tiles(self, call: Mapping[str, Any]) -> int:
        return int(self._aspect(call).removeprefix("anyres_max_"))

    def _tiles(self, call: Mapping[str, Any]) -> list[int]:
        counts = call.get("batch_num_images")
        tiles = super()._tiles(call)
        if counts is None:
            return tiles
        split = [int(count) == 1 for count in counts for _ in range(int(count))]
        return [tile if own else 1 for tile, own in zip(tiles, split, strict=False)]

    def pack(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], values: Tensor, newline: float
    ) -> list[Tensor]:
        base: Any = self.base
        line = values.new_full((values.shape[-1],), newline)
        if modality == "video":
            pooled = [base.apply_pooling(values[medium.tiles]).flatten(0, 1) for medium in media]
            return [torch.cat((frames, line[None])) for frames in pooled]
        packed, _ = base.pack_image_features(
            [values[medium.tiles] for medium in media],
            call["image_sizes"],
            image_newline=line,
            vision_aspect_ratio=self._aspect(call),
        )
        return list(packed)
