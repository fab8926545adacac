"""A processor for models with random weights: one token a byte, and the family's own picture processing."""

from __future__ import annotations

from typing import Any

import transformers

from vtok.api import adapter_of
from vtok.errors import VtokError
from vtok.geometry import _processor as image_processor

PAD, IMAGE, VIDEO = "<pad>", "<image>", "<video>"


def processor_of(model: Any) -> Any:
    """A processor that fits a model's config, as ``AutoProcessor`` would load it.

    Parameters
    ----------
    model : nn.Module
        A LLaVA or Qwen2.5-VL, such as ``vtok.geometry`` builds.

    Raises
    ------
    VtokError
        Another family, or a vocabulary of fewer than 300.
    """
    adapter, library = adapter_of(model), transformers  # type: Any, Any
    config = adapter.base.config
    images = image_processor(adapter.family, config)
    if adapter.family == "llava":
        vision = config.vision_config
        return library.LlavaProcessor(
            image_processor=images,
            tokenizer=_tokenizer(config, {IMAGE: adapter.placeholder("image")}),
            patch_size=vision.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
            image_token=IMAGE,
        )
    if adapter.family != "qwen2_5_vl":
        raise VtokError(
            f"random weights of the family {adapter.family} have no processor; take tiny-llava or tiny-qwen2_5_vl"
        )
    start, end = config.vision_start_token_id, config.vision_end_token_id
    special = {"<|vision_start|>": start, "<|vision_end|>": end, "<|image_pad|>": config.image_token_id}
    special["<|video_pad|>"] = config.video_token_id
    framed = "<|vision_start|><|image_pad|><|vision_end|>"
    template = (
        "{% for m in messages %}{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}" + framed + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return library.Qwen2_5_VLProcessor(
        image_processor=images,
        tokenizer=_tokenizer(config, special),
        video_processor=library.Qwen2VLVideoProcessor(),
        chat_template=template,
    )


def _tokenizer(config: Any, special: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    size = config.text_config.vocab_size
    fixed = {PAD: 0, **special}
    free = (number for number in range(size) if number not in fixed.values())
    try:
        vocabulary = {**fixed, **{letter: next(free) for letter in sorted(pre_tokenizers.ByteLevel.alphabet())}}
    except (RuntimeError, StopIteration):
        raise VtokError(f"a vocabulary of {size} is too small for one token a byte") from None
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, additional_special_tokens=list(special), padding_side="left"
    )
