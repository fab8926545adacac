"""LLaVA-NeXT in vLLM with a budget of visual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava_next as library
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.vllm.compression import checked
from vtok.serving.vllm.llava import DenseMixin
from vtok.serving.vllm.served import compression_of


class CompressedInfo(library.LlavaNextProcessingInfo):
    """Token counts of pictures: the budget's."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        compression = compression_of(self.ctx.model_config)
        if compression is None:
            return int(super().get_num_image_tokens(image_width=image_width, image_height=image_height))
        return compression.tokens("image", {"image_sizes": [[image_height, image_width]]})

    def get_image_size_with_most_features(self) -> Any:
        # memory is measured with the most tiles, whatever is left of them
        return library.LlavaNextProcessingInfo(self.ctx).get_image_size_with_most_features()


@MULTIMODAL_REGISTRY.register_processor(
    library.LlavaNextMultiModalProcessor,
    info=CompressedInfo,
    dummy_inputs=library.LlavaDummyInputsBuilder,
)
class CompressedLlavaNext(DenseMixin, library.LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT; with settings, every picture becomes as many tokens as the budget says."""

    @torch.no_grad()
    def _process_image_input(self, image_input: Any) -> Any:
        compression = self.compression
        if compression is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        pixels = torch.cat(list(image_input["pixel_values"]))
        sizes = torch.as_tensor(image_input["image_sizes"]).tolist()
        call = {"pixel_values": pixels, "image_sizes": sizes}
        media = compression.adapter.media("image", call)

        def features() -> list[Tensor]:
            tiles = self.multi_modal_projector(self._image_pixels_to_features(self.vision_tower, pixels))
            return [
                self._merge_image_patch_embeddings(torch.tensor(size), tiles[medium.tiles], strategy="spatial_unpad")
                for size, medium in zip(sizes, media, strict=True)
            ]

        kept = compression.encode("image", call, features)
        counts = [compression.tokens("image", {"image_sizes": [size]}) for size in sizes]
        return [features for features, _ in checked(kept, counts, compression.name)]
