"""The language side as graphs: the same logits as the model's, with and without a cache, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.models import FIRST_TEXT, VOCAB, build
from vtok import VtokError
from vtok.export.language import Decoder, EmbedTokens
from vtok.export.language.attention import MASKED, causal_mask
from vtok.export.runtime.pt2 import module_of
from vtok.export.trace import trace_decoder, trace_embed

FAMILIES = ("llava", "llava_next", "qwen2_5_vl")


def test_mask_lets_a_row_look_back_and_not_at_padding():
    mask = causal_mask(torch.tensor([[0, 1, 1, 1]]), 2, 1, torch.float32)
    seen = [[False, True, True, False], [False, True, True, True]]
    assert torch.equal(mask[0, 0] == 0, torch.tensor(seen))
    assert mask.min() == MASKED


def test_mask_repeats_for_the_query_heads_of_a_group():
    mask = causal_mask(torch.ones(2, 5), 3, 2, torch.float32)
    assert mask.shape == (2, 1, 6, 5)
    assert torch.equal(mask[:, :, :3], mask[:, :, 3:])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_steps_give_the_models_logits(family, tiny):
    model = tiny(family)
    ids = torch.randint(FIRST_TEXT, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    expected = model(input_ids=ids, attention_mask=mask, position_ids=_positions(mask, 1)).logits
    decoder, embed = Decoder(model), EmbedTokens(model)
    positions = _positions(mask, decoder.axes)
    past = [torch.zeros(2, decoder.heads, 0, decoder.width)] * (2 * decoder.layers)
    for start, end in ((0, 4), (4, 6), (6, 7)):
        logits, past = decoder(embed(ids[:, start:end]), mask[:, :end], positions[..., start:end], past)
        torch.testing.assert_close(logits[:, 0], expected[:, end - 1], atol=1e-5, rtol=1e-5)
    assert past[0].shape == (2, decoder.heads, 7, decoder.width)


def test_the_model_is_left_as_it_was(tiny):
    model = tiny("llava")
    before = model.model.language_model.config._attn_implementation
    decoder = Decoder(model)
    past = [torch.zeros(1, decoder.heads, 0, decoder.width)] * (2 * decoder.layers)
    decoder(torch.zeros(1, 3, 64), torch.ones(1, 3), torch.arange(3)[None], past)
    assert model.model.language_model.config._attn_implementation == before


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_programs_take_any_batch_length_and_cache(family):
    model = build(family, layers=1, vision_layers=1)
    program, decoder = trace_decoder(model), Decoder(model)
    assert program.inputs[:4] == ("inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key")
    assert program.outputs == ("logits", "present.0.key", "present.0.value")
    run = module_of(program.exported)
    for batch, length, past in ((1, 6, 0), (1, 1, 6), (3, 1, 1), (2, 5, 3)):
        draw = torch.Generator().manual_seed(batch)
        mask = torch.ones(batch, past + length, dtype=torch.long)
        given = (
            torch.randn(batch, length, 64, generator=draw),
            mask,
            _positions(mask, decoder.axes)[..., past:].contiguous(),
            [torch.randn(batch, decoder.heads, past, decoder.width, generator=draw) for _ in range(2)],
        )
        for found, expected in zip(run(*given)[1], decoder(*given)[1], strict=True):
            torch.testing.assert_close(found, expected)


def test_embeddings_are_the_models():
    model = build("llava", layers=1, vision_layers=1)
    ids = torch.tensor([[11, 12, 13]])
    run = trace_embed(model).exported.module()
    assert torch.equal(run(ids), model.get_input_embeddings()(ids))


def test_what_no_graph_can_hold_is_refused(tiny):
    model = copy.deepcopy(tiny("llava"))
    with pytest.raises(VtokError, match="fp32 weights on the CPU"):
        trace_decoder(copy.deepcopy(model).half())
    config = model.model.language_model.config
    config.rope_parameters = {**config.rope_parameters, "rope_type": "dynamic"}
    with pytest.raises(VtokError, match="change with the length"):
        Decoder(model)
    model = copy.deepcopy(tiny("llava_next"))
    model.model.language_model.config.sliding_window = 8
    with pytest.raises(VtokError, match="sliding_window=None"):
        Decoder(model)
    with pytest.raises(VtokError, match="no language model with a head"):
        Decoder(model.model)


def _positions(mask: torch.Tensor, axes: int) -> torch.Tensor:
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return positions if axes == 1 else positions.expand(axes, *mask.shape)
