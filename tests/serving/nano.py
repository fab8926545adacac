"""Folders with small random models that vLLM can serve: a head size that its CPU attention has, a processor, a chat
template, answers that follow the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from vtok_eval.models import nano

WORDS = "what is in the picture how many are there red green blue circle square where left right of color a an and"
KINDS = ("nano-llava", "nano-next", "nano-qwen")
SIDE = 112


def folder(kind: str, path: Path, seed: int = 3) -> Path:
    """Write the model of a kind and its processor into ``path``."""
    model, processor = _next(seed) if kind == "nano-next" else nano.blank(kind, WORDS.split(), seed)
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


@torch.no_grad()
def _stir(model: Any, seed: int) -> None:
    """Random weights that repeat the last token are no test: attention peaks, and answers have a head of their own."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.normal_(std=0.3, generator=draw)
        elif "layers" in name and name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.mul_(2)
        elif name.endswith(("o_proj.weight", "down_proj.weight")) and "language_model" in name:
            weight.mul_(6)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    head = torch.randn(model.lm_head.weight.shape, generator=draw) * 0.2
    model.lm_head.weight = torch.nn.Parameter(head)
