"""The embedded models as they are installed load plainly and see, with an eighth of their tokens, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import vtok
from vtok.export.source import _folder
from vtok_eval import models, tasks
from vtok_eval.answering import Answerer
from vtok_eval.harness.loading import folder_of, model_of
from vtok_eval.models import nano

SEES = ("colour", "position", "exists")


@cache
def loaded(name: str) -> tuple[Any, Any]:
    return models.load(name)


@pytest.fixture(params=nano.NANO)
def embedded(request: pytest.FixtureRequest) -> Any:
    model, processor = loaded(request.param)
    yield request.param, model, processor
    vtok.restore(model)


def share_right(name: str, model: Any, processor: Any, seen: Callable[[Image.Image], Image.Image]) -> float:
    """Of ten questions of each of three tasks."""
    answerer, right = Answerer(model, processor, name), []
    for task in tasks.load(SEES, limit=10):
        for sample in task.samples:
            pictures = [{"type": "image", "image": seen(task.picture(image))} for image in sample.images]
            content = [*pictures, {"type": "text", "text": sample.question}]
            (answer,) = answerer.answer([answerer.prompt([{"role": "user", "content": content}])])
            right.append(tasks.right(answer.text, sample))
    return sum(right) / len(right)


def test_results_may_be_called_as_their_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nano-llava").mkdir()
    for found in (folder_of("nano-llava"), _folder("nano-llava")):
        assert found is not None
        assert (found / "config.json").is_file()
    with pytest.raises(vtok.VtokError, match="holds no model"):
        model_of("./nano-llava")


def test_it_sees(embedded: tuple[str, Any, Any]) -> None:
    grey = share_right(*embedded, lambda image: Image.new("RGB", image.size, (128, 128, 128)))
    assert share_right(*embedded, lambda image: image) >= 0.85 > grey + 0.25


def test_it_sees_with_an_eighth_of_its_tokens(embedded: tuple[str, Any, Any]) -> None:
    _, model, _ = embedded
    vtok.compress(model, "divprune", keep=0.125)
    assert share_right(*embedded, lambda image: image) >= 0.6
    assert vtok.report(model).average_tokens == pytest.approx(vtok.report(model).tokens_in / 8, abs=1)
