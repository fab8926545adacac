"""The vLLM plug-in: models whose placeholder counts are the budget, so that scheduler, paged cache, prefix cache and
chunked prefill all see the short prompt. See docs/serving.md.

vLLM calls ``register`` through the entry-point group ``vllm.general_plugins`` in each of its processes. The classes
are registered by name and imported when a model of theirs is served; without settings (``vtok_config.json``,
``--hf-overrides`` or ``VTOK_VLLM``) they are vLLM's own classes in everything that they do.
"""

from __future__ import annotations

import os

#: architecture in a model's config.json -> class that serves it
ARCHITECTURES = {
    "LlavaForConditionalGeneration": "vtok.serving.vllm.llava:CompressedLlava",
    "LlavaNextForConditionalGeneration": "vtok.serving.vllm.llava_next:CompressedLlavaNext",
    "Qwen2_5_VLForConditionalGeneration": "vtok.serving.vllm.qwen2_5_vl:CompressedQwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "vtok.serving.vllm.qwen3_vl:CompressedQwen3VL",
}

#: settings as JSON, a path to such a file or to a folder with ``vtok_config.json``, or ``off``
VARIABLE = "VTOK_VLLM"
OFF = ("off", "0", "false", "no")


def register() -> None:
    """Tell vLLM about the classes; with ``VTOK_VLLM=off`` leave vLLM alone. May be called any number of times."""
    if os.environ.get(VARIABLE, "").strip().lower() in OFF:
        return
    from vllm import ModelRegistry

    for architecture, target in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, target)
