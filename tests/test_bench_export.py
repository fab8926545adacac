"""`vtok bench export`: four contenders, whose gains and shares are ratios within a round. No test asserts a time."""

from __future__ import annotations

import pytest

import vtok
from tests.models import build, inputs
from vtok.bench.export import CONTENDERS, Gains, run


def test_gains_are_ratios_within_a_round():
    found = Gains(576, 64)
    for name, times in zip(CONTENDERS, ([100, 120], [50, 40], [90, 80], [30, 20]), strict=True):
        found.times[name] = list(times)
    assert found.gain("transformers").low == 2
    assert found.gain("onnx").high == 4
    assert found.share.low == pytest.approx(4 / 3)
    assert found.as_dict()["share"] == found.share.median


@pytest.mark.slow
def test_run_times_all_four_and_leaves_the_model_plain():
    pytest.importorskip("onnxruntime")
    model = build("llava", layers=1, vision_layers=2)
    found = run(model, inputs("llava", model, [[5, "image", 4]]), keep=16, repeats=1, threads=1)
    assert all(len(times) == 1 and times[0] > 0 for times in found.times.values())
    assert (found.tokens_in, found.kept) == (64, 16)
    assert found.difference < 1e-4
    with pytest.raises(vtok.VtokError):
        vtok.report(model)
