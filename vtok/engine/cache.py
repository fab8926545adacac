"""The KV cache among arguments and outputs: transformers 5.24 renamed ``past_key_values`` to ``cache``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import Cache
from transformers.masking_utils import create_causal_mask

OLD, NEW = "past_key_values", "cache"

#: what models and layers of this version call it
CACHE = NEW if NEW in inspect.signature(create_causal_mask).parameters else OLD


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache that a forward was given, by any name: with one overlooked a decoding step passes for a prompt."""
    for name in (NEW, OLD):
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next((value for value in kwargs.values() if isinstance(value, Cache)), None)


def cache_in(output: Any) -> Any:
    """The cache that an output carries, by this version's name: asking by the old one warns."""
    return getattr(output, CACHE, None)
