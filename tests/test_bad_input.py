"""Bad input gets one clear sentence (what, why, what to do) and leaves the model as it was."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

import vtok
from vtok.api import session_of

from .conftest import anatomy
from .models import FAMILIES, QWEN, SCENARIOS, build, inputs, single


def one_sentence(error: BaseException) -> str:
    """The message, after checking that it reads like one: no line break, nothing from inside Python."""
    message = str(error)
    assert isinstance(error, vtok.VtokError)
    assert "\n" not in message
    assert 30 < len(message) < 420
    assert not re.search(r"__init__|NoneType|object at 0x|positional argument", message)
    assert not message.endswith(".")
    return message


BAD: list[tuple[Any, dict[str, Any], str]] = [
    # budgets
    ("divprune", {}, r"divprune needs a budget.*keep=64.*keep=0\.25"),
    ("divprune", {"keep": None}, r"needs a budget.*pass keep"),
    ("divprune", {"keep": 0}, r"keep=0 would leave no visual token.*at least 1"),
    ("divprune", {"keep": -3}, r"keep=-3 would leave no visual token.*at least 1"),
    ("divprune", {"keep": 0.0}, r"keep=0\.0 is not a share.*give an int"),
    ("divprune", {"keep": 1.7}, r"keep=1\.7 is not a share.*give an int"),
    ("divprune", {"keep": float("nan")}, r"keep=nan is not a share.*give an int"),
    ("divprune", {"keep": True}, r"keep=True is not a budget.*give an int"),
    ("divprune", {"keep": "64"}, r"keep='64' is not a budget.*give an int"),
    ("divprune", {"keep": [64]}, r"keep=\[64\] is not a budget.*give an int"),
    (
        "random_deep",
        {"keep": 0.3},
        r"random_deep first cuts before decoder layer 4 of 6.*cannot go below.*ask for keep>=.*\"divprune\"",
    ),
    ("random_deep", {"keep": 20}, r"random_deep first cuts.*64 visual tokens.*ask for keep>=43"),
    (["random_deep", "fastv"], {"keep": 0.1}, r"first cuts before decoder layer 2 of 6.*ask for keep>="),
    # methods
    ("flowcutt", {"keep": 64}, r"no method 'flowcutt'.*known are.*flowcut"),
    ("", {"keep": 64}, r"no method ''.*known are"),
    (None, {"keep": 64}, r"None is no method; give a name"),
    (5, {"keep": 64}, r"5 is no method; give a name"),
    ([], {"keep": 64}, r"\[\] is no method; give a name"),
    (["divprune", 5], {"keep": 64}, r"5 is no method; give a name"),
    (["divprune", "nope"], {"keep": 64}, r"no method 'nope'.*known are"),
    # options
    ("divprune", {"keep": 64, "ratio": 0.5}, r"divprune has no option 'ratio'; its options are"),
    ("uniform", {"keep": 64, "ratio": 0.5}, r"uniform has no option 'ratio'; its options are: none"),
    (
        ["divprune", "random_deep"],
        {"keep": 64, "layer": 20},
        r"options layer beside a list.*ambiguous.*give them to one method",
    ),
    (vtok.get("fastv"), {"keep": 64, "ratio": 0.5}, r"fastv.*no option 'ratio'.*options are: k, query"),
    ("fastv", {"keep": 64, "k": 0}, r"fastv.*layer 0.*between 1 and 5"),
    ("fastv", {"keep": 64, "k": 32}, r"fastv.*layer 32.*layers 0 to 5.*between 1 and 5"),
    ("fastv", {"keep": 64, "query": "first"}, r"fastv query='first' is unknown.*\"last\".*\"instruction\""),
    ("todre", {"keep": 64, "pivot": "corner"}, r"todre pivot='corner' is unknown.*\"cls\""),
    ("todre", {"keep": 64, "objective": "max"}, r"todre objective='max' is unknown.*\"sum\""),
    ("transprune", {"keep": 64, "ratios": (0.5,)}, r"transprune has 3 cuts.*1 ratios; give as many"),
    ("transprune", {"keep": 64, "accumulate": ()}, r"transprune needs layers to watch.*give one at least"),
    ("flowcut", {"keep": 64, "every": 0}, r"flowcut every=0.*give at least 1"),
    ("fastv", {"keep": 64, "k": 2.5}, r"fastv takes int as k, not 2\.5; its default is 2"),
    ("random", {"keep": 64, "seed": "a"}, r"random takes int as seed, not 'a'; its default is 0"),
    ("divprune", {"keep": 64, "compat": 1}, r"divprune takes bool as compat, not 1; its default is False"),
    ("tome", {"keep": 64, "layers": 3}, r"tome takes tuple or None as layers, not 3; its default is None"),
    ("tome", {"keep": 64, "layers": (99,)}, r"tome would act at encoder layer 99.*from 0 to 2; give it other layers"),
    (
        "todre",
        {"keep": 64, "decision": -1.0},
        r"todre would act at decoder layer -5.*from 1 to 5; give it other layers",
    ),
    ("random_deep", {"keep": 64, "share": 1.5}, r"random_deep would leave 1\.5 of the tokens.*give it one in \[0, 1\]"),
    # presets and positions
    ("fastv", {"preset": "K9R1"}, r"no preset 'K9R1'.*known are: K2R50"),
    ("uniform", {"preset": "64"}, r"no preset '64'.*known are: none"),
    (
        "divprune",
        {"keep": 64, "positions": "close"},
        r"positions='close' is unknown.*\"auto\", \"keep\" or \"reindex\"",
    ),
]


@pytest.mark.parametrize(("method", "options", "message"), BAD, ids=[f"{m}-{o}"[:60] for m, o, _ in BAD])
def test_one_clear_sentence(tiny: Any, method: Any, options: dict[str, Any], message: str) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    plain = model(**batch).logits
    before = anatomy(model)
    with pytest.raises(vtok.VtokError) as caught:
        vtok.compress(model, method, **options)
    assert re.search(message, one_sentence(caught.value))
    assert anatomy(model) == before
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize(
    ("method", "options"), [("divprune", {"keep": 0}), ("nope", {"keep": 1}), ("fastv", {"keep": 0.5, "k": 99})]
)
def test_a_bad_second_call_leaves_the_first(tiny: Any, method: str, options: dict[str, Any]) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    vtok.compress(model, "divprune", keep=16)
    expected = model(**batch).logits
    before = anatomy(model)
    with pytest.raises(vtok.VtokError):
        vtok.compress(model, method, **options)
    assert anatomy(model) == before
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(vtok.VtokError), vtok.compressed(model, method, **options):
        pass
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("keep", [0, -3, 1.7, True, "64", None])
def test_bad_budget_for_some_calls(tiny: Any, keep: Any) -> None:
    model = vtok.compress(tiny("llava"), "divprune", keep=16)
    with pytest.raises(vtok.VtokError) as caught, vtok.budget(model, keep):
        pass
    assert "keep=" in one_sentence(caught.value)
    assert session_of(model).keep == 16


def test_too_small_a_budget_for_some_calls(tiny: Any) -> None:
    model = vtok.compress(tiny("llava"), "random_deep", keep=0.8)
    with pytest.raises(vtok.VtokError, match="cannot go below"), vtok.budget(model, 0.1):
        model(**inputs("llava", model, SCENARIOS["one"]))
    assert session_of(model).keep == 0.8
    model(**inputs("llava", model, SCENARIOS["one"]))


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_too_small_a_budget_shows_with_the_picture(tiny: Any, family: str) -> None:
    """Where pictures differ in size, a count can be too small for one and not for another."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    vtok.compress(model, "random_deep", keep=3)
    with pytest.raises(vtok.VtokError) as caught:
        model(**batch)
    least = int(re.search(r"ask for keep>=(\d+)", one_sentence(caught.value)).group(1))  # type: ignore[union-attr]
    with vtok.budget(model, least):
        model(**batch)
    assert vtok.report(model).average_tokens <= least + 0.5


# models


def test_unknown_models(tiny: Any) -> None:
    for model in (nn.Linear(2, 2), tiny("llava").lm_head, "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(vtok.VtokError) as caught:
            vtok.compress(model, "divprune", keep=64)
        assert re.search(
            r"belongs to no family vtok knows.*llava.*qwen2_vl.*pass the model itself", one_sentence(caught.value)
        )


@pytest.mark.parametrize("method", ["divprune", "fastv", "visionzip"])
def test_methods_that_a_bare_tower_cannot_serve(method: str) -> None:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    model = CLIPVisionModel(config).eval()
    model(torch.randn(1, 3, 28, 28))
    before = anatomy(model)
    with pytest.raises(vtok.VtokError) as caught:
        vtok.compress(model, method, keep=0.5)
    message = one_sentence(caught.value)
    assert re.search(rf"{method} cannot serve hf_vit: .*methods that can: .*tome", message)
    assert method not in message.split("methods that can")[1]
    assert anatomy(model) == before


def test_a_method_that_refuses_a_family(tiny: Any) -> None:
    @dataclass(frozen=True)
    class Picky(vtok.Method):
        refusals = {"llava": "it needs tiles, and LLaVA-1.5 has one picture"}  # noqa: RUF012

        def score(self, view: vtok.View) -> Tensor:
            return view.features.norm(dim=-1)

    with pytest.raises(
        vtok.VtokError, match=r"Picky cannot serve llava: it needs tiles.*methods that can: .*divprune"
    ) as caught:
        vtok.compress(tiny("llava"), Picky(), keep=8)
    one_sentence(caught.value)
    assert vtok.compress(tiny("llava_next"), Picky(), keep=8) is tiny("llava_next")


def test_flow_needs_more_than_one_block() -> None:
    model = build("llava", layers=2, vision_layers=2)  # the features are those behind the first of two
    with pytest.raises(vtok.VtokError, match="single block") as caught:
        vtok.compress(model, "flowcut", keep=4)
    one_sentence(caught.value)


def test_sliding_windows_are_refused() -> None:
    model = build("llava_next", layers=2)
    model.model.language_model.config.sliding_window = 4096
    with pytest.raises(vtok.VtokError) as caught:
        vtok.compress(model, "divprune", keep=8)
    assert re.search(r"sliding-window attention \(window 4096\).*set sliding_window=None", one_sentence(caught.value))


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("method", ["divprune", "random_deep"])
def test_qwen_keeps_positions(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    model(**inputs(family, model, SCENARIOS["one"]))
    before = anatomy(model)
    with pytest.raises(vtok.VtokError) as caught:
        vtok.compress(model, method, keep=0.8, positions="reindex")
    assert re.search(
        rf"positions='reindex'.*{family}.*rotary positions.*positions=\"keep\"", one_sentence(caught.value)
    )
    assert anatomy(model) == before


def test_a_hook_that_finds_nothing_raises(tiny: Any) -> None:
    """A layer without the projections that a method reads: an error at once, not a method that does nothing."""
    model = copy.deepcopy(tiny("llava"))
    attention = model.model.language_model.layers[1].self_attn
    attention.query = attention.q_proj
    del attention.q_proj
    before = anatomy(model)
    with pytest.raises(vtok.VtokError, match=r"LlamaAttention has no q_proj to read attention from"):
        vtok.compress(model, "fastv", keep=0.5)
    assert anatomy(model) == before
    vtok.compress(model, "divprune", keep=0.5)  # reads nothing there
    after = anatomy(model)
    with pytest.raises(vtok.VtokError, match="q_proj"):
        vtok.compress(model, "fastv", keep=0.5)
    assert anatomy(model).keys() == after.keys()
    assert session_of(model).name == "divprune"


# calls


@pytest.mark.parametrize("call", [vtok.report, lambda model: vtok.budget(model, 8).__enter__()])
def test_calls_on_a_plain_model(tiny: Any, call: Any) -> None:
    with pytest.raises(vtok.VtokError) as caught:
        call(tiny("llava"))
    assert re.search(r"this model is not compressed; call vtok\.compress", one_sentence(caught.value))


def test_report_before_anything_ran(tiny: Any) -> None:
    model = vtok.compress(tiny("llava"), "divprune", keep=8)
    with pytest.raises(vtok.VtokError, match=r"nothing has run.*run a forward or generate first"):
        vtok.report(model)


def test_unknown_family() -> None:
    with pytest.raises(vtok.VtokError, match=r"no family 'gpt'; known are .*llava"):
        vtok.methods("gpt")


@pytest.mark.parametrize("family", FAMILIES)
def test_features_from_before_compress(tiny: Any, family: str) -> None:
    """Features that were encoded by the plain model do not say what the tower kept."""
    model = tiny(family)
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers takes no features")
    batch = inputs(family, model, SCENARIOS["one"])
    names = {"pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"}
    encode = {key: batch[key] for key in names & batch.keys()}
    rest = {
        key: value for key, value in batch.items() if key not in ("pixel_values", "image_sizes", "batch_num_images")
    }
    features = model.get_image_features(**encode, return_dict=True)
    vtok.compress(model, "divprune", keep=0.5)
    with pytest.raises(vtok.VtokError) as caught:
        model(**rest, mm_encoder_outputs={"image": features})
    assert re.search(r"image features.*from before vtok\.compress.*get_image_features", one_sentence(caught.value))
    expected = model(**batch).logits
    features = model.get_image_features(**encode, return_dict=True)
    assert torch.equal(model(**rest, mm_encoder_outputs={"image": features}).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_placeholders_without_pictures(tiny: Any, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, "divprune", keep=0.5)
    expected = model(**batch).logits
    words = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(vtok.VtokError) as caught:
        model(**words)
    assert re.search(r"placeholders but no image features.*whole prompt", one_sentence(caught.value))
    crossed = {**single(batch, 0), **words}
    with pytest.raises((vtok.VtokError, ValueError)):
        model(**crossed)  # more placeholders than pictures
    assert torch.equal(model(**batch).logits, expected)
