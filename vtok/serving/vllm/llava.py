"""LLaVA-1.5 in vLLM with a budget of visual tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava as library
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.errors import VtokError
from vtok.serving.vllm.compression import Compression, checked
from vtok.serving.vllm.dense import CutTower, WatchedTower, dense_tower
from vtok.serving.vllm.served import compression_of, refuse_split_heads

#: transformers 5 saves a CLIP or SigLIP tower without the inner module that vLLM 0.32 gives it
NAMES = library.WeightsMapper(
    orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}
)


class CompressedInfo(library.LlavaProcessingInfo):
    """Token counts of pictures: the budget's."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        compression = compression_of(self.ctx.model_config)
        if compression is None:
            return int(super().get_num_image_tokens(image_width=image_width, image_height=image_height))
        return compression.tokens("image", {"pixel_values": [None]})


def processing_info(ctx: Any) -> Any:
    """What vLLM asks about pictures of a LLaVA: Pixtral's towers are vLLM's own matter."""
    info = library._build_llava_or_pixtral_hf_info(ctx)
    if isinstance(info, library.LlavaProcessingInfo):
        return CompressedInfo(ctx)
    if compression_of(ctx.model_config) is not None:
        raise VtokError("this LLaVA has a Pixtral tower, which vtok does not know; use one with CLIP or SigLIP")
    return info


@contextmanager
def _every_block(config: Any) -> Iterator[None]:
    """vLLM leaves out the blocks behind the feature layer, and the class token is asked at the last one."""
    layer, config.vision_feature_layer = config.vision_feature_layer, -1
    try:
        yield
    finally:
        config.vision_feature_layer = layer


class DenseMixin:
    """What the LLaVA families share: the engine on a dense tower."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any
    hf_to_vllm_mapper: Any
    compression: Compression | None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        compression = compression_of(vllm_config.model_config, fresh=True)
        if vllm_config.model_config.multimodal_config.get_limit_per_prompt("image") == 0:
            compression = None  # there is no tower
        if compression is not None and compression.inside:
            refuse_split_heads(compression.name, vllm_config)
        depth = config.vision_config.num_hidden_layers
        behind = compression is not None and compression.looks_at_last
        self._whole_tower = behind and library._get_num_hidden_layers(config) < depth
        with _every_block(config) if self._whole_tower else nullcontext():
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        if config.vision_config.model_type in ("clip_vision_model", "siglip_vision_model"):
            self.hf_to_vllm_mapper = self.hf_to_vllm_mapper | NAMES
        self.compression = None
        if compression is not None:
            self.attach_compression(compression)

    def attach_compression(self, compression: Compression) -> None:
        """Compress from now on."""
        feature_layer = library._get_num_hidden_layers(self.config) - 1
        watcher: Any = WatchedTower if compression.looks_at_last else None
        if any(stage.site == "encoder" for stage in compression.session.stages):
            watcher = CutTower
        tower = dense_tower(self.vision_tower, feature_layer, self.multi_modal_projector)
        compression.attach(tower, watcher)
        self.compression = compression

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Any:
        if not self._whole_tower:
            return super()._image_pixels_to_features(vision_tower, pixel_values)  # type: ignore[misc]
        return vision_tower(
            pixel_values,
            select_layers=[self.config.vision_feature_layer],
            feature_select_strategy=self.config.vision_feature_select_strategy,
        )


@MULTIMODAL_REGISTRY.register_processor(
    library._build_llava_or_pixtral_hf_processor,
    info=processing_info,
    dummy_inputs=library.LlavaDummyInputsBuilder,
)
class CompressedLlava(DenseMixin, library.LlavaForConditionalGeneration):
    """vLLM's LLaVA; with settings, every picture becomes as many tokens as the budget says."""

    @torch.no_grad()
    def _process_image_input(self, image_input: Any) -> Any:
        compression = self.compression
        if compression is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        pixels: Tensor = image_input["pixel_values"]
        call = {"pixel_values": pixels}
        features = partial(library.LlavaForConditionalGeneration._process_image_input, self, image_input)
        kept = compression.encode("image", call, features)
        count = compression.tokens("image", {"pixel_values": [None]})
        return tuple(rows for rows, _ in checked(kept, [count] * len(pixels), compression.name))
