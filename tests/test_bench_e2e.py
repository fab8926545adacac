"""`vtok bench e2e`: the plan, the time limit, the shares, the caught decoding step. No test asserts a time."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vtok
from vtok.bench.contest import Row, Spread
from vtok.bench.e2e.bars import selection, verdicts
from vtok.bench.e2e.command import numbers, table_of
from vtok.bench.e2e.graph import decode_call
from vtok.bench.e2e.plan import Cell, cells
from vtok.bench.e2e.run import Outcome, run
from vtok.cli import app
from vtok.geometry import geometries

from .conftest import anatomy
from .models import SCENARIOS, inputs


def test_the_plan_is_the_issues() -> None:
    plan = cells()
    assert {cell.model for cell in plan} <= set(geometries())
    assert [cell.keep for cell in plan if cell.model == "llava-1.5-7b" and cell.batch == 8] == [64, 128, 192]
    assert [cell.keep for cell in plan if cell.model == "llava-next-7b" and cell.batch == 1] == [160, 320, 640]
    assert {cell.picture for cell in plan if cell.model == "qwen2_5_vl-7b"} == {"1008x1008", "2016x2016"}
    order = [cell.model for cell in plan]
    assert order == sorted(order, key=order.index)  # one model after the other
    assert all(cell.graphs for cell in plan if cell.keep in (64, 160, 0.11))
    assert not any(cell.graphs for cell in cells(graphs=False))
    assert cells(["somewhere/model"], [2], [0.5], ["30x40"]) == [Cell("somewhere/model", "30x40", 2, 0.5, True)]
    for wrong in ({"models": []}, {"batches": [0]}):
        with pytest.raises(vtok.VtokError, match="at least 1"):
            cells(**wrong)  # type: ignore[arg-type]


def made(name: str, role: str, prefill: float, select: float = 1.0, **changes: Any) -> Row:
    times = {"encode": [2.0, 2.0], "prefill": [prefill, prefill], "select": [select, select]}
    sites = [("encoder" if name == "flowcut" else "input", None, 4)]
    return Row(name, role, times=times, stage_tokens=sites, peak_mb=10.0, **changes)


def outcome(model: str = "llava-1.5-7b") -> Outcome:
    share = {"share": Spread(0.9, 0.9, 0.9), "same_cuts": "cuts"}
    rows = [
        made("plain", "plain", 100), made("divprune", "method", 40, **share), made("flowcut", "method", 44, **share),
        made("cuts", "ceiling", 40), Row("bad", "refused", note="no"),
    ]  # fmt: skip
    return Outcome(Cell(model, "672x504", 1, 64), rows, {"plain": [7.0, 8.0, 9.0]}, 2)


def test_shares_of_the_plain_prefill() -> None:
    own = outcome()
    plain, divprune, flowcut = own.rows[:3]
    assert own.plain is plain
    assert own.share_of_plain(divprune) == Spread(0.01, 0.01, 0.01)
    assert own.overhead(divprune) == Spread(0, 0, 0)
    assert own.overhead(flowcut) == Spread(0.04, 0.04, 0.04)
    assert own.overhead(plain) is None
    assert (selection(own, divprune), selection(own, flowcut)) == (0.01, 0.04)
    found = numbers(own, plain)
    assert (found["ttft_ms"], found["prefill_ms"], found["decode_graph_ms"]) == (100, 98, 8)
    table = list(csv.reader(table_of([own, Outcome(own.cell, note="left out")], "H100").splitlines()))
    assert {len(line) for line in table} == {len(table[0])}
    assert len(table) == 1 + len(own.rows) + 1
    json.dumps(own.as_dict())


def test_bars_name_the_worst() -> None:
    found = verdicts([outcome()], "cuda")
    assert [(v.what.split(": ")[1], v.holds) for v in found] == [
        ("flowcut", False), ("divprune", False), ("flowcut", False), ("divprune", True),
    ]  # fmt: skip
    assert verdicts([outcome()], "cpu") == []
    assert [v.limit for v in verdicts([outcome("llava-0.5b")], "cpu")] == [0.03, 0.95, 0.95]
    assert verdicts([Outcome(outcome().cell, note="left out")], "cuda") == []


@pytest.mark.parametrize(("family", "method"), [("llava", None), ("llava", "divprune"), ("qwen2_5_vl", "fastv")])
def test_the_caught_step_is_generates(tiny: Any, family: str, method: str | None) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    model.generate(**batch, **options)
    if method is not None:
        vtok.compress(model, method, keep=0.5)
    expected = model.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    before = anatomy(model)
    call = decode_call(model, batch)
    assert anatomy(model) == before
    logits = model(**call).logits[:, -1]
    torch.testing.assert_close(logits, expected.logits[1], rtol=1e-4, atol=1e-4)


def test_contests_and_time(tmp_path: Path) -> None:
    out = tmp_path / "results"
    quick = ["bench", "e2e", "--models", "tiny-llava", "--batch", "1", "--keep", "64,32", "--repeats", "1"]
    quick += ["--methods", "divprune,nonsense", "--new-tokens", "2", "--prompt-tokens", "8", "--device", "cpu"]
    done = CliRunner().invoke(app, [*quick, "--out", str(out), "--minutes", "0", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [contest["cell"]["keep"] for contest in told["contests"]] == [64, 32]
    for contest in told["contests"]:
        roles = [row["role"] for row in contest["rows"]]
        assert roles == ["plain", "method", "ceiling", "refused"]
        assert contest["rounds"] == 1
        assert contest["rows"][1]["select_share"] > 0
    assert sorted(path.suffix for path in out.iterdir()) == [".csv", ".json"]
    for wrong in (["--batch", "few"], ["--clock", "sun"], ["--repeats", "0"], ["--dtype", "int8"]):
        assert CliRunner().invoke(app, [*quick, *wrong]).exit_code == 2
    plan = cells(["tiny-llava"], [1])
    assert all("left out" in own.note for own in run(plan, "random", minutes=0.0, repeats=1))


def test_megapixels_reach_a_qwen() -> None:
    from vtok.bench.options import noise
    from vtok.geometry import geometry, inputs_of

    model = geometry("tiny-qwen2_5_vl", device="meta")
    small = inputs_of(model, noise("1400x1400"))
    large = inputs_of(model, noise("1400x1400"), pixels=1400 * 1400)
    assert small["image_grid_thw"].device.type == "meta"
    assert large["input_ids"].shape[1] - 32 == 2500 + 2
    assert small["input_ids"].shape[1] < 1500
