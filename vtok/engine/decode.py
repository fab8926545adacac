"""Decoding on a compressed cache: every layer continues with the length, mask and positions it was left with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from vtok.engine.cache import cache_of
from vtok.engine.host import on_device
from vtok.engine.prefill import Prefill
from vtok.protocol import Adapter


@dataclass
class Layers:
    """What the layers from ``layer`` on hold of the prompt."""

    layer: int
    mask: Tensor | None
    width: int
    dropped: Tensor


@dataclass
class CacheState:
    """Rides on a cache after a compressed prefill.

    Attributes:
        full: prompt columns of the uncompressed prompt.
        first: what layer 0 holds; ``later``: what the layers after each decoder cut hold.
        reindex: position ids were closed up.
    """

    full: int
    first: Layers
    later: list[Layers]
    reindex: bool

    @classmethod
    def after(cls, prefill: Prefill) -> CacheState:
        held = [
            Layers(
                segment.layer,
                segment.mask,
                segment.width,
                on_device(segment.dropped, segment.device)[:, None],
            )
            for segment in prefill.segments[prefill._first :]
        ]
        return cls(prefill.segments[0].full, held[0], held[1:], prefill.reindex)

    def at(self, layer: int) -> Layers | None:
        """The state of a layer behind a decoder cut, ``None`` for the layers before the first."""
        found = None
        for held in self.later:
            if held.layer <= layer:
                found = held
        return found


@dataclass
class Decode:
    """One decoding step (or a verification step of several tokens)."""

    adapter: Adapter
    state: CacheState
    cache: Any
    tail: Tensor | None
    positions: Tensor | None
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)

    def layer(self, number: int, layers: Any, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Give a layer behind a cut the mask and the positions that fit its own cache."""
        held = self.state.at(number)
        if held is None:
            return hidden
        if held.mask is None and self.tail is None and hidden.shape[1] == 1 and kwargs.get("attention_mask") is None:
            pass
        else:
            if held.layer not in self.masks:
                padding = joined(held, self.tail, hidden, self.cache, number)
                self.masks[held.layer] = create_causal_mask(
                    self.adapter.text.config, hidden, padding, self.cache, layer_idx=number
                )
            kwargs["attention_mask"] = self.masks[held.layer]
        if self.state.reindex and self.positions is not None:
            if held.layer not in self.rotary:
                ids = self.positions + self.state.first.dropped - held.dropped
                self.rotary[held.layer] = self.adapter.text.rotary_emb(hidden, position_ids=ids)
            kwargs["position_embeddings"] = self.rotary[held.layer]
        return hidden


def joined(held: Layers, tail: Tensor | None, hidden: Tensor, cache: Any, layer: int) -> Tensor | None:
    """(B, held + generated + new) mask of a layer's keys; ``None`` when nothing is masked."""
    if held.mask is None and tail is None:
        return None
    batch, new = hidden.shape[:2]
    total = int(cache.get_seq_length(layer)) + new
    mask = held.mask
    if mask is None:
        mask = torch.ones(batch, held.width, dtype=torch.bool, device=hidden.device)
    mask = mask.to(hidden.device)
    rest = total - mask.shape[1]
    if tail is None:
        tail = torch.ones(batch, rest, dtype=torch.bool, device=hidden.device)
    return torch.cat((mask, tail[:, :rest].to(hidden.device).bool()), dim=1).long()


def step(
    adapter: Adapter, state: CacheState, kwargs: dict[str, Any], needs_layers: bool, prompt_length: int | None = None
) -> tuple[dict[str, Any], Decode | None]:
    """Text-model arguments of a decoding step, and the per-layer state where layers differ.

    Args:
        adapter: the family.
        state: rides on the cache.
        kwargs: what the text model was given.
        needs_layers: there are cuts inside the decoder.
        prompt_length: columns of the prompt that ``generate`` was given.
    """
    kwargs = dict(kwargs)
    embeds, cache = kwargs["inputs_embeds"], cache_of(kwargs)
    given = kwargs.get("attention_mask")
    if isinstance(given, Mapping):
        given = given.get("full_attention")
    refed = _refed(state, kwargs, given, prompt_length)
    if refed:
        embeds = kwargs["inputs_embeds"] = embeds[:, refed:]
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][..., refed:]
        if isinstance(given, Tensor) and given.ndim == 4:  # made for the longer input; the text model makes another
            kwargs["attention_mask"] = None
    tail = given[:, state.full :] if isinstance(given, Tensor) and given.ndim == 2 else None
    first = state.first
    if isinstance(given, Tensor) and given.ndim == 2:
        kwargs["attention_mask"] = joined(first, tail, embeds, cache, 0)
    elif first.mask is not None:
        # a prepared 4-D mask was sized for this cache but with the uncompressed prompt's padding; or none was given
        width = given.shape[-1] if isinstance(given, Tensor) else int(cache.get_seq_length()) + embeds.shape[1]
        rest = torch.ones(embeds.shape[0], width - first.width, dtype=torch.bool, device=embeds.device)
        kwargs["attention_mask"] = torch.cat((first.mask.to(embeds.device), rest), dim=1).long()
    positions = kwargs.get("position_ids")
    if positions is None:
        past = cache.get_seq_length() - first.width + state.full
        positions = adapter.decode_positions(past, embeds.shape[0], embeds.shape[1], embeds.device)
        if positions is not None and positions.ndim == 3 and isinstance(given, Tensor) and given.ndim == 2:
            # multimodal positions do not count padding, those of plain models do
            positions = positions - (given == 0).sum(1)[:, None].to(positions.device)
    if positions is not None:
        if state.reindex:
            positions = positions - first.dropped.to(positions.device)
        kwargs["position_ids"] = positions
    if not (needs_layers and state.later):
        return kwargs, None
    return kwargs, Decode(adapter, state, cache, tail, positions)


def _refed(state: CacheState, kwargs: Mapping[str, Any], mask: Any, prompt_length: int | None) -> int:
    """How many of the first tokens the cache has seen. ``generate`` continues a conversation with what lies behind as
    many columns as the cache holds; behind a compressed prompt that repeats as many as were dropped."""
    new = kwargs["inputs_embeds"].shape[1]
    if new == 1 or state.first.width == state.full:
        return 0
    seen = state.full + int(cache_of(kwargs).get_seq_length()) - state.first.width
    if isinstance(mask, Tensor) and mask.ndim == 2:
        whole = mask.shape[1]
    elif prompt_length is not None and seen < prompt_length and new < prompt_length:
        whole = prompt_length
    else:
        return 0
    return max(0, new - (whole - seen))
