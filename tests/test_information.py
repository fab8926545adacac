"""The information horizon against a naive loop over the masked oracle."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import vtok
from vtok.engine.trace import windows
from vtok.protocol import Part

from .conftest import anatomy
from .models import FAMILIES, SCENARIOS, Batch, inputs, pad_right, scenarios, single, visual_mask
from .oracle import masked

ANSWER = 42


def oracle(model: PreTrainedModel, batch: Batch, layer: int, keep: Tensor | None) -> float:
    """Probability of the answer when only the visual columns ``keep`` can be seen from ``layer`` on."""
    gone = visual_mask(batch)
    if keep is not None:
        gone[0, keep] = False
    depth = len(model.model.language_model.layers)
    hidden = [gone if number >= layer else torch.zeros_like(gone) for number in range(depth)]
    with masked(model, hidden, batch["attention_mask"]):
        return float(model(**batch, use_cache=False).logits[0, -1].softmax(-1)[ANSWER])


def columns_of(batch: Batch, found: vtok.Information, unit: int) -> Tensor:
    """Prompt columns of a unit, counted by hand: placeholders of all images in order."""
    placeholders = visual_mask(batch)[0].nonzero().flatten()
    return placeholders[found.cells[unit]]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_naive_loop(tiny: Any, family: str) -> None:
    model = tiny(family, layers=8)
    batch = inputs(family, model, SCENARIOS["one"])
    asked = [0, 1, 2, 5, 7]  # Qwen3-VL adds its planes after layers 0, 1 and 2
    found = vtok.information(model, batch, ANSWER, layers=asked, mode="both", batch_size=5)
    everything = visual_mask(batch)[0].nonzero().flatten()
    full = oracle(model, batch, 0, everything)
    assert found.full == pytest.approx(full, abs=1e-5)
    assert list(found.values) == list(found.removal) == list(found.text) == asked
    units = range(len(found.cells))
    for layer in asked:
        text = oracle(model, batch, layer, None)
        assert found.text[layer] == pytest.approx(text, abs=1e-5)
        own = [columns_of(batch, found, unit) for unit in units]
        alone = torch.tensor([oracle(model, batch, layer, cell) - text for cell in own])
        torch.testing.assert_close(found.values[layer], alone, atol=1e-5, rtol=0)
        rest = [everything[~torch.isin(everything, cell)] for cell in own]
        gone = torch.tensor([full - oracle(model, batch, layer, cell) for cell in rest])
        torch.testing.assert_close(found.removal[layer], gone, atol=1e-5, rtol=0)
    assert max(float(values.abs().max()) for values in found.values.values()) > 1e-4


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILIES for name in scenarios(family) if name != "text"]
)
def test_layouts(tiny: Any, family: str, name: str) -> None:
    """Several images, odd grids, tiles, video: a few units against the oracle, and every token at most once."""
    model = tiny(family, layers=8)
    batch = single(inputs(family, model, SCENARIOS[name]), 0)
    found = vtok.information(model, batch, ANSWER, layers=[1], unit=3)
    assert sum(rows * columns for rows, columns in found.grids) == len(found.cells) == len(found.values[1])
    assert [tuple(plane.shape) for plane in found.maps(1)] == list(found.grids)
    text = oracle(model, batch, 1, None)
    vtok.compress(model, "random", keep=1.0)
    model(**batch)
    spans = vtok.api.session_of(model).last.spans
    vtok.restore(model)
    for unit in (0, len(found.cells) // 2, len(found.cells) - 1):
        span = next(span for span in spans if span.place == found.images[unit])
        value = oracle(model, batch, 1, span.columns[found.cells[unit]]) - text
        assert float(found.values[1][unit]) == pytest.approx(value, abs=1e-5)
    for place in set(found.images):
        tokens = torch.cat([cell for cell, image in zip(found.cells, found.images, strict=True) if image == place])
        assert len(tokens.unique()) == len(tokens) <= spans[place].length


def test_windows() -> None:
    cells, grids = windows((Part(3, 4), Part(2, 2, newlines=1, per_row=True), Part(1, 1, newlines=1)), 2)
    assert grids == [(2, 2), (1, 1), (1, 1)]
    assert [cell.tolist() for cell in cells] == [
        [0, 1, 4, 5], [2, 3, 6, 7], [8, 9], [10, 11], [12, 13, 15, 16], [18],
    ]  # fmt: skip


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_padding_and_compression_change_nothing(tiny: Any, family: str) -> None:
    model = tiny(family, layers=8)
    batch = inputs(family, model, SCENARIOS["one"])
    alone = vtok.information(model, batch, ANSWER, layers=[2])
    longer = inputs(family, model, [*SCENARIOS["one"], [80]])
    left = Batch(
        {k: v[:1] if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in longer.items()},
        [1], [0], longer.tiles,
    )  # fmt: skip
    for padded in (left, pad_right(left)):
        found = vtok.information(model, padded, ANSWER, layers=[2])
        torch.testing.assert_close(found.values[2], alone.values[2], atol=1e-5, rtol=0)
    vtok.compress(model, "random", keep=5)
    found = vtok.information(model, batch, ANSWER, layers=[2])
    assert torch.equal(found.values[2], alone.values[2])
    model(**batch)
    assert (vtok.report(model).method, vtok.report(model).tokens_kept) == ("random", 5)
    plain = anatomy(vtok.restore(model))
    vtok.information(model, batch, ANSWER, layers=[2])
    assert anatomy(model) == plain


def test_horizon() -> None:
    def made(*spreads: float) -> vtok.Information:
        values = {4 * i: torch.tensor([spread, -spread, 0.0]) for i, spread in enumerate(spreads)}
        cells = tuple(torch.tensor([i]) for i in range(3))
        return vtok.Information(values, dict.fromkeys(values, 0.1), 0.5, cells, (0, 0, 0), ((1, 3),), 16)

    assert made(0.5, 0.2, 0.001, 0.0).horizon() == 8
    assert made(0.5, 0.001, 0.2, 0.0).horizon() == 12
    assert made(0.0, 0.0, 0.0, 0.2).horizon() == 16
    assert made(0.0, 0.0).horizon() == 0
    assert made(0.5, 0.2).horizon(epsilon=0.3) == 4
    shifted = vtok.Information({0: torch.full((3,), 0.2)}, {0: 0.1}, 0.5, (), (), (), 4)
    assert shifted.horizon() == 4
    text = str(made(0.5, 0.001))
    assert "horizon (0.01): layer 4 of 16" in text
    assert "behind the last layer" in str(made(0.5))


def test_modes_share_what_they_measure(tiny: Any) -> None:
    model = tiny("llava", layers=8)
    batch = inputs("llava", model, SCENARIOS["one"])
    both = vtok.information(model, batch, ANSWER, layers=[3], mode="both", unit=4)
    out = vtok.information(model, batch, ANSWER, layers=[3], mode="out", unit=4)
    assert len(both.cells) == 4
    assert torch.equal(out.values[3], both.removal[3])
    assert not vtok.information(model, batch, ANSWER, layers=[3], unit=4).removal


def test_bad_input(tiny: Any) -> None:
    model = tiny("llava", layers=8)
    batch = inputs("llava", model, SCENARIOS["one"])
    for wrong, message in [
        ({"mode": "sideways"}, "is unknown"),
        ({"layers": [8]}, "0 to 7"),
        ({"layers": []}, "0 to 7"),
        ({"unit": 0}, "at least 1"),
    ]:
        with pytest.raises(vtok.VtokError, match=message):
            vtok.information(model, batch, ANSWER, **wrong)
    with pytest.raises(vtok.VtokError, match="one at a time"):
        vtok.information(model, inputs("llava", model, SCENARIOS["one"] * 2), ANSWER)
    with pytest.raises(vtok.VtokError, match="no picture"):
        vtok.information(model, inputs("llava", model, [[5]]), ANSWER)
    with pytest.raises(vtok.VtokError, match="ends in a picture"):
        vtok.information(model, inputs("llava", model, [[5, "image"]]), ANSWER)
    with pytest.raises(vtok.VtokError, match="language head"):
        vtok.information(model.model, batch, ANSWER)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_auto_layer(tiny: Any, family: str) -> None:
    model = tiny(family, layers=8)
    samples = [(inputs(family, model, SCENARIOS["one"], seed=seed), ANSWER + seed) for seed in (0, 1)]
    each = [vtok.information(model, batch, answer) for batch, answer in samples]
    # an epsilon that puts the deeper of the two horizons between the first and the last layer
    epsilon = max(float(one.values[5].std(correction=0)) for one in each) * 1.01 + 1e-9
    epsilon = max([epsilon, *(abs(float(one.values[layer].mean())) * 1.01 for one in each for layer in (5, 6, 7))])
    epsilon = max([epsilon, *(float(one.values[layer].std(correction=0)) * 1.01 for one in each for layer in (6, 7))])
    horizon = vtok.calibrate(model, samples, epsilon)
    assert horizon == max(one.horizon(epsilon) for one in each) <= 5
    auto = vtok.get("random_deep", layer="auto", samples=samples, epsilon=epsilon)
    vtok.compress(model, ["divprune", auto], keep=0.3)
    model(**samples[0][0])
    stages = [(stage.site, stage.layer) for stage in vtok.report(model).stages]
    assert stages == [("input", None), ("decoder", max(1, horizon))]
    method = vtok.api.session_of(model).methods[-1]
    assert json.dumps(method.options())
    assert method.samples == ()


def test_auto_layer_refusals(tiny: Any) -> None:
    model = tiny("llava", layers=8)
    samples = [(inputs("llava", model, SCENARIOS["one"]), ANSWER)]
    with pytest.raises(vtok.VtokError, match="nowhere to cut"):
        vtok.compress(model, vtok.get("random_deep", layer="auto", samples=samples, epsilon=0.0), keep=0.9)
    with pytest.raises(vtok.VtokError, match="is not compressed"):
        vtok.report(model)
    for layer in ("auto", "late"):
        with pytest.raises(vtok.VtokError, match="is no layer"):
            vtok.get("random_deep", layer=layer)
    with pytest.raises(vtok.VtokError, match="nothing to calibrate"):
        vtok.calibrate(model, [])


def test_layers_of_random_deep(tiny: Any) -> None:
    """An int is a layer of this decoder, a float a share of its depth."""
    model = tiny("llava", layers=8)
    for layer, expected in [(3, 3), (0.5, 4), (20 / 32, 5), (0.0, 1), (1.0, 7)]:
        vtok.compress(model, "random_deep", layer=layer, keep=0.97)
        assert vtok.api.session_of(model).decoder_stages[0].layer == expected
    with pytest.raises(vtok.VtokError, match="layers 0 to 7"):
        vtok.compress(model, "random_deep", layer=20, keep=0.9)
