"""The language model as two graphs: words to embeddings, and embeddings with a cache to the next word's logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtok.api import adapter_of
from vtok.engine.cache import CACHE
from vtok.errors import VtokError
from vtok.export.language.attention import causal_mask, exported_attention

CONSTANT_ROPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose frequencies do not depend on the length of the prompt."""


class PastLayers:
    """The cache that the decoder layers of one call see: what was given, and what they add.

    Parameters
    ----------
    past : sequence of Tensor
        Keys and values in turn, (B, H, P, d) each, two a layer.

    Attributes
    ----------
    present : list of Tensor
        Keys and values in turn, (B, H, P + L, d).
    """

    def __init__(self, past: Sequence[Tensor]) -> None:
        self.past = past
        self.present: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """A layer's new keys and values behind its old ones. Layers come in order."""
        both = torch.cat((self.past[2 * layer], key), dim=2), torch.cat((self.past[2 * layer + 1], value), dim=2)
        self.present.extend(both)
        return both

    def get_seq_length(self, layer: int = 0) -> int:
        """Columns before this call."""
        return self.past[2 * layer].shape[2]


class EmbedTokens(nn.Module):
    """``input_ids`` (B, L) to embeddings (B, L, D)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embed = adapter_of(model).text.embed_tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids)


class Decoder(nn.Module):
    """The decoder layers, the last norm and the head of a vision-language model, around its own modules.

    Hooks of ``vtok.compress`` on the text model are not reached: the layers are called one by one.

    Parameters
    ----------
    model : PreTrainedModel
        A ``...ForConditionalGeneration`` of a supported family.

    Attributes
    ----------
    layers : int
        Decoder layers.
    heads, width : int
        Key heads of a layer, and channels of one.
    axes : int
        Axes of the position ids: 3 (time, height, width) where rotary positions are multimodal, else 1.

    Raises
    ------
    VtokError
        No language model or head, a sliding window, or rotary frequencies that depend on the length.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        text, head = adapter_of(model).text, getattr(model, "lm_head", None)
        if text is None or head is None:
            raise VtokError(
                f"{type(model).__name__} has no language model with a head to export; give the "
                "...ForConditionalGeneration that it belongs to"
            )
        config = text.config
        _check(config)
        self.text, self.head = text, head
        self.layers = len(text.layers)
        self.heads = int(config.num_key_value_heads)
        self.width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.groups = int(config.num_attention_heads) // self.heads
        self.axes = 3 if (config.rope_parameters or {}).get("mrope_section") else 1

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One prefill, or one step.

        Parameters
        ----------
        inputs_embeds : Tensor
            (B, L, D).
        attention_mask : Tensor
            (B, P + L) int64, 0 on padding, of the cache's columns and the new ones.
        position_ids : Tensor
            (B, L) int64, or (3, B, L) where ``axes`` is 3.
        past : list of Tensor
            Keys and values in turn, (B, H, P, d) each; P is 0 in a prefill.

        Returns
        -------
        tuple
            Logits (B, 1, V) of the last column, and keys and values (B, H, P + L, d), in turn.
        """
        text, cache = self.text, PastLayers(past)
        mask = causal_mask(attention_mask, inputs_embeds.shape[1], self.groups, inputs_embeds.dtype)
        hidden = inputs_embeds
        rotary = text.rotary_emb(hidden, position_ids=position_ids)
        with exported_attention(text.config):
            for layer in text.layers:
                hidden = layer(
                    hidden,
                    attention_mask=mask,
                    position_embeddings=rotary,
                    use_cache=True,
                    **{CACHE: cache},
                )
        return self.head(text.norm(hidden[:, -1:])), cache.present


def _check(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in CONSTANT_ROPES:
        raise VtokError(
            f"rotary embeddings of type {rope!r} change with the length of the prompt, which a graph cannot hold; "
            f"set rope_parameters to one of {', '.join(sorted(CONSTANT_ROPES))}"
        )
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if sliding or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)):
        raise VtokError(
            "this language model attends within a sliding window, which counts columns of the cache: with tokens gone "
            "it would reach further back; set sliding_window=None in its text config"
        )
