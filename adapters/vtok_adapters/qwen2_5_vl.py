"""Qwen2.5-VL: Qwen2-VL with windowed attention; cells are in window order until after the merger."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library

from vtok_adapters.qwen2_vl import Qwen2VL


class Qwen2_5VL(Qwen2VL):
    """Qwen2.5-VL."""

    family = "qwen2_5_vl"
    classes = ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLModel")
    block_class = "Qwen2_5_VLVisionBlock"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.tower.full_layers = frozenset(self.base.visual.fullatt_block_indexes)

    def windows(self, grid: Tensor) -> tuple[Tensor, list[int]]:
        visual: Any = self.base.visual
        if hasattr(library, "get_vision_window_index"):
            order, ends = library.get_vision_window_index(
                grid,
                spatial_merge_size=visual.spatial_merge_size,
                window_size=visual.window_size,
                patch_size=visual.patch_size,
            )
        else:  # transformers 5.17 has it as a method of the tower
            order, ends = visual.get_window_index(grid)
            ends = torch.unique_consecutive(torch.as_tensor(ends))
        return order, (ends.diff() // self.tower.unit).tolist()
