"""Training a tokenizer: it learns, and an interrupted run ends as an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vtok.errors import VtokError
from vtok.tokenizers import FlexTok, preset
from vtok.tokenizers.data import Pictures
from vtok.tokenizers.train import Recipe, assess, levels, train, views

pytestmark = pytest.mark.grad


def blobs(number: int) -> Image.Image:
    """Nine colours, run into each other."""
    coarse = torch.randint(0, 256, (3, 3, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((40, 40), Image.Resampling.BICUBIC)


class Breaks:
    """Blobs, until the one that ends the run."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, number: int) -> Image.Image:
        if number == self.at:
            raise InterruptedError
        return blobs(number)


@pytest.mark.parametrize("changes", [{}, {"quantiser": "vq", "codebook": 32}, {"decoder": "flow", "quantiser": "kl"}])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(changes: dict, tmp_path: Path) -> None:
    config, recipe = preset("test", **changes), Recipe(steps=6, batch=2, warmup=2)
    whole = train(config, Pictures("blobs", blobs), tmp_path / "whole", recipe)
    for at in (5, 9):
        with pytest.raises(InterruptedError):
            train(config, Pictures("blobs", Breaks(at)), tmp_path / "parts", recipe, every=0)
    parts = train(config, Pictures("blobs", blobs), tmp_path / "parts", recipe)
    fresh = FlexTok.from_pretrained(tmp_path / "whole" / "tokenizer")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[key]), key
        assert torch.equal(value, fresh.state_dict()[key]), key


def test_psnr_rises_with_the_tokens_after_a_short_training(tmp_path: Path) -> None:
    tok = train(preset("test"), Pictures("blobs", blobs), tmp_path, Recipe(steps=250, batch=8, rate=2e-3))
    held_out = Pictures("held-out", lambda number: blobs(10**6 + number))
    report = assess(tok, [held_out], tmp_path, limit=48, shown=3)["held-out"]
    rows = report["curve"]["rows"]
    assert [row["k"] for row in rows] == [1, 2, 4, 8]
    assert report["curve"]["rises"] and rows[-1]["psnr"] > rows[0]["psnr"] + 1, rows
    assert json.loads(json.dumps(report)) == json.loads((tmp_path / "report.json").read_text())["held-out"]
    assert (tmp_path / "held-out.png").is_file() and report["left_out"] == {}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


def test_another_run_in_the_folder_is_not_overwritten(tmp_path: Path) -> None:
    pictures = Pictures("blobs", blobs)
    train(preset("test"), pictures, tmp_path, Recipe(steps=1, batch=2))
    with pytest.raises(VtokError, match=r"tokens: 8 there, 4 here.*--no-resume"):
        train(preset("test", tokens=4), pictures, tmp_path, Recipe(steps=1, batch=2))
    assert (
        train(preset("test", tokens=4), pictures, tmp_path, Recipe(steps=1, batch=2), resume=False).config.tokens == 4
    )


def test_features_for_the_head_that_needs_them(tmp_path: Path) -> None:
    config = preset("test", repa=4)
    recipe, pictures = Recipe(steps=2, batch=2), Pictures("blobs", blobs)
    with pytest.raises(VtokError, match="features="):
        train(config, pictures, tmp_path / "without", recipe)
    train(config, pictures, tmp_path / "with", recipe, features=lambda images: torch.ones(len(images), 4, 3, 3))
    assert "repa" in json.loads((tmp_path / "with" / "log.jsonl").read_text().splitlines()[-1])


def test_wrong_recipes_and_pictures() -> None:
    with pytest.raises(VtokError, match="steps=0"):
        Recipe(steps=0)
    with pytest.raises(VtokError, match="learning rate"):
        Recipe(rate=0.0)

    def broken(number: int) -> Image.Image:
        raise VtokError("a reason")

    with pytest.raises(VtokError, match=r"none of the pictures.*a reason"):
        views(Pictures("broken", broken, 3), 32, 3)


def test_digits_of_codes() -> None:
    assert levels(FlexTok.preset("test")) == (8, 8, 8, 5, 5, 5)
    assert levels(FlexTok.preset("test", quantiser="binary", bits=3)) == (2, 2, 2)
    assert levels(FlexTok.preset("test", quantiser="kl")) == ()
