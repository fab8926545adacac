"""Saving and loading: the same weights, the same settings, the same answers; damaged folders say what is wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vtok
from vtok.api import session_of
from vtok.errors import VtokError
from vtok.io import CONFIG, is_folder
from vtok.method import _REGISTRY, Method
from vtok.view import View

from .models import FAMILIES, QWEN, inputs


@dataclass(frozen=True)
class EveryNth(Method):
    """A method with options that JSON has no word for."""

    steps: tuple[tuple[int, ...], ...] = ((2,),)
    label: str | None = None

    def select(self, view: View, count: int) -> Tensor:
        return torch.arange(count).expand(view.features.shape[0], -1)


@pytest.fixture
def custom() -> Iterator[None]:
    """``EveryNth`` by name, for one test: others count the methods there are."""
    vtok.register("every_nth")(EveryNth)
    yield
    _REGISTRY.pop("every_nth", None)


def outcome(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    logits = model(**batch).logits
    made = vtok.report(model).as_dict()
    del made["seconds"]
    return logits, made


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_gives_equal_logits_and_report(family: str, tiny: Any, tmp_path: Path) -> None:
    model = vtok.compress(tiny(family), "divprune", keep=0.4)
    batch = inputs(family, model, [[5, "image", 4]])
    vtok.save(model, tmp_path / "saved")
    again = vtok.load(tmp_path / "saved")
    assert type(again) is type(model)
    (logits, made), (logits_again, made_again) = outcome(model, batch), outcome(again, batch)
    assert torch.equal(logits, logits_again)
    assert made == made_again
    config = json.loads((tmp_path / "saved" / CONFIG).read_text())
    assert config == {
        "format": 1,
        "vtok": vtok.__version__,
        "family": family,
        "methods": [{"name": "divprune", "options": {}}],
        "keep": 0.4,
        "positions": "keep" if family in QWEN else "reindex",
    }


def test_weights_are_the_plain_ones(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, [[5, "image", 4]])
    before = model(**batch).logits
    vtok.compress(model, "flowcut", keep=16)
    with caplog.at_level(logging.WARNING, logger="vtok"):
        vtok.save(model, tmp_path)
    assert not caplog.records  # the remark about save_pretrained is for those who call it
    plain = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(plain(**batch).logits, before)
    assert session_of(model).name == "flowcut"


def test_a_chain_with_options_and_tuples(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    chain = [vtok.get("visionzip"), vtok.get("transprune", ratios=(0.5, 0.25, 0.125), prune_after=(6, 12, 20))]
    vtok.compress(model, chain, keep=12, positions="keep")
    vtok.save(model, tmp_path)
    again = vtok.load(tmp_path)
    assert session_of(again).methods == session_of(model).methods
    assert session_of(again).keep == 12
    assert session_of(again).positions == "keep"
    assert session_of(again).methods[1].options()["ratios"] == (0.5, 0.25, 0.125)
    batch = inputs("llava", model, [[5, "image", 4]])
    assert torch.equal(outcome(model, batch)[0], outcome(again, batch)[0])


@pytest.mark.parametrize("keep", [1, 1.0, 0.1 + 0.2, 7])
def test_budgets_keep_their_kind(keep: float, tiny: Any, tmp_path: Path) -> None:
    vtok.save(vtok.compress(tiny("llava"), "uniform", keep=keep), tmp_path, weights=False)
    vtok.restore(tiny("llava"))
    again = session_of(vtok.load(tmp_path, model=tiny("llava"))).keep
    assert (again, type(again)) == (keep, type(keep))


def test_settings_alone_go_onto_another_model(tiny: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vtok.save(vtok.compress(tiny("llava"), "divprune", keep=0.3, positions="keep"), tmp_path, weights=False)
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]
    other = tiny("qwen2_vl")
    with caplog.at_level(logging.WARNING, logger="vtok"):
        assert vtok.load(tmp_path, model=other) is other
    assert "are of a llava, this is a qwen2_vl" in caplog.text
    other(**inputs("qwen2_vl", other, [[5, "image", 4]]))
    assert vtok.report(other).tokens_kept < vtok.report(other).tokens_in
    with pytest.raises(VtokError, match=r"holds no model \(no config.json\)"):
        vtok.load(tmp_path)
    with pytest.raises(VtokError, match="dtype go to from_pretrained, but a model was given"):
        vtok.load(tmp_path, model=other, dtype=torch.float16)


def test_a_folder_of_results_hides_no_model_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nano").mkdir()
    assert is_folder("nano")
    assert not is_folder("nano", {"nano"})
    assert not is_folder("absent", {"nano"})
    assert is_folder("./nano", {"nano"})
    Path("nano", "config.json").write_text("{}")
    assert is_folder("nano", {"nano"})


def test_keywords_reach_from_pretrained(tiny: Any, tmp_path: Path) -> None:
    vtok.save(vtok.compress(tiny("llava"), "uniform", keep=8), tmp_path)
    again = vtok.load(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    assert again.dtype == torch.bfloat16
    assert again.config._attn_implementation == "eager"
    assert not again.training


def test_a_bare_tower_keeps_its_class(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=2, image_size=56, patch_size=7
    )
    tower = vtok.compress(transformers.CLIPVisionModel(config).eval(), "tome", keep=0.5)
    vtok.save(tower, tmp_path)
    again = vtok.load(tmp_path)
    assert type(again) is transformers.CLIPVisionModel
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(pixels).last_hidden_state, tower(pixels).last_hidden_state)


def test_a_custom_method_comes_back_once_it_is_registered(tiny: Any, tmp_path: Path, custom: None) -> None:
    method = EveryNth(steps=((1, 2), ()), label=None)
    vtok.save(vtok.compress(tiny("llava"), method, keep=8), tmp_path, weights=False)
    vtok.restore(tiny("llava"))
    assert session_of(vtok.load(tmp_path, model=tiny("llava"))).methods == (method,)
    vtok.restore(tiny("llava"))
    del _REGISTRY["every_nth"]
    with pytest.raises(VtokError, match="asks for the method 'every_nth', which is not registered here"):
        vtok.load(tmp_path, model=tiny("llava"))


def test_what_cannot_be_saved(tiny: Any, tmp_path: Path, custom: None) -> None:
    model = tiny("llava")
    with pytest.raises(VtokError, match="not compressed"):
        vtok.save(model, tmp_path)

    @dataclass(frozen=True)
    class Mine(EveryNth):
        name = ""

    with pytest.raises(VtokError, match="Mine is not registered"):
        vtok.save(vtok.compress(model, Mine(), keep=8), tmp_path)
    with pytest.raises(VtokError, match=r"option label=.* of every_nth cannot be written as JSON"):
        vtok.save(vtok.compress(model, EveryNth(label=torch.float32), keep=8), tmp_path)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(VtokError, match="is a file"):
        vtok.save(vtok.compress(model, "uniform", keep=8), tmp_path / "file")


GOOD = {"format": 1, "methods": [{"name": "uniform"}], "keep": 8, "positions": "keep"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "names no format"),
        ({**GOOD, "format": 99, "vtok": "9.0"}, "has format 99, written by vtok 9.0"),
        ({"format": 1, "keep": 8}, "lacks methods, positions"),
        ({**GOOD, "methods": []}, "names no methods"),
        ({**GOOD, "methods": [{"options": {}}]}, "a method without a name"),
        ({**GOOD, "methods": ["uniform"]}, "a method without a name"),
        ({**GOOD, "methods": [{"name": "nothing"}]}, "'nothing', which is not registered"),
        ({**GOOD, "methods": [{"name": "uniform", "options": {"colour": 1}}]}, "uniform has no option 'colour'"),
        ({**GOOD, "keep": 0}, "keep=0 would leave no visual token"),
        ({**GOOD, "positions": "up"}, "positions='up' is unknown"),
    ],
)
def test_damaged_settings(content: Any, message: str, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(VtokError, match=message):
        vtok.load(tmp_path, model=tiny("llava"))


def test_missing_files(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(VtokError, match="there is no folder"):
        vtok.load(tmp_path / "nowhere")
    with pytest.raises(VtokError, match=r"holds no vtok_config\.json"):
        vtok.load(tmp_path)
    vtok.save(vtok.compress(tiny("llava"), "uniform", keep=8), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(VtokError, match="transformers cannot load the model in"):
        vtok.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(VtokError, match="transformers cannot load the model in"):
        vtok.load(tmp_path)
