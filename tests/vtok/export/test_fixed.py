"""What is fixed of an exported model, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

import vtok
from vtok.errors import VtokError
from vtok.export.fixed import Budget, FixedPlan, only_picture
from vtok.export.vision import vision_graph

from ...models import build, inputs

PLAN = FixedPlan(
    family="llava_next",
    method="divprune",
    keep=0.3,
    tokens_in=268,
    kept=80,
    width=64,
    positions="reindex",
    layout={"image_size": (56, 56), "image_sizes": (84, 112)},
    pixel_shape=(5, 3, 56, 56),
    left_out=("a sentence",),
)


def session(family: str, method: Any, **options: Any) -> Any:
    model = vtok.compress(build(family), method, **{"keep": 0.5, **options})
    return vtok.api.session_of(model)


def test_a_plan_is_json() -> None:
    record = json.loads(json.dumps(PLAN.to_json()))
    assert FixedPlan.from_json(record) == PLAN
    del record["left_out"]
    assert FixedPlan.from_json(record).left_out == ()


@pytest.mark.parametrize("change", [{"width": None}, {"unknown": 1}])
def test_a_damaged_plan_is_told(change: dict[str, Any]) -> None:
    record = {**PLAN.to_json(), **change}
    if change.get("width", 0) is None:
        del record["width"]
    with pytest.raises(VtokError, match="export the model again"):
        FixedPlan.from_json(record)


@pytest.mark.parametrize(
    ("family", "method", "options", "reason"),
    [
        ("llava_onevision", "divprune", {}, "export this model as a Hugging Face folder"),
        ("llava", "fastv", {"keep": 0.9}, "take a method that acts before it"),
        ("llava", "todre", {"decision": 0.5}, "as todre with decision=None does"),
        ("llava_next", "flowcut", {}, "as flowcut with llm_layer=None does"),
        ("llava", ["divprune", "fastv"], {"keep": 0.3}, "fastv drops tokens inside the decoder"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused(family: str, method: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(VtokError, match=reason):
        Budget(session(family, method, **options))


def test_fixed_leaves_the_decoder_out() -> None:
    own = session("llava_next", "flowcut")
    assert own.counts(268).entry > 134 == Budget(own, fixed=True).counts(268).entry
    (sentence,) = Budget(own, fixed=True).left_out
    assert "flowcut does not act before decoder layer 2" in sentence
    with pytest.raises(VtokError, match="fastv drops tokens inside the decoder"):
        Budget(session("llava", "fastv", keep=0.9), fixed=True)


def test_a_chain_splits_its_budget_as_the_model_does() -> None:
    own = session("llava", ["visionzip", "divprune"], keep=16)
    budget = Budget(own)
    assert budget.tower_count(64) == own.tower_count(64) == 32 and budget.input_counts(64) == [16]


def test_an_example_is_one_picture() -> None:
    own = session("qwen2_5_vl", "divprune")
    batch = inputs("qwen2_5_vl", own.model, [[5, "image:84x56", 7]])
    assert only_picture(own, batch).length == 24
    with pytest.raises(VtokError, match="2 pictures"):
        only_picture(own, inputs("qwen2_5_vl", own.model, [[5, "image", "image", 7]]))
    with pytest.raises(VtokError, match="video"):
        only_picture(own, inputs("qwen2_5_vl", own.model, [[5, "video", 7]]))
    with pytest.raises(VtokError, match="no pixel_values"):
        only_picture(own, {"image_grid_thw": batch["image_grid_thw"]})


def test_a_plain_model_is_told_to_be_compressed() -> None:
    model = build("llava")
    with pytest.raises(VtokError, match="not compressed"):
        vision_graph(model, inputs("llava", model, [[5, "image", 7]]))
