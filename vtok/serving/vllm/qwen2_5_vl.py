"""Qwen2.5-VL in vLLM with a budget of visual tokens for pictures; videos stay whole."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import qwen2_5_vl as library
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.vllm import positions, qwen


class CompressedInfo(qwen.Info, library.Qwen2_5_VLProcessingInfo):
    """Token counts of pictures: the budget's."""


class CompressedProcessor(qwen.Processor, library.Qwen2_5_VLMultiModalProcessor):
    """Puts as many placeholders into a prompt as a picture will have tokens."""


@MULTIMODAL_REGISTRY.register_processor(
    CompressedProcessor,
    info=CompressedInfo,
    dummy_inputs=library.Qwen2_5_VLDummyInputsBuilder,
)
class CompressedQwen2_5_VL(qwen.Served, library.Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL; with settings, every picture becomes as many tokens as the budget says."""

    def _postprocess_video_embeds_evs(self, video_embeds_split: Any, video_input: Any) -> Any:
        if self.compression is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        side = self.visual.spatial_merge_size
        seconds = video_input.get("second_per_grid_ts")
        rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        steps = [1.0] * len(video_embeds_split)
        if seconds is not None:
            steps = [float(step * rate) for step in seconds.flatten().tolist()]
        grids = video_input["video_grid_thw"].tolist()
        return tuple(
            positions.pack(rows, positions.grid_positions(frames, height // side, width // side, step))
            for rows, (frames, height, width), step in zip(video_embeds_split, grids, steps, strict=True)
        )

    def runs(self, input_tokens: list[int], mm_features: list[Any]) -> list[positions.Run]:
        lengths = {feature.mm_position.offset: feature.mm_position.length for feature in mm_features}
        return [
            positions.Run(offset, lengths[offset], max(int((frames - 1) * step), rows - 1, columns - 1) + 1)
            for offset, frames, rows, columns, step in self.iter_mm_grid_thw(mm_features)
        ]
