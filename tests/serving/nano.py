"""Folders with small random models that vLLM can serve: a head size that its CPU attention has, a processor, a chat
template, answers that follow the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vtok_eval.models import nano

WORDS = "what is in the picture how many are there red green blue circle square where left right of color a an and"
KINDS = ("nano-llava", "nano-next", "nano-qwen", "nano-qwen3")
SIDE = 112


def folder(kind: str, path: Path, seed: int = 3) -> Path:
    """Write the model of a kind and its processor into ``path``."""
    own = {"nano-next": _next, "nano-qwen3": _qwen3}
    model, processor = own[kind](seed) if kind in own else nano.blank(kind, WORDS.split(), seed)
    _stir(model, seed)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def _next(seed: int) -> tuple[Any, Any]:
    """nano-llava's text model behind a tiled tower of 8 x 8 patches a tile."""
    library: Any = transformers
    plain = nano.processor("nano-llava", WORDS.split())
    config = nano.config("nano-llava", plain.tokenizer).to_dict()
    vision = config["vision_config"] | {"image_size": SIDE, "num_hidden_layers": 4, "model_type": "clip_vision_model"}
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    names = ("text_config", "image_token_index", "vision_feature_select_strategy", "tie_word_embeddings")
    own = {name: config[name] for name in names if name in config} | {"image_token_index": plain.image_token_id}
    settings = library.LlavaNextConfig(
        vision_config=vision, image_grid_pinpoints=pinpoints, vision_feature_layer=-2, **own
    )
    torch.manual_seed(seed)
    model = library.LlavaNextForConditionalGeneration(settings).eval()
    nano.start_language(model.model.language_model)
    square = {"height": SIDE, "width": SIDE}
    images = library.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=pinpoints
    )
    return model, library.LlavaNextProcessor(
        image_processor=images,
        tokenizer=plain.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=plain.image_token,
        chat_template=nano.LLAVA_TEMPLATE,
    )


def _qwen3(seed: int) -> tuple[Any, Any]:
    """nano-qwen's words and widths with Qwen3-VL's tower, positions and DeepStack."""
    library: Any = transformers
    plain = nano.processor("nano-qwen", WORDS.split())
    base = nano.config("nano-qwen", plain.tokenizer)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    text = {name: getattr(base.text_config, name) for name in (*names, "max_position_embeddings", "pad_token_id")}
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text |= {"num_hidden_layers": 8, "head_dim": 32, "rope_parameters": rope}
    vision = {"depth": 6, "hidden_size": 128, "intermediate_size": 192, "num_heads": 2, "num_position_embeddings": 576}
    vision |= {
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "deepstack_visual_indexes": [1, 3, 4],
    }
    vision["out_hidden_size"] = text["hidden_size"]
    ids = ("vision_start_token_id", "image_token_id", "video_token_id")
    own = {name: getattr(base, name) for name in ids}
    own["vision_end_token_id"] = plain.tokenizer.convert_tokens_to_ids(nano.QWEN[1])
    torch.manual_seed(seed)
    model = library.Qwen3VLForConditionalGeneration(
        library.Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **own)
    ).eval()
    nano.start_language(model.model.language_model)
    size = {"shortest_edge": 384 * 384, "longest_edge": 448 * 448}
    sides: dict[str, Any] = {"patch_size": 16, "merge_size": 2, "size": size}
    return model, library.Qwen3VLProcessor(
        image_processor=library.Qwen2VLImageProcessor(**sides),
        tokenizer=plain.tokenizer,
        video_processor=library.Qwen3VLVideoProcessor(**sides),
        chat_template=nano.QWEN_TEMPLATE,
    )


@torch.no_grad()
def _stir(model: Any, seed: int) -> None:
    """Random weights that repeat the last token are no test: attention peaks, and answers have a head of their own."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.normal_(std=0.3, generator=draw)
        elif "layers" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(2)
        elif name.endswith("q_norm.weight"):  # Qwen3 gives every head's queries and keys one length
            weight.mul_(1.5)
        elif name.endswith("linear_fc2.weight") and "merger" in name:  # what a picture adds, and its DeepStack planes
            weight.mul_(10)
        elif name.endswith(("o_proj.weight", "down_proj.weight")) and "language_model" in name:
            weight.mul_(6)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    head = torch.randn(model.lm_head.weight.shape, generator=draw) * 0.2
    model.lm_head.weight = torch.nn.Parameter(head)
