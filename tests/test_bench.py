"""The bench: columns, pairing, and ceilings that cut as much as their method does. No test asserts a time."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import vtok
from vtok.api import adapter_of
from vtok.bench import Row, Spread, contest, run
from vtok.bench.ceiling import at_input, same_cuts, watched
from vtok.bench.measure import PeakMemory, prefill_peak, timed_generate
from vtok.bench.table import show
from vtok.cli import app
from vtok.engine.plan import shape_of

from .conftest import PAIRS, anatomy, settings
from .models import SCENARIOS, inputs

QUICK: dict[str, Any] = {"repeats": 1, "warmup": 0, "new_tokens": 2, "progress": False}


def by_name(rows: list[Row]) -> dict[str, Row]:
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_ceiling_leaves_what_the_method_leaves(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, [[5, "image", 7], [3, "image:84x56", 6]])
    options = settings(method)
    keep = options.pop("keep")
    rows = by_name(run(model, batch, [vtok.get(method, **options)], keep, **QUICK))
    row = next(row for row in rows.values() if row.role == "method")
    same, free = rows[row.same_cuts], rows[row.at_input]
    assert row.average_tokens < row.tokens_in
    assert free.average_tokens == pytest.approx(row.average_tokens, abs=1)
    if same is not free:
        assert same.layer_tokens == row.layer_tokens
        counts = [[(site, count) for site, _, count in own.stage_tokens] for own in (same, row)]
        # what the report counts inside a tower whose tiles are shrunk after it depends on the tokens' places
        first = 0 if family != "llava_onevision" else len(counts[0]) - 1
        assert counts[0][first:] == counts[1][first:]
        assert same.mac_ratio == row.mac_ratio < 1


def test_rows_hold_every_measure(tiny: Any) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    model.generate(**batch, max_new_tokens=2)  # transformers leaves hooks of its own at the first call
    before = anatomy(model)
    rows = by_name(run(model, batch, ["divprune", "fastv", ["divprune", "random_deep"]], 32, **{**QUICK, "repeats": 2}))
    assert anatomy(model) == before
    assert list(rows) == [
        "plain", "divprune", "fastv", "divprune+random_deep",
        "random, input, 32", "random, cuts of fastv", "random, cuts of divprune+random_deep",
    ]  # fmt: skip
    for row in rows.values():
        assert set(row.times) == {"encode", "prefill", "decode"} | ({"select"} if row.role != "plain" else set())
        assert all(len(own) == 2 and min(own) >= 0 for own in row.times.values())
        assert row.times["encode"] < row.times["prefill"]
        assert row.peak_mb > 0
        assert row.tokens_in == 64
        assert len(row.layer_tokens) == len(model.model.language_model.layers)
        assert (row.speedup is None) == (row.role == "plain")
        assert (row.share is None) == (row.role != "method")
    assert rows["plain"].average_tokens == 64
    assert rows["plain"].mac_ratio == 1
    assert rows["divprune"].peak_mb < rows["plain"].peak_mb
    assert rows["divprune"].same_cuts == rows["divprune"].at_input == "random, input, 32"
    assert rows["fastv"].keep == 32
    assert rows["fastv"].at_input == "random, input, 32"
    assert json.loads(json.dumps(rows["fastv"].as_dict()))["ms"]["prefill"]["median"] > 0


def test_order_rotates_and_ratios_are_paired(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    seen: list[str] = []
    clock = iter(float(i * i) for i in range(1, 100))

    def fake(model: Any, *_: Any) -> dict[str, float]:
        session = model.__dict__.get("_vtok")
        seen.append("plain" if session is None else session.name)
        return {"prefill": next(clock)}

    monkeypatch.setattr(contest, "timed_generate", fake)
    monkeypatch.setattr(contest, "report", lambda model: _NoTime())
    monkeypatch.setattr(contest, "_measure", lambda row, *_: setattr(row, "average_tokens", 9.0))
    monkeypatch.setattr(contest, "_describe", lambda *_: None)
    rows = by_name(run(model, batch, ["uniform", "random"], 9, repeats=3, warmup=1, progress=False))
    # plain, uniform, random, ceiling (which is random, too); the warm-up round is number -1
    assert seen[4:] == [
        "plain", "uniform", "random", "random",
        "uniform", "random", "random", "plain",
        "random", "random", "plain", "uniform",
    ]  # fmt: skip
    assert sorted(seen[:4]) == sorted(seen[4:8])
    plain, own, free = (rows[name].times["prefill"] for name in ("plain", "uniform", "random, input, 9"))
    assert len(plain) == 3
    speedups = [a / b for a, b in zip(plain, own, strict=True)]
    assert rows["uniform"].speedup == Spread(statistics.median(speedups), min(speedups), max(speedups))
    shares = [a / b for a, b in zip(free, own, strict=True)]
    assert rows["uniform"].share == Spread(statistics.median(shares), min(shares), max(shares))


class _NoTime:
    seconds: dict[str, float] = {}  # noqa: RUF012
    parts = [[[vtok.protocol.Part(8, 8)]]]  # noqa: RUF012


def test_budget_out_of_reach_is_lifted(tiny: Any) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    rows = by_name(run(model, batch, ["fastv", "random"], 4, **QUICK))
    late, early = rows["fastv"], rows["random"]
    assert early.keep == 4
    assert not early.note
    assert late.keep is not None
    assert late.keep > 16  # the first two layers see all 64
    assert "no average below" in late.note
    assert rows[late.at_input].average_tokens == pytest.approx(late.average_tokens, abs=0.5)

    def lower() -> None:
        with vtok.compressed(model, "fastv", keep=late.keep - 2):  # the one below passes as rounding
            model(**batch)

    with pytest.raises(vtok.VtokError, match="cannot go below"):
        lower()
    share = by_name(run(model, batch, ["fastv"], 0.05, **QUICK))["fastv"]
    assert share.keep == late.keep


def test_what_cannot_run_is_told(tiny: Any) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    rows = run(model, batch, ["random", "nonsense", vtok.get("fastv", k=99)], 9, **QUICK)
    assert [row.name for row in rows if row.role == "refused"] == ["nonsense", "fastv(k=99)"]
    assert "there is no method" in rows[-2].note
    assert "layer 99" in rows[-1].note
    for wrong in ({"repeats": 0}, {"new_tokens": 0}, {"warmup": -1}):
        with pytest.raises(vtok.VtokError, match="at least"):
            run(model, batch, ["random"], 9, **{**QUICK, **wrong})
    with pytest.raises(vtok.VtokError, match="is no clock"):
        run(model, batch, ["random"], 9, **QUICK, clock="sun")
    with pytest.raises(vtok.VtokError, match="no picture"):
        run(model, inputs("llava", model, [[5]]), ["random"], 9, **QUICK)
    with pytest.raises(vtok.VtokError, match="is not a budget"):
        run(model, batch, ["random"], "9", **QUICK)  # type: ignore[arg-type]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(rows, {"model": "tiny"}, console)
    text = console.export_text()
    assert "refused: there is no method 'nonsense'" in text
    assert "random, input, 9" in text


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_images_of_different_sizes(tiny: Any, family: str) -> None:
    """The ceiling at the input gets its budget as a share then."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["two_images"])
    rows = by_name(run(model, batch, ["flowcut"], 0.5, **QUICK))
    row = rows["flowcut"]
    assert isinstance(rows[row.at_input].keep, float)
    assert rows[row.at_input].average_tokens == pytest.approx(row.average_tokens, abs=1)
    assert rows[row.same_cuts].layer_tokens == row.layer_tokens


def test_ceilings_score_nothing(tiny: Any) -> None:
    model = tiny("llava_next")
    shape = shape_of(adapter_of(model))
    for name in vtok.methods("llava_next"):
        method = vtok.get(name)
        for stage in same_cuts(method, shape, {}).stages(shape):
            assert not stage.reads
            assert not stage.observed
            assert stage.observe is None
        before = [(stage.site, stage.layer) for stage in method.stages(shape)]
        assert [(stage.site, stage.layer) for stage in same_cuts(method, shape, {}).stages(shape)] == before
        assert [(stage.site, stage.layer) for stage in watched(method, {}).stages(shape)] == before
        assert method.stages(shape)[0].reads == vtok.get(name).stages(shape)[0].reads
    assert [stage.site for stage in at_input().stages(shape)] == ["input"]


def test_peak_memory_counts_what_lives_together() -> None:
    known = torch.zeros(1000)
    with PeakMemory([known]) as memory:
        a = known + 1
        b = a * 2
        assert memory.live == memory.peak == 8000
        del a
        view = b[:10].view(2, 5)
        transposed = known.reshape(10, 100).T
        assert memory.live == 4000
        c = torch.cat((b, b))
        assert memory.live == memory.peak == 12000
        del b, c
        assert memory.live == 4000  # the view holds on to it
        del view
        assert memory.live == 0
        known.add_(1)
        assert memory.live == 0
    assert transposed.shape == (100, 10)
    assert memory.peak == 12000


def test_prefill_peak_is_the_same_every_time(tiny: Any) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    first = prefill_peak(model, batch)
    assert first == prefill_peak(model, batch) > 0
    longer = inputs("llava", model, [[50, "image", 70]])
    assert prefill_peak(model, longer) > first


def test_one_token_has_no_decoding(tiny: Any) -> None:
    model = tiny("qwen3_vl")
    batch = inputs("qwen3_vl", model, SCENARIOS["video"])
    model.generate(**batch, max_new_tokens=2)
    before = anatomy(model)
    assert set(timed_generate(model, adapter_of(model), batch, 1)) == {"encode", "prefill"}
    for clock in ("wall", "cpu"):
        found = timed_generate(model, adapter_of(model), batch, 3, clock)
        assert set(found) == {"encode", "prefill", "decode"}
        assert 0 <= found["encode"] <= found["prefill"]
    assert anatomy(model) == before


@pytest.mark.slow
def test_command(tmp_path: Any) -> None:
    out = tmp_path / "bench.json"
    quick = ["--model", "tiny-llava", "--repeats", "1", "--warmup", "0", "--new-tokens", "1", "--out", str(out)]
    done = CliRunner().invoke(app, ["bench", *quick, "--methods", "random,divprune+fastv", "--keep", "0.25", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads(out.read_text())
    assert found["setting"]["model"] == "tiny-llava"
    assert {"device", "torch", "transformers", "threads", "dtype"} <= set(found["setting"])
    assert [row["name"] for row in found["rows"] if row["role"] == "method"] == ["random", "divprune+fastv"]
    assert found["rows"][1]["average_tokens"] == pytest.approx(144, abs=1)
    done = CliRunner().invoke(app, ["bench", *quick, "--methods", "random", "--batch", "2"])
    assert done.exit_code == 0, done.output
    assert "of ceiling" in done.stdout
    for wrong in (["--dtype", "int8"], ["--keep", "few"], ["--picture", "large"], ["--model", "nothing"]):
        assert CliRunner().invoke(app, ["bench", *quick, *wrong]).exit_code != 0
