"""The masked oracle inside the vision tower, and tokens at their places behind it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import vtok
from vtok.api import session_of

from .conftest import METHODS, PAIRS, site
from .models import FAMILIES, SCENARIOS, Batch, close, inputs, scenarios
from .oracle import recorded


@dataclass(frozen=True)
class Longest(vtok.Method):
    """Keeps the longest features, at one layer of the tower."""

    layer: int = 2
    site = "encoder"

    def score(self, view: vtok.TowerView) -> Tensor:
        return view.per_cell(view.features.norm(dim=-1))


TOWER = ["", *(method for method in METHODS if method == "flowcut")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", TOWER, ids=["longest", *TOWER[1:]])
def test_masked_oracle_of_the_tower(tiny: Any, method: str, family: str) -> None:
    """What the tower makes of the survivors is what the plain one makes with the dropped patches masked as keys."""
    model = tiny(family)
    prompts = SCENARIOS["ragged"]
    if family == "llava_onevision":  # of sizes that it does not resample: there, a token comes from several patches
        prompts = [[2, "image:56x112", 3], [2, "image:56x56", 1, "image:112x56", 3]]
    batch = inputs(family, model, prompts)
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    call = {key: batch[key] for key in names if key in batch}
    vtok.compress(model, method or Longest(), keep=0.5)
    got = model.get_image_features(**call, return_dict=True)
    adapter, media = session_of(model).adapter, got._vtok_state.media
    vtok.restore(model)
    layers = sorted({layer for item in media for layer, _ in item.stages})
    assert layers
    hidden = {layer: hidden_patches(adapter, call, media, layer) for layer in layers}
    handles = []
    for number, block in enumerate(adapter.tower.layers):
        gone = next((hidden[layer] for layer in reversed(layers) if layer <= number), None)
        if gone is not None and adapter.tower.packed:
            handles.append(block.attn.register_forward_hook(partial(attend_packed, gone), with_kwargs=True))
        elif gone is not None:
            handles.append(block.self_attn.register_forward_pre_hook(partial(mask_dense, gone), with_kwargs=True))
    expected = model.get_image_features(**call, return_dict=True)
    for handle in handles:
        handle.remove()
    sizes = [item.medium.length for item in media]
    newline = getattr(model.model, "image_newline", torch.full((64,), torch.nan))
    for number, (a, b) in enumerate(zip(feature_sets(got, sizes), feature_sets(expected, sizes), strict=True)):
        for item, own, plain in zip(media, a, b, strict=True):
            assert 0 < len(item.tokens) < len(own)
            close(own[item.tokens], plain[item.tokens])
            rest = torch.ones(len(own)).index_fill(0, item.tokens, 0).bool()
            if number == 0:  # planes may be taken before the cut
                assert not own[rest & (own != newline).any(-1)].any()


def feature_sets(output: Any, sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """Features by image, and so Qwen3-VL's DeepStack planes."""
    found = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return [
        torch.cat(tuple(part)).split(sizes) if isinstance(part, (list, tuple)) else part.split(sizes) for part in found
    ]


def hidden_patches(adapter: Any, call: dict, media: Any, layer: int) -> Tensor:
    """Patches that were dropped before `layer`: (tiles, N) of a dense tower, (seq,) of a packed one."""
    stands = []
    for item in media:
        own = [kept for at, kept in item.stages if at <= layer]
        stands.append(own[-1] if own else torch.ones(item.medium.length, dtype=torch.bool))
    if adapter.tower.packed:
        raster = ~torch.cat(stands)
        windows = adapter.windows(call["image_grid_thw"])
        return (raster if windows is None else raster[windows[0]]).repeat_interleave(adapter.tower.unit)
    tiles, patches = max(item.medium.tiles.stop for item in media), adapter.tile_length("image")
    flat = torch.arange(tiles * patches, dtype=torch.float64).view(tiles, patches, 1)
    gone = torch.ones(tiles * patches, dtype=torch.bool)
    for stand, index in zip(
        stands, adapter.pack("image", call, [item.medium for item in media], flat, -1.0), strict=True
    ):
        numbers = index[:, 0].round().long()[stand]
        gone[numbers[numbers >= 0]] = False
    return gone.view(tiles, patches)


def mask_dense(gone: Tensor, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    x = args[0] if args else kwargs["hidden_states"]
    bias = torch.zeros(x.shape[:2])
    bias[:, x.shape[1] - gone.shape[1] :].masked_fill_(gone, torch.finfo(x.dtype).min)
    return args[:1], {**kwargs, "attention_mask": bias[:, None, None]}


def attend_packed(gone: Tensor, module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """Attention of a Qwen tower by hand, with masked keys."""
    x = args[0] if args else kwargs["hidden_states"]
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    cos, sin = (part[:, None] for part in kwargs["position_embeddings"])
    q, k = (t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k))
    ends = kwargs["cu_seqlens"].tolist()
    segment = torch.repeat_interleave(torch.arange(len(ends) - 1), torch.tensor(ends).diff())
    visible = (segment[:, None] == segment) & (~gone | torch.eye(len(gone), dtype=torch.bool) & gone)
    logits = torch.einsum("qhd,khd->hqk", q, k) * module.scaling
    rows = logits.masked_fill(~visible, torch.finfo(x.dtype).min).softmax(-1)
    return module.proj(torch.einsum("hqk,khd->qhd", rows, v).flatten(1))


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if site(pair[0]) == "encoder"])
def test_towers_leave_tokens_at_their_places(tiny: Any, method: str, family: str) -> None:
    """With little dropped or merged, a survivor still looks most like the plain model's feature at its own place."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["mixed" if "mixed" in scenarios(family) else "ragged"])
    plain, some = (tower_features(model, batch, method, keep) for keep in (1.0, 0.9))
    vtok.compress(model, method, keep=0.9)
    model(**batch)
    right = total = 0
    for span in session_of(model).last.spans:
        tokens = span.columns if span.encoded.tokens is None else span.columns[span.encoded.tokens]
        nearest = torch.cdist(some[span.sample, tokens], plain[span.sample, span.columns]).argmin(1)
        right += int((span.columns[nearest] == tokens).sum())
        total += len(tokens)
        if span.length > 10 and not session_of(model).decoder_stages:
            assert len(tokens) < span.length
    assert right > 0.9 * total


def tower_features(model: PreTrainedModel, batch: Batch, method: str, keep: float) -> Tensor:
    vtok.compress(model, method, keep=keep)
    with recorded(model) as prompt:
        model(**batch)
    vtok.restore(model)
    return prompt.embeds
