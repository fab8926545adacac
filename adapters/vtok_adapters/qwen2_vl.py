"""Qwen2-VL: native resolution, packed tower, 2x2 merger, multimodal rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtok.protocol import Adapter, Medium, Part, Tower, find_blocks
from vtok_adapters.blocks import QwenBlocks


class Qwen2VL(Adapter):
    """Qwen2-VL; the later Qwen-VL families differ in names, windows and extra mergers."""

    family = "qwen2_vl"
    classes = ("Qwen2VLForConditionalGeneration", "Qwen2VLModel")
    block_class = "Qwen2VLVisionBlock"
    positions = frozenset({"keep"})
    modalities = ("image", "video")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(base.__name__ in cls.classes for base in type(model).__mro__)

    def __init__(self, model: Any) -> None:
        base = model.model if hasattr(model, "lm_head") else model
        self.base, self.text = base, base.language_model
        layers = find_blocks(base.visual, (self.block_class,))
        self.tower = Tower(
            root=base.visual,
            layers=layers,
            blocks=QwenBlocks(),
            feature_layer=len(layers) - 1,
            packed=True,
            unit=base.visual.spatial_merge_size**2,
            mergers=self.mergers(base.visual),
        )

    def mergers(self, visual: Any) -> tuple[nn.Module, ...]:
        """Modules that turn the packed sequence into one row per cell."""
        return (visual.merger,)

    def media(self, modality: Any, call: Mapping[str, Any]) -> Sequence[Medium]:
        side = self.base.visual.spatial_merge_size
        media, start = [], 0
        for frames, height, width in torch.as_tensor(call[f"{modality}_grid_thw"]).tolist():
            part = Part(height // side, width // side)
            cells = frames * part.length
            media.append(Medium(modality, (part,) * frames, slice(start, start + cells)))
            start += cells
        return media

    def windows(self, grid: Tensor) -> tuple[Tensor, list[int]] | None:
        """Processing order of the cells and window lengths in cells, where the tower permutes into windows."""
        return None

    def decode_positions(self, start: int, batch: int, length: int, device: Any) -> Tensor | None:
        positions = torch.arange(start, start + length, device=device).expand(batch, length)
        delta = self.base.rope_deltas
        if delta is not None:
            positions = positions + delta.to(device).repeat_interleave(batch // delta.shape[0], 0)
        return positions.expand(3, batch, length)
