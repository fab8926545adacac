"""Batches of prompts: the same answers as alone, costs of each sample, likelihoods as decoding has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vtok
from vtok_eval.answering import Answerer, Prompt, picture
from vtok_eval.samples import INSTRUCTION

from ..models import FAMILIES, build
from .small import TOKENS, model_and_processor, photo, processor_of

METHODS = {None: {}, "divprune": {"keep": 16}, "flowcut": {"keep": 20}, "fastv": {"keep": 0.7}, "tome": {"keep": 40}}


@pytest.fixture
def answerer() -> Iterator[Answerer]:
    model, processor = model_and_processor()
    yield Answerer(model, processor, "some-model")
    vtok.restore(model)


def ask(answerer: Answerer, text: str, *images: Any) -> Prompt:
    parts = [{"type": "image", "image": image} for image in images]
    return answerer.prompt([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])


def prompts(answerer: Answerer) -> list[Prompt]:
    return [
        ask(answerer, "what is this", photo(1)),
        ask(answerer, "how many dog", photo(2), photo(3, (90, 40))),
        ask(answerer, "what color"),
        ask(answerer, "what color of the object is this", photo(4)),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_answers_as_one_by_one(answerer: Answerer, method: str | None) -> None:
    """Text-only rows, several pictures and padding included; counts belong to their samples."""
    if method:
        vtok.compress(answerer.model, method, **METHODS[method])
    asked = prompts(answerer)
    together = answerer.answer(asked, max_new_tokens=4)
    alone = [answerer.answer([prompt], max_new_tokens=4)[0] for prompt in asked]
    for a, b in zip(together, alone, strict=True):
        assert (a.text, a.new_tokens, a.text_tokens, a.seen) == (b.text, b.new_tokens, b.text_tokens, b.seen)
    assert [len(answer.seen.tokens) for answer in together] == [1, 2, 0, 1]
    assert together[1].seen.tokens == [TOKENS, TOKENS]
    if method == "divprune":
        assert together[0].seen.layers == [[6, 16]] and together[0].seen.average == 16
    if method == "fastv":
        assert together[0].seen.layers[0][1] == TOKENS > together[0].seen.average
    assert all(answer.prefill_ms > 0 for answer in together)


@pytest.mark.parametrize("method", ["divprune", "random_deep"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, method: str) -> None:
    """Pictures of different sizes through the family's own processor, in a batch as alone."""
    model = build(family, layers=6)
    answerer = Answerer(model, processor_of(family, model), "other")
    whole = answerer.answer(prompts(answerer), max_new_tokens=3)
    vtok.compress(model, method, keep=0.75)
    asked = prompts(answerer)
    together = answerer.answer(asked, max_new_tokens=3)
    for prompt, plain, found in zip(asked, whole, together, strict=True):
        alone = answerer.answer([prompt], max_new_tokens=3)[0]
        assert (found.text, found.seen, found.text_tokens) == (alone.text, alone.seen, alone.text_tokens)
        assert found.seen.tokens == plain.seen.tokens and len(found.seen.tokens) == len(prompt.images)
        if prompt.images:
            share = found.seen.average / (sum(found.seen.tokens) / len(prompt.images))
            assert share == pytest.approx(0.75, abs=0.06)
    assert len(answerer.likelihood(asked, [" dog", " red blue", " yes", " cat"])) == 4


def test_answers_end_at_stop_strings(answerer: Answerer) -> None:
    asked = [ask(answerer, "what is this", photo(1))]
    whole = answerer.answer(asked, max_new_tokens=6)[0].text
    stop = whole[len(whole) // 2]
    cut = answerer.answer(asked, max_new_tokens=6, until=[stop])[0].text
    assert cut == whole.split(stop)[0].strip() != whole


def test_sampling_only_with_a_temperature(answerer: Answerer) -> None:
    asked = [ask(answerer, "what is this", photo(1))]
    greedy = answerer.answer(asked, max_new_tokens=4)
    for how in ({"temperature": 0}, {"temperature": 0.7, "do_sample": False}, {"top_p": None, "image_aspect": "pad"}):
        assert answerer.answer(asked, max_new_tokens=4, **how)[0].text == greedy[0].text
    torch.manual_seed(0)
    drawn = {answerer.answer(asked, max_new_tokens=4, temperature=50.0, do_sample=True)[0].text for _ in range(3)}
    assert len(drawn) > 1


def test_sums_and_memory() -> None:
    model, processor = model_and_processor()
    answerer = Answerer(model, processor, memory=True)
    answerer.answer([ask(answerer, "what color")], max_new_tokens=2)
    assert answerer.peak_mb is None and answerer.seconds > 0 and answerer.new_tokens == 2
    answerer.answer([ask(answerer, "what color", photo())], max_new_tokens=2)
    assert answerer.peak_mb is not None and answerer.peak_mb > 0


@pytest.mark.parametrize("name", ["nano-x", "some-model"])
def test_the_instruction_is_taken_off_for_models_trained_without_it(name: str) -> None:
    model, processor = model_and_processor()
    answerer = Answerer(model, processor, name)
    plain, with_it = (ask(answerer, text, photo()).text for text in ("how many", f"how many\n{INSTRUCTION}"))
    assert (plain == with_it) is name.startswith("nano-")


@pytest.mark.parametrize("method", METHODS)
def test_likelihoods_are_those_of_decoding(answerer: Answerer, method: str | None) -> None:
    """What is kept depends on the prompt alone, so a continuation scores as its tokens do in a hand-made loop."""
    if method:
        vtok.compress(answerer.model, method, **METHODS[method])
    asked = prompts(answerer)
    wanted = [" dog", " red blue", " yes", " a cat"]
    together = answerer.likelihood(asked, wanted)
    tokenizer = answerer.prompts.processor.tokenizer
    for prompt, text, (mean, greedy) in zip(asked, wanted, together, strict=True):
        inputs = answerer.prompts.inputs([prompt.text], [prompt.images])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        out = answerer.model(**inputs, use_cache=True)
        total, best = 0.0, True
        for token in ids:
            logs = out.logits[0, -1].float().log_softmax(-1)
            total += logs[token].item()
            best &= logs.argmax().item() == token
            mask = torch.ones(1, inputs["attention_mask"].shape[1] + 1, dtype=torch.long)
            inputs["attention_mask"] = mask
            out = answerer.model(
                input_ids=torch.tensor([[token]]), attention_mask=mask, past_key_values=out.past_key_values
            )
        assert mean == pytest.approx(total / len(ids), abs=1e-4)
        assert greedy is best


def test_the_greedy_answer_is_greedy(answerer: Answerer) -> None:
    vtok.compress(answerer.model, "divprune", keep=16)
    prompt = ask(answerer, "what is this", photo(1))
    inputs = answerer.prompts.inputs([prompt.text], [prompt.images])
    first = answerer.model(**inputs).logits[0, -1].argmax()
    word = answerer.prompts.processor.tokenizer.decode(first)
    assert answerer.likelihood([prompt], [f" {word}"])[0][1] or "#" in word


def test_a_continuation_needs_tokens(answerer: Answerer) -> None:
    with pytest.raises(vtok.VtokError, match="has no tokens"):
        answerer.likelihood([ask(answerer, "what", photo())], [" "])


def test_pictures(tmp_path: Any) -> None:
    photo().save(tmp_path / "a.png")
    assert picture(str(tmp_path / "a.png")).size == picture(f"file://{tmp_path}/a.png").size == (70, 60)
    with pytest.raises(vtok.VtokError, match="there is no file"):
        picture(str(tmp_path / "b.png"))
    with pytest.raises(vtok.VtokError, match="is no picture"):
        picture(b"bytes")


def test_other_media_are_refused(answerer: Answerer) -> None:
    with pytest.raises(vtok.VtokError, match="holds video"):
        answerer.prompt([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])


def test_without_a_chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = model_and_processor()
    monkeypatch.setattr(processor, "chat_template", None)
    assert ask(Answerer(model, processor), "what", photo()).text == "<image>\nwhat"


def test_no_prompts(answerer: Answerer) -> None:
    assert answerer.answer([]) == [] and answerer.likelihood([], []) == []
