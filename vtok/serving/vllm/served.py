"""From vLLM's configuration objects to a compression."""

from __future__ import annotations

from typing import Any

from vtok.errors import VtokError
from vtok.serving.vllm.compression import Compression
from vtok.serving.vllm.settings import find


def settings_of(model_config: Any) -> Any:
    """Settings of a served model, ``None`` where nothing compresses it."""
    return find(model_config.model, getattr(model_config.hf_config, "vtok", None))


def compression_of(model_config: Any, fresh: bool = False) -> Compression | None:
    """The compression of a served model: one an engine, since a token count is asked for every picture.

    Args:
        model_config: vLLM's ``ModelConfig``.
        fresh: make a new one, for hooks of its own.
    """
    known = _known.get(id(model_config.hf_config))
    if known is not None and known[0] is model_config.hf_config and not fresh:
        return known[1]
    settings = settings_of(model_config)
    made = None if settings is None else Compression(model_config.hf_config, settings)
    if not fresh:
        _known[id(model_config.hf_config)] = (model_config.hf_config, made)
    return made


#: configuration -> (itself, its compression); vLLM makes a processing info anew for many requests
_known: dict[int, tuple[Any, Compression | None]] = {}


def refuse_split_heads(name: str, vllm_config: Any) -> None:
    """Tensor parallelism gives each rank some heads of the tower, and ranks would choose different tokens.

    Raises:
        VtokError: more than one rank.
    """
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        raise VtokError(
            f"{name} looks into the vision tower, whose heads tensor parallelism splits over its ranks; scale out "
            "with --data-parallel-size or --pipeline-parallel-size, or take a method behind the tower, such as divprune"
        )
