"""nano-llava and nano-qwen: stock classes, a tokenizer that can say anything, and what training makes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vtok
from vtok.errors import VtokError
from vtok.geometry import randomize
from vtok_eval import models, scenes
from vtok_eval.models import nano, overview
from vtok_eval.models.about import ABOUT
from vtok_eval.models.card import card, command
from vtok_eval.train.data import Batch, Scenes, Turn
from vtok_eval.train.language import Talk
from vtok_eval.train.nano import RECIPES, idle_layers, save, some_layers

PICTURES = [Image.effect_noise(size, 90).convert("RGB") for size in ((448, 336), (336, 336))]
QUESTIONS = [("what object is in the picture?", "dog"), ("read the word.", "zuq42"), ("where is the cat?", "top left")]


@pytest.fixture(scope="module", params=nano.NANO)
def made(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    model, processor = nano.blank(request.param, scenes.words())
    randomize(model, 0)
    return request.param, model, processor


def prompt(processor: Any, pictures: int, question: str) -> str:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_every_word_of_the_scenes_is_one_token() -> None:
    text = nano.tokenizer(scenes.words())
    for word in scenes.words():
        assert len(text(word, add_special_tokens=False).input_ids) == 1, word


def test_anything_else_is_spelt() -> None:
    text = nano.tokenizer(scenes.words())
    ids = text("Zuq42 !", add_special_tokens=False).input_ids
    assert text.decode(ids) == "zuq42 !"
    assert text.unk_token_id not in ids
    assert len(ids) == 6


def test_a_saved_model_loads_plainly(made: tuple[str, Any, Any], tmp_path: Path) -> None:
    name, model, processor = made
    save(model, processor, tmp_path, torch.float32)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    again: Any = transformers.AutoProcessor.from_pretrained(tmp_path)
    inputs = [
        p(images=PICTURES[:1], text=[prompt(p, 1, QUESTIONS[0][0])], return_tensors="pt") for p in (processor, again)
    ]
    assert inputs[0].keys() == inputs[1].keys()
    assert all(torch.equal(inputs[0][key], inputs[1][key]) for key in inputs[0])
    with torch.no_grad():
        assert torch.equal(model(**inputs[0]).logits, loaded(**inputs[1]).logits)
    tokens = int((inputs[0]["input_ids"] == model.config.image_token_id).sum())
    assert tokens == 576 if name == "nano-llava" else 324 <= tokens <= 361


@pytest.mark.parametrize("pictures", [1, 2])
def test_many_questions_in_a_row_cost_what_each_costs_alone(made: tuple[str, Any, Any], pictures: int) -> None:
    name, model, processor = made
    ids = lambda text: processor.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    images = dict(processor.image_processor(images=PICTURES[:pictures], return_tensors="pt"))
    grids = [(24, 24)] * pictures
    if name == "nano-qwen":
        grids = [(height // 2, width // 2) for _, height, width in images["image_grid_thw"].tolist()]
    turns = [Turn("any", ids(question), ids(answer)) for question, answer in QUESTIONS]
    with torch.no_grad():
        found, _ = Talk(name, model, processor).step(Batch(images, [grids], [], [turns]))
        wanted = [alone(model, processor, pictures, question, ids(answer)) for question, answer in QUESTIONS]
    torch.testing.assert_close(found, torch.stack(wanted).mean(), atol=1e-4, rtol=1e-4)


def alone(model: Any, processor: Any, pictures: int, question: str, answer: list[int]) -> Tensor:
    """The loss of one answer behind the prompt that the processor makes."""
    inputs = processor(images=PICTURES[:pictures], text=[prompt(processor, pictures, question)], return_tensors="pt")
    said = torch.tensor([[*answer, processor.tokenizer.eos_token_id]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], said], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(said)], 1)
    logits = model(**inputs).logits[0, -said.shape[1] - 1 : -1].float()
    return F.cross_entropy(logits, said[0])


def test_pooled_tokens_stand_where_their_first_ones_stood(made: tuple[str, Any, Any]) -> None:
    name, model, processor = made
    rows = [Talk(name, model, processor, pool=pool)._row([(4, 6)], []) for pool in (1, 2)]
    places = [
        [p for i, p in zip(row["ids"], row["positions"], strict=True) if i == model.config.image_token_id]
        for row in rows
    ]
    assert len(places[0]) == 24 and len(places[1]) == 6
    assert all(place in places[0] for place in places[1])
    # text goes on at the same place
    assert rows[0]["positions"][-1] == rows[1]["positions"][-1] or name == "nano-llava"


@pytest.mark.parametrize("name", nano.NANO)
def test_every_recipe_names_real_stages(name: str) -> None:
    assert next(iter(RECIPES[name])) == "tower"
    for own in RECIPES[name].values():
        assert own["steps"] > 0 and 0 < own["rate"] < 0.1


def test_idle_layers_join_without_a_change() -> None:
    """What four of twelve layers compute is what all twelve compute at first, and not once the others say something."""
    model, _ = nano.blank("nano-llava", scenes.words())
    language = model.model.language_model
    inputs = torch.randn(1, 5, 160, generator=torch.Generator().manual_seed(0))
    idle_layers(language, 4)
    with some_layers(language, 4):
        assert len(language.layers) == language.config.num_hidden_layers == 4
        few = language(inputs_embeds=inputs, use_cache=False).last_hidden_state
    assert len(language.layers) == language.config.num_hidden_layers == 12
    torch.testing.assert_close(language(inputs_embeds=inputs, use_cache=False).last_hidden_state, few)
    language.layers[0].mlp.down_proj.weight.data.fill_(0.1)
    assert not torch.allclose(language(inputs_embeds=inputs, use_cache=False).last_hidden_state, few)


def test_the_fold_changes_nothing() -> None:
    model, processor = nano.blank("nano-llava", scenes.words())
    talk = Talk("nano-llava", model, processor)
    batch = Scenes("nano-llava", processor, 1, 1, "fold")[0]
    talk.measure(batch)
    assert not torch.equal(talk.spread, torch.ones_like(talk.spread))
    before = talk.features(batch.images)[0]
    talk.fold()
    assert torch.equal(talk.spread, torch.ones_like(talk.spread))
    torch.testing.assert_close(talk.features(batch.images)[0], before, atol=1e-4, rtol=1e-3)


def test_unknown_models_are_named() -> None:
    with pytest.raises(vtok.VtokError, match="nano-llava"):
        models.folder("nano-lava")


@pytest.mark.parametrize("name", ABOUT)
def test_a_card_is_what_its_results_give(name: str, tmp_path: Path) -> None:
    """No number in it was written by hand, and none is older than the results beside it."""
    own = Path(__file__).parents[2] / "model_cards" / name
    (tmp_path / name).mkdir()
    for part in ("training.jsonl", "training.md", "photographs.md"):
        if (own / part).is_file():
            shutil.copy(own / part, tmp_path / name)
    measured = (own / "results.json").is_file()
    assert measured or name not in nano.NANO
    command(name, results=own if measured else None, out=tmp_path)
    for part in ("README.md", "tables.md", "results.json")[: 3 if measured else 1]:
        assert (tmp_path / name / part).read_text() == (own / part).read_text()


def test_the_readme_says_what_the_cards_say(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "README.md").write_text((root / "README.md").read_text())
    overview.command(tmp_path / "README.md", cards=root / "model_cards")
    assert (tmp_path / "README.md").read_text() == (root / "README.md").read_text()
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(VtokError, match="has no place for the table"):
        overview.command(tmp_path / "README.md", cards=root / "model_cards")


def test_cards_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(VtokError, match="there is no card for 'other'"):
        command("other", results=tmp_path, out=tmp_path)
    results = {"model": {"name": "other"}, "entries": []}
    with pytest.raises(VtokError, match="a card of nano-qwen needs results of vtok eval --model nano-qwen"):
        card("nano-qwen", results, [], "")
