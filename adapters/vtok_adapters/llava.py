"""LLaVA-1.5: one tile an image, a CLIP (or SigLIP, DINOv2) tower, a two-layer projector, any decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vtok.errors import VtokError
from vtok.protocol import Adapter, Medium, Part
from vtok_adapters.vit import huggingface_tower


class LlavaLike(Adapter):
    """What the three LLaVA families share: where tower, projector and decoder are."""

    classes: tuple[str, ...] = ()
    tiled = False

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(base.__name__ in cls.classes for base in type(model).__mro__)

    def __init__(self, model: Any) -> None:
        base = model.model if hasattr(model, "lm_head") else model
        self.base, self.text = base, base.language_model
        self.tower = huggingface_tower(base.vision_tower, base.config.vision_feature_layer, base.multi_modal_projector)
        self.tower.keeps_prefix = self.tower.prefix > 0 and base.config.vision_feature_select_strategy == "full"

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        config = self.base.config.vision_config
        return int(config.image_size) // int(config.patch_size)

    def tile_length(self, modality: str) -> int:
        return self.side**2


class Llava(LlavaLike):
    """LLaVA-1.5 and models in its class."""

    family = "llava"
    classes = ("LlavaForConditionalGeneration", "LlavaModel")

    def media(self, modality: str, call: Mapping[str, Any]) -> Sequence[Medium]:
        if call.get("image_sizes") is not None:
            raise VtokError(
                "this LLaVA has a tower of variable picture size (Pixtral), which vtok does not know; use a model with "
                "a CLIP, SigLIP or DINOv2 tower"
            )
        part = Part(self.side, self.side)
        parts = (Part(1, self.tower.prefix), part) if self.tower.keeps_prefix else (part,)
        return [Medium("image", parts, slice(i, i + 1)) for i in range(len(call["pixel_values"]))]
