"""Qwen3-VL: full attention, DeepStack taps after three blocks, a video is one run of placeholders per frame."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok_adapters.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """Qwen3-VL (dense decoders)."""

    family = "qwen3_vl"
    classes = ("Qwen3VLForConditionalGeneration", "Qwen3VLModel")
    block_class = "Qwen3VLVisionBlock"

    def mergers(self, visual: Any) -> tuple[nn.Module, ...]:
        return (visual.merger, *visual.deepstack_merger_list)
