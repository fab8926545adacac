"""The masked oracle: the uncompressed model in which dropped tokens cannot be seen from their site on.

Every decoder layer of the plain model gets a full additive mask in which the columns that the report calls dropped
before that layer are hidden; hidden states of kept tokens must then equal the compressed model's.

Where tokens were merged or re-encoded, the plain model must also see what the compressed one saw: `recorded` takes the
prompt's embeddings down as the decoder got them, and `masked(..., prompt=...)` hands them to the plain model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok.api import session_of
from vtok.engine.cache import cache_of


@dataclass
class Prompt:
    """What entered the text model of a compressed model in its last prefill, at full length.

    Attributes:
        embeds: (B, L, D) as the model made them: features of the (compressed) tower at their placeholders.
        merged: the same, with what the input site put at the columns that stand.
        planes: Qwen3-VL's DeepStack planes, as the (compressed) tower made them, averaged where the input site does so.
        visual: (B, L) bool, the columns whose rows the planes hold.
    """

    embeds: Tensor | None = None
    merged: Tensor | None = None
    planes: Any = None
    visual: Tensor | None = field(default=None, repr=False)
    short: Tensor | None = field(default=None, repr=False)


def text_model(model: nn.Module) -> Any:
    """The decoder of a vision-language model."""
    return (model.model if hasattr(model, "lm_head") else model).language_model


@contextmanager
def recorded(model: nn.Module) -> Iterator[Prompt]:
    """Take down what enters the text model in front of vtok's hook, and behind it."""
    prompt = Prompt()
    text = text_model(model)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            planes = kwargs.get("deepstack_visual_embeds")
            prompt.embeds = kwargs["inputs_embeds"].detach()
            prompt.planes = None if planes is None else [plane.detach() for plane in planes]
            prompt.visual = kwargs.get("visual_pos_masks")

    def behind(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            prompt.short = kwargs["inputs_embeds"].detach()

    handles = [
        text.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        text.register_forward_pre_hook(behind, with_kwargs=True),
    ]
    try:
        yield prompt
    finally:
        for handle in handles:
            handle.remove()
    run = session_of(model).last
    if run is not None and prompt.planes is not None:
        prompt.planes = [averaged(plane, prompt.visual, run) for plane in prompt.planes]
    prompt.merged = prompt.embeds
    if run is not None and prompt.short is not None and prompt.short.shape[1] == run.segments[run._first].width:
        segment = run.segments[run._first]
        real = torch.ones_like(segment.index, dtype=torch.bool) if segment.mask is None else segment.mask
        rows = torch.arange(real.shape[0])[:, None].expand_as(real)
        prompt.merged = prompt.embeds.clone()
        prompt.merged[rows[real], segment.index[real]] = prompt.short[real]


def averaged(plane: Tensor, visual: Tensor, run: Any) -> Tensor:
    """A plane with what the input site's tokens average, at their places."""
    full = torch.zeros(*visual.shape, plane.shape[1]).masked_scatter(visual[..., None], plane)
    for number, (tokens, kept, weights) in run.poured.items():
        span = run.spans[number]
        own = full[span.sample, span.columns].clone()
        full[span.sample, span.columns[kept]] = torch.einsum("kn,nd->kd", weights, own[tokens])
    return full[visual]


def rewrites(model: nn.Module) -> bool:
    """Whether the last prefill of a compressed model changed embeddings (tower or merge), not just dropped some."""
    session = session_of(model)
    inside = any(stage.site == "encoder" for stage in session.stages)
    return inside or bool(session.last is not None and session.last.groups)


def hidden_columns(model: nn.Module, batch: dict) -> list[Tensor]:
    """(B, L) bool per decoder layer: columns that the last prefill of the compressed model dropped before it."""
    session = session_of(model)
    run = session.last
    depth = session.depth
    ids = batch["input_ids"]
    if run is None:
        return [torch.zeros_like(ids, dtype=torch.bool)] * depth
    result = []
    rows = run.segments[0].index.shape[0]
    for layer in range(depth):
        segment = run.segments[run._segment_of(layer)]
        standing = segment.kept()
        visual = torch.zeros(rows, run.segments[0].full, dtype=torch.bool)
        for span in run.spans:
            visual[span.sample, span.columns] = True
        result.append(visual & ~standing)
    return result


@contextmanager
def masked(
    model: nn.Module, hidden: Sequence[Tensor], attention_mask: Tensor | None = None, prompt: Prompt | None = None
) -> Iterator[nn.Module]:
    """Hide columns of a plain model, layer by layer; later (generated) columns stay visible."""
    text = text_model(model)
    handles = []
    rows_of = hidden[0].shape[0]
    assert prompt is None or prompt.merged is not None

    def replace(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        copies, length = kwargs["inputs_embeds"].shape[0] // rows_of, prompt.merged.shape[1]
        if kwargs["inputs_embeds"].shape[1] == length:
            kwargs = {**kwargs, "inputs_embeds": prompt.merged.repeat_interleave(copies, 0)}
            if prompt.planes is not None:
                kwargs["deepstack_visual_embeds"] = prompt.planes
        return args, kwargs

    def before(layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x = args[0] if args else kwargs["hidden_states"]
        cache = cache_of(kwargs)
        past = int(cache.get_seq_length(layer)) if cache is not None else 0
        new = x.shape[1]
        total = past + new
        if getattr(cache, "is_compileable", False):
            total = cache.get_max_cache_shape(layer)
        rows = torch.arange(past, past + new)[:, None]
        allowed = (torch.arange(total)[None] <= rows)[None].expand(x.shape[0], -1, -1).clone()
        copies = x.shape[0] // rows_of
        gone = hidden[layer].repeat_interleave(copies, 0)
        width = min(total, gone.shape[1])
        allowed[:, :, :width] &= ~gone[:, None, :width]
        if attention_mask is not None:
            real = attention_mask.repeat_interleave(x.shape[0] // attention_mask.shape[0], 0)
            allowed[:, :, : min(total, real.shape[1])] &= real[:, None, :total].bool()
        # a row with nothing to see (padding, dropped) may look at itself, to stay finite
        allowed |= torch.eye(total, dtype=torch.bool)[None, past : past + new] & ~allowed.any(-1, keepdim=True)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
        return args, {**kwargs, "attention_mask": bias}

    if prompt is not None:
        handles.append(text.register_forward_pre_hook(replace, with_kwargs=True))
    for number, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(partial(before, number), with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def survivors(model: nn.Module, batch: dict) -> Tensor:
    """(B, L) bool: real tokens that stand after the last stage."""
    gone = hidden_columns(model, batch)[-1]
    real = batch.get("attention_mask")
    return ~gone if real is None else ~gone & real.bool()
