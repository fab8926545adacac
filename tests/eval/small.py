"""A LLaVA with random weights, 64 visual tokens and a real processor, in a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from vtok.geometry import randomize
from vtok_eval.models import nano

from .. import models as tiny

WORDS = (
    "what is this color of the object red blue how many yes no a dog cat answer question using single word or phrase"
)
SIDE, PATCH, TOKENS = 56, 7, 64


@functools.cache
def model_and_processor(end: bool = False) -> tuple[Any, Any]:
    """Shared by tests, which leave it as it was; without an end token unless ``end``."""
    processor: Any = nano.processor("nano-llava", WORDS.split())
    config: Any = nano.config("nano-llava", processor.tokenizer)
    vision = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": 32, "intermediate_size": 48}
    config.vision_config.update({**vision, "num_hidden_layers": 3, "num_attention_heads": 2})
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "tie_word_embeddings": False}
    config.text_config.update({**text, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16})
    config.image_seq_length, config.tie_word_embeddings = TOKENS, False
    processor.patch_size = PATCH
    processor.image_processor.size = {"shortest_edge": SIDE}
    processor.image_processor.crop_size = {"height": SIDE, "width": SIDE}
    with torch.random.fork_rng([]):
        model = transformers.LlavaForConditionalGeneration(config)
    randomize(model, 0)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id if end else None
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model.eval(), processor


def save(folder: Path) -> Path:
    """The folder, filled."""
    model, processor = model_and_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def photo(seed: int = 0, size: tuple[int, int] = (70, 60)) -> Image.Image:
    """Noise."""
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


# -- processors for the tiny models of every family ---------------------------------------------------------------


def processor_of(family: str, model: Any) -> Any:
    """What ``AutoProcessor`` would load beside ``tests.models.build(family)``."""
    library: Any = transformers
    side = {"height": SIDE, "width": SIDE}
    if family in tiny.QWEN:
        sizes = {"patch_size": tiny.PATCH, "temporal_patch_size": 2, "merge_size": tiny.MERGE}
        pixels = {"size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}}
        images = library.Qwen2VLImageProcessor(**sizes, **pixels)
        name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
        video = library.Qwen3VLVideoProcessor if family == "qwen3_vl" else library.Qwen2VLVideoProcessor
        template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        made, tokenizer = getattr(library, f"{name}Processor"), _words("<|image_pad|>", "<|video_pad|>")
        return made(image_processor=images, tokenizer=tokenizer, video_processor=video(), chat_template=template)
    own = {
        "tokenizer": _words("<image>", "<video>"),
        "chat_template": TEMPLATE,
        "image_token": "<image>",
        "video_token": "<video>",
    }
    pins = getattr(model.config, "image_grid_pinpoints", None)
    if family == "llava_onevision":
        own["image_processor"] = library.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pins)
        own["video_processor"] = library.LlavaOnevisionVideoProcessor(size=side)
        own |= {"num_image_tokens": TOKENS, "vision_feature_select_strategy": "full"}
        own["vision_aspect_ratio"] = model.config.vision_aspect_ratio
        return library.LlavaOnevisionProcessor(**own)
    del own["video_token"]
    own |= {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": side}
    if family == "llava_next":
        images = library.LlavaNextImageProcessor(**sizes, image_grid_pinpoints=pins)
        return library.LlavaNextProcessor(image_processor=images, **own)
    return library.LlavaProcessor(image_processor=library.CLIPImageProcessor(**sizes), **own)


TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def _words(image: str, video: str) -> Any:
    """One token a word, with the special ids of ``tests.models``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"<pad>": tiny.PAD, "<s>": tiny.BOS, "<unk>": 2, image: tiny.IMAGE, video: tiny.VIDEO}
    ids |= {"<|vision_start|>": tiny.VISION_START, "<|vision_end|>": tiny.VISION_END}
    words = [*WORDS.split(), "user", "assistant", *(f"w{number}" for number in range(tiny.VOCAB))]
    vocabulary = ids | dict(zip(dict.fromkeys(words), range(tiny.FIRST_TEXT, tiny.VOCAB), strict=False))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=[*ids]
    )
