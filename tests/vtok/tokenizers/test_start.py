"""Another decoder for trained tokens: the tokens stay to the bit, and a flow starts as what regression knows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.vtok.tokenizers.test_train import blobs
from vtok.errors import VtokError
from vtok.tokenizers import FlexTok, preset
from vtok.tokenizers.config import DECODING
from vtok.tokenizers.data import Pictures
from vtok.tokenizers.start import begin, weights_digest
from vtok.tokenizers.train import Recipe, train

PICTURES = Pictures("blobs", blobs)


def trained(**changes: object) -> FlexTok:
    torch.manual_seed(1)
    tok = FlexTok.preset("test", **changes)
    torch.nn.init.normal_(tok.to_tokens.weight)
    return tok.eval()


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("time", [1.0, 0.4, 0.01])
def test_a_flow_starts_as_the_regression_at_any_time(time: float) -> None:
    old = trained()
    new = FlexTok.preset("test", decoder="flow")
    begin(new, old)
    values, keep = old._values([old.encode(images())[i, :k] for i, k in enumerate((1, 3, 8))])
    x = torch.randn(3, 3, 32, 32)
    velocity, _ = new.decoder(x, torch.full((3,), time), new.decoder.registers(values, keep))
    expected = (x - old.decoder(values, keep)[0]) / max(time, 0.05)
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.grad
@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({}, {"decoder": "flow"}),
        ({}, {"decoder": "flow", "decoder_width": 32, "decoder_depth": 1}),
        ({}, {"decoder": "flow", "predicts": "velocity"}),
        ({"decoder": "flow"}, {"time_shift": 0.0}),
        ({"quantiser": "vq", "codebook": 32}, {"decoder": "flow", "halting": True}),
    ],
)
def test_only_the_decoder_learns(there: dict, here: dict, tmp_path: Path) -> None:
    old, before = trained(**there), weights_digest(trained(**there))
    new = train(preset("test", **there | here), PICTURES, tmp_path, Recipe(steps=3, batch=2), start=old)
    assert torch.equal(new.encode(images()), old.encode(images()))
    assert weights_digest(old) == before
    for name in ("encoder", "to_tokens", "quantiser"):
        for key, value in getattr(new, name).state_dict().items():
            assert torch.equal(value, getattr(old, name).state_dict()[key]), key
    fresh = FlexTok(new.config)
    begin(fresh, old)
    learnt = fresh.decoder.state_dict()
    assert any(not torch.equal(value, learnt[key]) for key, value in new.decoder.state_dict().items())


@pytest.mark.grad
def test_a_run_knows_what_it_began_from(tmp_path: Path) -> None:
    config, recipe, old = preset("test", decoder="flow"), Recipe(steps=1, batch=2), trained()
    train(config, PICTURES, tmp_path, recipe, start=old)
    train(config, PICTURES, tmp_path, recipe, start=trained())
    with torch.no_grad():
        old.decoder.query += 1
    for other in (old, None):
        with pytest.raises(VtokError, match="start"):
            train(config, PICTURES, tmp_path, recipe, start=other)


@pytest.mark.parametrize("changes", [{"tokens": 4}, {"levels": (5, 5)}, {"width": 32}])
def test_other_tokens_are_refused(changes: dict, tmp_path: Path) -> None:
    with pytest.raises(VtokError, match=f"{next(iter(changes))} is .*fields of the decoder"):
        train(preset("test", **changes), PICTURES, tmp_path, Recipe(steps=1), start=trained())
    assert not list(tmp_path.iterdir())


def test_decoding_fields_exist() -> None:
    assert {field.name for field in dataclasses.fields(preset("test"))} >= DECODING


def test_a_default_decides_nothing_new() -> None:
    """Files of tokens stay readable when a later version has one option more."""
    assert preset("nano").deciding() == {}
    assert preset("test", decoder="flow", tokens=16).deciding() == preset("test", tokens=16).deciding()
    assert preset("test", levels=(5, 5)).deciding().keys() == preset("test").deciding().keys() | {"levels"}
