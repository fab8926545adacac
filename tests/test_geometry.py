"""Models of published geometry: parameter counts of the real ones, prompts that fit, the same weights each time."""

from __future__ import annotations

import pytest
import torch
import transformers
from PIL import Image

import vtok
from vtok.errors import VtokError
from vtok.geometry import geometries, geometry, inputs_of

from .models import FAMILIES, build

PHOTO = Image.effect_mandelbrot((160, 120), (-2, -1.2, 1, 1.2), 60).convert("RGB")

PARAMETERS = {  # of the checkpoints on the hub; the tiny ones and llava-0.5b are this project's own
    "llava-1.5-7b": 7_063_427_072,
    "llava-next-7b": 7_063_431_168,
    "qwen2_5_vl-7b": 8_292_166_656,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_parameter_count(name: str) -> None:
    model = geometry(name, torch.bfloat16, "meta")
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert model.dtype == torch.bfloat16


def test_the_half_billion_decoder() -> None:
    model = geometry("llava-0.5b", device="meta")
    layers = model.model.language_model.layers
    assert sum(weight.numel() for weight in layers.parameters()) >= 5e8
    assert model.config.vision_config.num_hidden_layers == 24
    assert (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2 == 576


@pytest.mark.parametrize(("name", "tokens"), [("tiny-llava", 576), ("tiny-qwen2_5_vl", 16 * 12)])
def test_tiny_models_run_and_repeat(name: str, tokens: int) -> None:
    state = torch.random.get_rng_state()
    model = geometry(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(weight.numel() for weight in model.parameters()) < 20e6
    picture = PHOTO.resize((448, 336))
    inputs = inputs_of(model, picture, prompt_tokens=7)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
    logits = model(**inputs, logits_to_keep=1).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10
    other = inputs_of(model, picture.transpose(Image.Transpose.ROTATE_180), prompt_tokens=7)
    assert not torch.allclose(model(**other, logits_to_keep=1).logits, logits, atol=1e-2)  # the picture matters
    first, again = model.state_dict(), geometry(name).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(geometry(name, seed=1).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_fit_every_family(family: str) -> None:
    model = build(family, layers=2)
    one = inputs_of(model, PHOTO, prompt_tokens=5)
    three = inputs_of(model, PHOTO, prompt_tokens=5, batch=3)
    assert three["input_ids"].shape == (3, one["input_ids"].shape[1])
    alone, batch = model(**one).logits, model(**three).logits
    assert torch.allclose(batch[2], alone[0], atol=1e-4)
    with vtok.compressed(model, "uniform", keep=0.5):
        model(**three)
        made = vtok.report(model)
    words = one["input_ids"].shape[1] - made.tokens_in
    assert words == 5 if family.startswith("llava") else 7  # Qwen frames a picture with two marks
    assert len(made.kept) == 3


def test_half_precision_and_places() -> None:
    model = geometry("tiny-llava", torch.bfloat16)
    inputs = inputs_of(model, PHOTO, seed=3)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert model(**inputs, logits_to_keep=1).logits.isfinite().all()
    assert not torch.equal(inputs["input_ids"], inputs_of(model, PHOTO, seed=4)["input_ids"])


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(VtokError, match="no geometry 'gpt'; known are tiny-llava"):
        geometry("gpt")
    assert "tiny-qwen2_5_vl" in geometries()
    with pytest.raises(VtokError, match="prompt_tokens=0"):
        inputs_of(build("llava", layers=2), PHOTO, prompt_tokens=0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(VtokError, match="takes no prompt"):
        inputs_of(transformers.CLIPVisionModel(config), PHOTO)
