"""Vision transformers: the towers inside LLaVA, and CLIP, SigLIP, DINOv2, timm and open_clip models by themselves."""

from __future__ import annotations

from typing import Any

from torch import nn

from vtok.errors import VtokError
from vtok.protocol import Adapter, Tower, find_blocks
from vtok_adapters.blocks import ClipBlocks, Dinov2Blocks, OpenClipBlocks, TimmBlocks

HF_BLOCKS: dict[str, Any] = {
    "CLIPEncoderLayer": ClipBlocks(),
    "SiglipEncoderLayer": ClipBlocks(),
    "Dinov2Layer": Dinov2Blocks(),
}


def huggingface_tower(root: nn.Module, feature_layer: int | None = None, projector: nn.Module | None = None) -> Tower:
    """The tower of a transformers vision model.

    Args:
        root: the vision model.
        feature_layer: index into its ``hidden_states`` that the model reads (-2 in LLaVA-1.5), ``None``: the last.
        projector: what takes the features.
    """
    layers = find_blocks(root, tuple(HF_BLOCKS))
    if not layers:
        raise VtokError(
            f"the vision tower {type(root).__name__} is not known to vtok (known blocks: {', '.join(HF_BLOCKS)}); "
            "write an adapter for it, see CONTRIBUTING"
        )
    if feature_layer is not None and not isinstance(feature_layer, int):
        raise VtokError(
            f"vision_feature_layer={feature_layer} reads several layers at once; tokens that one layer dropped are "
            "missing in the other. Use a model that reads one layer"
        )
    states = len(layers) + 1
    index = states - 1 if feature_layer is None else feature_layer % states
    name = type(layers[0]).__name__
    has_cls = name != "SiglipEncoderLayer"
    return Tower(
        root=root,
        layers=layers,
        blocks=HF_BLOCKS[name],
        prefix=int(has_cls),
        has_cls=has_cls,
        feature_layer=index - 1,
        projector=projector,
        mask_config=getattr(root, "config", None),
    )


class HuggingFaceViT(Adapter):
    """CLIP, SigLIP and DINOv2 vision models of transformers, without a language model."""

    family = "hf_vit"
    modalities = ()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        names = {base.__name__ for base in type(model).__mro__}
        return bool(
            names & {"CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel", "Dinov2Model",
                     "CLIPForImageClassification", "Dinov2ForImageClassification", "SiglipForImageClassification"}
        )  # fmt: skip

    def __init__(self, model: nn.Module) -> None:
        self.tower = huggingface_tower(model)


class TimmViT(Adapter):
    """``timm.models.VisionTransformer``: ViT, DeiT, DINOv2 and friends, any number of prefix tokens."""

    family = "timm_vit"
    modalities = ()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return any(
            base.__name__ == "VisionTransformer" and base.__module__.startswith("timm.") for base in type(model).__mro__
        )

    def __init__(self, model: Any) -> None:
        if {type(block).__name__ for block in model.blocks} != {"Block"}:
            raise VtokError(
                f"{type(model).__name__} is built from {type(model.blocks[0]).__name__}, and vtok knows timm's plain "
                "pre-norm Block; write an adapter for it, see CONTRIBUTING"
            )
        self.tower = Tower(
            root=model,
            layers=list(model.blocks),
            blocks=TimmBlocks(),
            prefix=model.num_prefix_tokens,
            has_cls=getattr(model, "cls_token", None) is not None,
            feature_layer=len(model.blocks) - 1,
        )


class OpenClipViT(Adapter):
    """open_clip models with a ``VisionTransformer`` tower (or that tower alone)."""

    family = "open_clip_vit"
    modalities = ()

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        visual = getattr(model, "visual", model)
        return type(visual).__name__ == "VisionTransformer" and type(visual).__module__.startswith("open_clip.")

    def __init__(self, model: Any) -> None:
        visual = getattr(model, "visual", model)
        layers = list(visual.transformer.resblocks)
        if {type(block).__name__ for block in layers} != {
            "ResidualAttentionBlock"
        } or not visual.transformer.batch_first:
            raise VtokError(
                "this open_clip tower uses custom or sequence-first blocks; vtok knows the plain batch-first "
                "ResidualAttentionBlock. Build it with open_clip's defaults"
            )
        self.tower = Tower(
            root=visual,
            layers=layers,
            blocks=OpenClipBlocks(layers[0].attn.num_heads),
            prefix=1,
            has_cls=True,
            feature_layer=len(layers) - 1,
        )
