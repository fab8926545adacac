"""Flat arguments to a compressed model and its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtok
from vtok.api import session_of
from vtok_eval.arguments import Arguments

from .small import save


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small"))


def test_a_folder_a_method_and_a_budget(folder: Path) -> None:
    model, processor = Arguments.of({"pretrained": str(folder), "method": "divprune", "keep": 16}).open()
    session = session_of(model)
    assert session.name == "divprune" and session.keep == 16 and not model.training
    assert processor.tokenizer is not None


def test_plain_without_a_method(folder: Path) -> None:
    model, _ = Arguments.of({"pretrained": str(folder)}).open(torch.device("cpu"))
    with pytest.raises(vtok.VtokError, match="not compressed"):
        vtok.report(model)


def test_a_saved_folder_keeps_its_settings(folder: Path, tmp_path: Path) -> None:
    model, processor = Arguments.of({"pretrained": str(folder), "method": "fastv", "keep": 0.8}).open()
    vtok.save(model, tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = Arguments.of({"pretrained": str(tmp_path)}).open()
    assert session_of(again).name == "fastv"
    other, _ = Arguments.of({"pretrained": str(tmp_path), "method": "uniform", "keep": 8}).open()
    assert session_of(other).name == "uniform"


def test_dtype_attention_and_device_map(folder: Path) -> None:
    given = {"pretrained": str(folder), "dtype": "bfloat16", "attn_implementation": "eager", "device_map": "cpu"}
    model, _ = Arguments.of(given).open()
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert hasattr(model, "hf_device_map") or next(model.parameters()).device.type == "cpu"


def test_a_geometry_has_random_weights() -> None:
    arguments = Arguments.of({"pretrained": "tiny-qwen2_5_vl", "method": "random", "keep": 8, "device": "cpu"})
    model, processor = arguments.open()
    assert session_of(model).name == "random" and processor.tokenizer is not None


def chain(**given: Any) -> list[Any]:
    return Arguments.of({"pretrained": "x", **given}).chain()


def test_options_go_to_the_method_that_has_them() -> None:
    one = chain(method="fastv", keep=0.5, option_k=3)
    assert [(method.name, method.k) for method in one] == [("fastv", 3)]
    two = chain(method="divprune+random_deep", keep=32, option_layer=4, option_seed=7)
    assert (two[1].layer, two[1].seed) == (4, 7)
    named = chain(method="random+random_deep", keep=32, **{"option_random_deep.seed": 4})
    assert (named[0].seed, named[1].seed) == (0, 4)


def test_values_as_harnesses_hand_them_over() -> None:
    """Tuples as JSON lists, nothing as ``none``, and a negative whole number that became a float."""
    assert chain(method="todre", keep=8, option_decision="none")[0].decision is None
    assert chain(method="mctf", keep=8, option_tau="[1.0, 2.0, 3.0]")[0].tau == (1.0, 2.0, 3.0)
    made = Arguments.of({"pretrained": "x", "method": "divprune", "keep": 8, "option_a": "[1, 2]", "option_b": -1.0})
    assert made.options == {"a": (1, 2), "b": -1}


def test_released_behaviour() -> None:
    methods = chain(method="uniform+fastv", keep=32, compat=True)
    assert [getattr(method, "compat", None) for method in methods] == [None, True]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "which model"),
        ({"pretrained": "x", "metod": "fastv"}, "no argument 'metod'"),
        ({"pretrained": "x", "keep": 64}, "need a method"),
        ({"pretrained": "x", "option_k": 2}, "option_k need a method"),
        ({"pretrained": "x", "method": "fastest", "keep": 64}, "no method 'fastest'"),
        ({"pretrained": "x", "method": "fastv", "keep": 64, "option_colour": 1}, "no option 'colour'"),
        (
            {"pretrained": "x", "method": "flowcut+fastv", "keep": 64, "option_tome.layers": 1},
            "not among flowcut, fastv",
        ),
        ({"pretrained": "x", "method": "random+random_deep", "keep": 64, "option_seed": 1}, "both have seed"),
        ({"pretrained": "x", "method": "uniform", "keep": 64, "compat": True}, "leave compat out"),
        ({"pretrained": "x/y", "dtype": "int8"}, "no floating type"),
    ],
)
def test_wrong_arguments_say_what_to_do(given: dict[str, Any], says: str) -> None:
    with pytest.raises(vtok.VtokError, match=says):
        Arguments.of(given).open()


def test_a_model_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no connection\nand a long explanation")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", offline)
    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", offline)
    with pytest.raises(vtok.VtokError, match="processor of nobody/nothing: no connection"):
        Arguments.of({"pretrained": "nobody/nothing"}).open()
    with pytest.raises(vtok.VtokError, match=r"cannot load nobody/nothing: no connection$"):
        Arguments.of({"pretrained": "nobody/nothing"})._model()
    with pytest.raises(vtok.VtokError, match="no folder, no embedded model"):
        Arguments.of({"pretrained": "nothing"}).open()
    with pytest.raises(vtok.VtokError, match="holds no model"):
        Arguments.of({"pretrained": str(tmp_path)})._model()
