"""nano-llava and nano-qwen: stock classes of transformers, thin but deep, with one small tokenizer for both."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast

NANO = ("nano-llava", "nano-qwen")

#: pixels along a side of nano-llava's picture: 24 x 24 patches, as in LLaVA-1.5
SIDE = 336
#: fewest and most pixels that nano-qwen's processor makes of a picture: 324 tokens of 28 x 28 pixels, a few more where
#: the aspect ratio asks for it
PIXELS = (504 * 504, 532 * 532)
#: nano-llava's tower starts as DINOv2's, so it takes ImageNet's statistics
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: ends a picture in nano-llava's prompts: with nothing between two pictures, and positions that close up, nobody could
#: say where one ends
BORDER = ";"

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
START, END = "<|im_start|>", "<|im_end|>"
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE, START, END, *QWEN)

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>" + BORDER + " {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Lower case, one token a known word; anything else is spelt, one token a character.

    Parameters
    ----------
    words : sequence of str
        The vocabulary beside single characters; order does not matter.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = string.ascii_lowercase + string.digits
    pieces = [*SPECIAL, *string.punctuation, *letters, *(f"##{letter}" for letter in letters)]
    known = sorted({word.lower() for word in words} | {"user", "assistant", "system"} - set(pieces))
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *known]))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=64))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE, START, END, *QWEN],
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def processor(name: str, words: Sequence[str]) -> Any:
    """The processor of ``nano-llava`` or ``nano-qwen``: what ``AutoProcessor`` loads later."""
    library: Any = transformers
    text = tokenizer(words)
    statistics = {"image_mean": list(MEAN), "image_std": list(STD)}
    if name == "nano-llava":
        # pad_to_square fills with the mean colour: nothing of a wide picture is cut off
        images = library.LlavaImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_pad=True, **statistics
        )
        return library.LlavaProcessor(
            image_processor=images,
            tokenizer=text,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            image_token=IMAGE,
            chat_template=LLAVA_TEMPLATE,
        )
    least, most = PIXELS
    images = library.Qwen2VLImageProcessor(min_pixels=least, max_pixels=most, **statistics)
    videos = library.Qwen2VLVideoProcessor(min_pixels=least, max_pixels=most, **statistics)
    return library.Qwen2_5_VLProcessor(
        image_processor=images, tokenizer=text, video_processor=videos, chat_template=QWEN_TEMPLATE
    )


def config(name: str, text: PreTrainedTokenizerFast) -> Any:
    """The configuration of ``nano-llava`` or ``nano-qwen`` for a tokenizer."""
    library: Any = transformers
    ids = text.convert_tokens_to_ids
    language: dict[str, Any] = {
        "vocab_size": -(-len(text) // 64) * 64,
        "hidden_size": 160,
        "intermediate_size": 416,
        "num_hidden_layers": 12,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": ids(BOS),
        "eos_token_id": ids(EOS),
        "pad_token_id": ids(PAD),
        "tie_word_embeddings": True,
    }
    if name == "nano-llava":
        # a question and what it asks about are hundreds of positions apart. With heads of 32 channels and the usual
        # base of 1e4 all but 4 of 16 pairs turn through on the way, and nothing finds what is alike
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e7}
        tower = {
            "model_type": "clip_vision_model",
            "hidden_size": 384,
            "intermediate_size": 1024,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "image_size": SIDE,
            "patch_size": 14,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "projection_dim": 384,
        }
        return library.LlavaConfig(
            vision_config=tower,
            text_config={
                "model_type": "llama",
                "rope_parameters": rope,
                **language,
            },
            image_token_index=ids(IMAGE),
            image_seq_length=(SIDE // 14) ** 2,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    vision: dict[str, Any] = {
        "depth": 6,
        "hidden_size": 384,
        "intermediate_size": 576,
        "num_heads": 6,
        "hidden_act": "gelu",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "tokens_per_second": 2,
        "fullatt_block_indexes": [1, 3, 5],
    }
    # the merger has 2.6 M parameters: the language model has half as many neurons, or the file would pass 25 MiB
    language["intermediate_size"] = 208
    vision["out_hidden_size"] = language["hidden_size"]
    # Qwen's 1e6, roughly: M-RoPE gives the slowest pairs to the columns, which stand still at it, there and here. What
    # is where comes from the tower
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [4, 6, 6]}
    start, end, image, video = (ids(piece) for piece in QWEN)
    return library.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={"use_sliding_window": False, "rope_parameters": rope, **language},
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        tie_word_embeddings=True,
    )


def blank(name: str, words: Sequence[str], seed: int = 0) -> tuple[Any, Any]:
    """(model, processor) with random weights, fp32.

    The library draws matrices with a spread of 0.02 at any width; at this one, attention would start flat and add next
    to nothing. Here matrices are drawn by fan-in, and attention starts as looking for what is alike and copying it
    (mimetic initialisation, arXiv 2305.09828).
    """
    import torch

    made = processor(name, words)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        kind = "Llava" if name == "nano-llava" else "Qwen2_5_VL"
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config(name, made.tokenizer))
        start_language(model.model.language_model)
        if name == "nano-llava":
            for layer in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
                torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    model.generation_config.eos_token_id = made.tokenizer.eos_token_id
    model.generation_config.pad_token_id = made.tokenizer.pad_token_id
    model.generation_config.bos_token_id = made.tokenizer.bos_token_id
    return model.eval(), made


def start_language(language: Any) -> None:
    """Draw a language model's weights."""
    import torch

    torch.nn.init.normal_(language.embed_tokens.weight, std=0.05)
    for part, module in language.layers.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        # what writes to the residual stream starts smaller, the more there are of it
        depth = 2 * len(language.layers) if part.endswith(("o_proj", "down_proj")) else 1
        torch.nn.init.normal_(module.weight, std=(module.in_features * depth) ** -0.5)
        if part.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            alike = torch.eye(*module.weight.shape)
            with torch.no_grad():
                module.weight.mul_(0.5).add_(alike, alpha=0.3 if part.endswith("o_proj") else 0.9)
