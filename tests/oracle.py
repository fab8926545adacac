"""The masked oracle: the uncompressed model in which dropped tokens cannot be seen from their site on.

Every decoder layer of the plain model gets a full additive mask in which the columns that the report calls dropped
before that layer are hidden; hidden states of kept tokens must then equal the compressed model's.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import torch

import vtok
from vtok.api import session_of


def hidden_columns(model, batch: dict) -> list[torch.Tensor]:
    """(B, L) bool per decoder layer: columns that the last prefill of the compressed model dropped before it."""
    session = session_of(model)
    run = session.last
    depth = session.depth
    ids = batch["input_ids"]
    if run is None:
        return [torch.zeros_like(ids, dtype=torch.bool)] * depth
    result = []
    for layer in range(depth):
        segment = run.segments[run._segment_of(layer)]
        standing = segment.kept()
        visual = torch.zeros_like(ids, dtype=torch.bool)
        for span in run.spans:
            visual[span.sample, span.columns] = True
        result.append(visual & ~standing)
    return result


@contextmanager
def masked(model, hidden: list[torch.Tensor], attention_mask: torch.Tensor | None = None):
    """Hide columns of a plain model, layer by layer; later (generated) columns stay visible."""
    text = (model.model if hasattr(model, "lm_head") else model).language_model
    handles = []

    def before(layer, module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length(layer) if cache is not None else 0
        new = x.shape[1]
        total = past + new
        rows = torch.arange(past, total)[:, None]
        allowed = (torch.arange(total)[None] <= rows)[None].expand(x.shape[0], -1, -1).clone()
        gone = hidden[layer]
        width = min(total, gone.shape[1])
        allowed[:, :, :width] &= ~gone[:, None, :width]
        if attention_mask is not None:
            allowed[:, :, : min(total, attention_mask.shape[1])] &= attention_mask[:, None, :total].bool()
        # a row with nothing to see (padding, dropped) may look at itself, to stay finite
        allowed |= torch.eye(total, dtype=torch.bool)[None, past:total] & ~allowed.any(-1, keepdim=True)
        bias = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
        return args, {**kwargs, "attention_mask": bias}

    for number, layer in enumerate(text.layers):
        handles.append(layer.register_forward_pre_hook(partial(before, number), with_kwargs=True))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def survivors(model, batch: dict) -> torch.Tensor:
    """(B, L) bool: real tokens that stand after the last stage."""
    gone = hidden_columns(model, batch)[-1]
    real = batch.get("attention_mask")
    return ~gone if real is None else ~gone & real.bool()
