"""Qwen3-VL in vLLM with a budget of visual tokens for pictures; videos stay whole.

The tower's output holds the DeepStack planes behind the embeddings; survivors keep their rows of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen3_vl as library
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.vllm import positions, qwen


class CompressedInfo(qwen.Info, library.Qwen3VLProcessingInfo):
    """Token counts of pictures: the budget's."""


class CompressedProcessor(qwen.Processor, library.Qwen3VLMultiModalProcessor):
    """Puts as many placeholders into a prompt as a picture will have tokens."""

    def whole(self, update: Any) -> Any:
        """A video's frames each with their own placeholders, and not all in the first as where frames are pruned."""
        replace, config = update.replacement, self.info.ctx.get_mm_config()

        def replacement(number: int) -> Any:
            with _nothing_pruned(config):
                return replace(number)

        return dataclasses.replace(update, replacement=replacement)


@contextmanager
def _nothing_pruned(config: Any) -> Iterator[None]:
    rate, config.video_pruning_rate = config.video_pruning_rate, None
    try:
        yield
    finally:
        config.video_pruning_rate = rate


@MULTIMODAL_REGISTRY.register_processor(
    CompressedProcessor,
    info=CompressedInfo,
    dummy_inputs=library.Qwen3VLDummyInputsBuilder,
)
class CompressedQwen3VL(qwen.Served, library.Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL; with settings, every picture becomes as many tokens as the budget says."""

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if self.compression is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        side = self.visual.spatial_merge_size
        packed = []
        for rows, (frames, height, width) in zip(
            video_embeds_split, video_input["video_grid_thw"].tolist(), strict=True
        ):
            # each frame has text before it, so positions start anew
            grid = positions.grid_positions(1, height // side, width // side)
            packed.append(torch.cat([positions.pack(frame, grid) for frame in rows.chunk(frames)]))
        return tuple(packed)

    def runs(self, input_tokens: list[int], mm_features: list[Any]) -> list[positions.Run]:
        lengths = {
            feature.mm_position.offset: feature.mm_position.length
            for feature in mm_features
            if feature.modality == "image"
        }
        frames = self._iter_mm_grid_hw(
            input_tokens,
            mm_features,
            video_token_id=self.config.video_token_id,
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
        )
        return [
            positions.Run(offset, lengths.get(offset, count), max(rows, columns))
            for offset, rows, columns, count in frames
        ]

    def carries(self, embeddings: Tensor) -> bool:
        return bool(embeddings.shape[1] > self.visual_dim + self.multiscale_dim)
