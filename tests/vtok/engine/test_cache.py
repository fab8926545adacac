"""The KV cache is found under every name that transformers has had for it."""

from __future__ import annotations

import pytest
from transformers import DynamicCache

import vtok
from tests.models import SCENARIOS, build, inputs
from vtok.engine.cache import cache_in, cache_of


@pytest.mark.parametrize("name", ["past_key_values", "cache", "memory"])
def test_a_cache_is_found_by_any_name(name: str) -> None:
    cache = DynamicCache()
    assert cache_of({"use_cache": True, name: cache}) is cache
    assert cache_of({"use_cache": True, name: None}) is None


def test_a_generated_token_does_not_pass_for_a_prompt() -> None:
    """A decoding step whose cache went unseen would count as a prefill without pictures."""
    model = build("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    prefill = vtok.compress(model, "divprune", keep=3)(**batch, use_cache=True)
    kept = vtok.report(model).kept
    assert cache_in(prefill).get_seq_length() < batch["input_ids"].shape[1]
    vtok.compress(model, "divprune", keep=3).generate(**batch, max_new_tokens=3, do_sample=False)
    assert [[len(own) for own in row] for row in vtok.report(model).kept] == [[len(own) for own in row] for row in kept]
    assert any(len(own) for row in kept for own in row)
