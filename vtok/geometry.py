"""Models of a published geometry with random weights, built from configs: no download, for demos and timings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from vtok.api import adapter_of
from vtok.errors import VtokError

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def geometries() -> list[str]:
    """Names that ``geometry`` knows."""
    return list(_CONFIGS)


def geometry(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", *, seed: int = 0
) -> Any:
    """A model of a known geometry in eval mode, with seeded random weights.

    The weights keep activations at unit scale and make attention peaked, so that half precision holds and selections
    depend on the picture; what the model says is noise.

    Parameters
    ----------
    name : str
        One of ``geometries()``: ``tiny-*`` run in seconds on a laptop; ``llava-0.5b`` has LLaVA-1.5's vision
        side and a half-billion decoder; the others are the published sizes.
    dtype : torch.dtype
        Of the weights.
    device : str or torch.device
        Where they are made; nothing passes through the host. ``"meta"`` gives shapes without weights.
    seed : int
        Of the weights.

    Returns
    -------
    PreTrainedModel
        A ``...ForConditionalGeneration`` of transformers.

    Raises
    ------
    VtokError
        Unknown name.
    """
    if name not in _CONFIGS:
        raise VtokError(f"there is no geometry {name!r}; known are {', '.join(_CONFIGS)}")
    kind, config = _CONFIGS[name]()
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    place = torch.device(device)
    # constructors draw a few weights from the global generator, which is the caller's
    with torch.random.fork_rng([place] if place.type == "cuda" else []), place, _without_init():
        model = cls._from_config(getattr(transformers, f"{kind}Config")(**config), dtype=dtype)
    randomize(model, seed)
    model.generation_config.eos_token_id = None  # random text never ends
    model.generation_config.pad_token_id = 0
    return model.eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill a model's parameters with noise that keeps activations at unit scale and attention peaked."""
    generator: torch.Generator | None = None
    for name, weight in model.named_parameters():
        if weight.is_meta:
            return
        if generator is None:
            generator = torch.Generator(weight.device).manual_seed(seed)
        weight.normal_(generator=generator)
        if name.endswith("bias"):
            weight.mul_(0.1)
        elif weight.ndim == 1 and name.endswith("weight"):  # of a norm
            weight.mul_(0.1).add_(1)
        elif "position_embed" in name:
            weight.mul_(0.5)
        elif weight.ndim > 1 and "embed_tokens" not in name:
            peaked = 1.5 if re.search(r"\.(q_proj|k_proj|qkv)\.", name) else 1.0
            weight.mul_(peaked / math.sqrt(weight[0].numel()))


def inputs_of(
    model: Any,
    image: Image.Image,
    prompt_tokens: int = 32,
    *,
    batch: int = 1,
    seed: int = 0,
    pixels: int | None = None,
) -> dict[str, Tensor]:
    """A prompt around a picture, as the model's processor would give it, with random words.

    Parameters
    ----------
    model : PreTrainedModel
        Any supported vision-language model, compressed or not.
    image : PIL.Image
        The picture.
    prompt_tokens : int
        Text tokens, half before the picture and half after it.
    batch : int
        Repeat the sample so often.
    seed : int
        Of the words.
    pixels : int, optional
        A Qwen's picture is shrunk to so many; by default to the library's million.

    Returns
    -------
    dict of str to Tensor
        Keyword arguments for ``model(...)`` and ``model.generate(...)``, on the model's device.

    Raises
    ------
    VtokError
        A bare vision transformer (it takes pixels alone), or fewer than one text token.
    """
    adapter = adapter_of(model)
    if adapter.base is None:
        raise VtokError(f"{type(model).__name__} has no language model and takes no prompt; give it pixels")
    if prompt_tokens < 1 or batch < 1:
        raise VtokError(f"prompt_tokens={prompt_tokens}, batch={batch}: both need to be at least 1")
    config: Any = adapter.base.config
    given = _processor(adapter.family, config, pixels)(images=image.convert("RGB"), return_tensors="pt")
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and key != "batch_num_images"}
    tensors["pixel_values"] = tensors["pixel_values"].to(model.dtype)
    length = adapter.media("image", tensors)[0].length
    placeholder = adapter.placeholder("image")
    start, end = getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None)
    framed = ([start] if start is not None else []) + [placeholder] * length + ([end] if end is not None else [])
    words = _words(config, adapter, prompt_tokens, seed)
    ids = torch.tensor([[*words[: prompt_tokens // 2], *framed, *words[prompt_tokens // 2 :]]])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **tensors}
    if start is not None:
        tensors["mm_token_type_ids"] = (ids == placeholder).long()
    return {key: torch.cat([value] * batch).to(model.device) for key, value in tensors.items()}


def _words(config: Any, adapter: Any, count: int, seed: int) -> list[int]:
    special = {value for key, value in vars(config).items() if re.search(r"_token_(id|index)$", key)}
    special |= {adapter.placeholder(modality) for modality in adapter.modalities}
    allowed = torch.tensor([i for i in range(10, min(config.text_config.vocab_size, 5000)) if i not in special])
    draws = torch.randint(len(allowed), (count,), generator=torch.Generator().manual_seed(seed))
    return allowed[draws].tolist()


def _processor(family: str, config: Any, pixels: int | None = None) -> Any:
    """The family's image processor with the sizes of this model's config."""
    library: Any = transformers
    vision = config.vision_config
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        sizes: dict[str, Any] = {key: getattr(vision, key) for key in ("patch_size", "temporal_patch_size")}
        if pixels is not None:
            sizes["size"] = {"shortest_edge": 56 * 56, "longest_edge": pixels}
        statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if family == "qwen3_vl" else {}
        return library.Qwen2VLImageProcessor(**sizes, merge_size=vision.spatial_merge_size, **statistics)
    side = int(vision.image_size)
    square = {"height": side, "width": side}
    if family == "llava_next":
        edges = {"size": {"shortest_edge": side}, "crop_size": square}
        return library.LlavaNextImageProcessor(**edges, image_grid_pinpoints=config.image_grid_pinpoints)
    if family == "llava_onevision":
        return library.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=config.image_grid_pinpoints)
    if "siglip" in vision.model_type:
        return library.SiglipImageProcessor(size=square)
    return library.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square)


def _without_init() -> AbstractContextManager:
    """Skip the library's own initialisation: every weight is drawn once, by ``randomize``."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        return nullcontext()
    return no_init_weights()


# -- configs ------------------------------------------------------------------------------------------------------


def _clip(hidden: int, intermediate: int, heads: int) -> dict[str, Any]:
    """A 24-layer CLIP tower for 336 pixels: 24 x 24 patches."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 24,
        "num_attention_heads": heads,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }


def _llama(hidden: int, intermediate: int, heads: int, vocab: int = 32064) -> dict[str, Any]:
    """32 layers, as Vicuna has: published layer numbers hold as they stand."""
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 32,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _llava(vision: Mapping[str, Any], text: Mapping[str, Any], image_token: int = 32000) -> tuple[str, dict[str, Any]]:
    return "Llava", {
        "vision_config": dict(vision),
        "text_config": dict(text),
        "image_token_index": image_token,
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def _llava_next() -> tuple[str, dict[str, Any]]:
    _, config = _llava(_clip(1024, 4096, 16), _llama(4096, 11008, 32))
    return "LlavaNext", {**config, "image_grid_pinpoints": PINPOINTS}


def _qwen(
    text: Mapping[str, Any], vision: Mapping[str, Any], section: list[int], first_id: int
) -> tuple[str, dict[str, Any]]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    return "Qwen2_5_VL", {
        "text_config": {
            "num_hidden_layers": 28,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 128000,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "rope_parameters": rope,
            **text,
        },
        "vision_config": {
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "tokens_per_second": 2,
            "out_hidden_size": text["hidden_size"],
            **vision,
        },
        "vision_start_token_id": first_id,
        "vision_end_token_id": first_id + 1,
        "image_token_id": first_id + 3,
        "video_token_id": first_id + 4,
        "tie_word_embeddings": False,
    }


def _tiny_qwen() -> tuple[str, dict[str, Any]]:
    text: dict[str, Any] = {"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512}
    text |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    text |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    vision = {"depth": 8, "hidden_size": 96, "intermediate_size": 192, "num_heads": 4}
    return _qwen(text, vision | {"fullatt_block_indexes": [1, 3, 5, 7]}, [4, 6, 6], first_id=2)


def _qwen_7b() -> tuple[str, dict[str, Any]]:
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    return _qwen(text, vision | {"fullatt_block_indexes": [7, 15, 23, 31]}, [16, 24, 24], first_id=151652)


_CONFIGS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "tiny-llava": lambda: _llava(_clip(96, 192, 4), _llama(192, 512, 6, vocab=1024), image_token=3),
    "tiny-qwen2_5_vl": _tiny_qwen,
    "llava-0.5b": lambda: _llava(_clip(1024, 4096, 16), _llama(1024, 4096, 16)),
    "llava-1.5-7b": lambda: _llava(_clip(1024, 4096, 16), _llama(4096, 11008, 32)),
    "llava-next-7b": _llava_next,
    "qwen2_5_vl-7b": _qwen_7b,
}
