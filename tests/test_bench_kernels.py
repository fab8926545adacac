"""`vtok bench kernels`: every operator has a case that runs, its counts and ratios are right, its files are whole."""

from __future__ import annotations

import csv
import dataclasses
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import vtok
import vtok_kernels
from vtok.bench.kernels import textbook
from vtok.bench.kernels.bars import verdicts
from vtok.bench.kernels.case import Bar, Maker, bytes_of
from vtok.bench.kernels.cases import BUILDERS, SIZES, UNTIMED, requests
from vtok.bench.kernels.command import table_of
from vtok.bench.kernels.device import CallClock, Ceilings, ceilings, slug
from vtok.bench.kernels.roofline import picture
from vtok.bench.kernels.run import Outcome, Row, agreement, measure, operators_of, run
from vtok.cli import app

CPU = torch.device("cpu")
TOP = Ceilings(1e9, {"fp32": 1e9, "bf16": 1e9}, 0.001)
OPERATORS = sorted(vtok_kernels.available())


def found(name: str, turn: int = 0, **options: Any) -> Outcome:
    request = (name, SIZES["tiny"][name][turn])
    return measure(request, "fp32", CallClock(CPU), TOP, **{"seconds": 0.0, "compile": False, **options})


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_a_case_or_a_reason(name: str) -> None:
    assert (name in BUILDERS) != (name in UNTIMED), f"vtok/bench/kernels/cases.py lacks a builder of {name}"
    if name in BUILDERS:
        assert all(sizes.get(name) for sizes in SIZES.values())


@pytest.mark.parametrize("name", [name for name in OPERATORS if name in BUILDERS])
def test_every_case_runs(name: str) -> None:
    for turn in range(len(SIZES["tiny"][name])):
        rows = found(name, turn).rows
        assert {row.backend for row in rows} >= set(vtok_kernels.available(CPU)[name])
        for row in rows:
            assert not row.note or row.backend == "yardstick", row.note
            assert len(row.times) >= 5 and min(row.times) > 0
            assert row.moved > 0 and row.limit_ms > 0 and row.peak_mb is not None
            assert row.agreement is None or row.agreement > 0.999
        assert [row.backend for row in rows if row.chosen] == [vtok_kernels.available(CPU)[name][0]]


def test_builders_are_named_after_their_operators() -> None:
    for name, build in BUILDERS.items():
        case = build(Maker("fp32", CPU), **SIZES["tiny"][name][0])
        assert case.operator == name
        assert all(isinstance(x, Tensor) for x in case.inputs)


def test_a_backend_that_registers_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = dict(vtok_kernels.backend._OPERATORS["topk"])
    monkeypatch.setitem(vtok_kernels.backend._OPERATORS, "topk", kinds)

    @vtok_kernels.register("topk", "wrong", priority=7)
    def wrong(scores: Tensor, k: int) -> Tensor:
        return torch.zeros(scores.shape[0], k, dtype=torch.long)

    rows = {row.backend: row for row in found("topk").rows}
    assert rows["wrong"].chosen and not rows["reference"].chosen
    assert rows["reference"].agreement == 1
    assert rows["wrong"].agreement < 0.5
    assert set(rows["wrong"].speedup) == {"reference", "textbook"}
    assert "reference" not in rows["reference"].speedup

    @vtok_kernels.register("topk", "wrong", priority=7)
    def broken(scores: Tensor, k: int) -> Tensor:
        raise RuntimeError("no such luck")

    rows = {row.backend: row for row in found("topk").rows}
    assert rows["wrong"].note == "RuntimeError: no such luck"
    assert not rows["wrong"].times and rows["reference"].times


def test_the_textbook_is_right() -> None:
    """On inputs without ties it chooses and computes what the operators do."""
    make = Maker("fp32", CPU)
    x, pivot, relevance = make.normal(2, 21, 16), torch.tensor([3, 7]), make.positive(2, 21)
    for picks, expected in (
        (textbook.farthest_first(x, 6), vtok_kernels.farthest_first(x, 6, sort=False)),
        (textbook.max_sum(x, 6, pivot), vtok_kernels.max_sum(x, 6, pivot, sort=False)),
        (textbook.dpp_map(x, 6, relevance), vtok_kernels.dpp_map(x, 6, relevance, sort=False)),
    ):
        assert torch.equal(torch.stack(picks), expected)
    dst = make.slots(2, 21, 5)
    assert all(set(row.tolist()) == set(range(5)) for row in dst)
    torch.testing.assert_close(textbook.merge(x, dst, 5, True), vtok_kernels.merge_mean(x, dst, 5))
    torch.testing.assert_close(textbook.merge(x, dst, 5, False), vtok_kernels.merge_sum(x, dst, 5))
    q, k = make.normal(2, 4, 9, 8), make.normal(2, 2, 9, 8)
    places = torch.arange(9).expand(2, 9)
    received = vtok_kernels.received_attention(q, k, scale=0.3, query_positions=places)
    torch.testing.assert_close(textbook.attention_map(q, k, 0.3, True).mean((1, 2)), received)
    rows = vtok_kernels.attention_rows(q, k, scale=0.3)
    torch.testing.assert_close(textbook.attention_map(q, k, 0.3, False).mean(1), rows)
    q, k, v = (make.normal(10, 2, 8) for _ in range(3))
    packed = vtok_kernels.packed_attention(q, k, v, [3, 7], scale=0.3)
    torch.testing.assert_close(textbook.block_attention(q, k, v, [3, 7], 0.3), packed)


def test_bytes_and_limits() -> None:
    case = BUILDERS["gather_tokens"](Maker("bf16", CPU), 2, 21, 16, 5)
    assert case.moved == 2 * (2 * 5 * 16 * 2) + 2 * 5 * 8
    assert case.title == "B2 N21 D16 k5"
    assert bytes_of(torch.zeros(3), [torch.zeros(2, dtype=torch.long)], 4) == 28
    assert TOP.limit_ms(2e9, 1e9, "fp32") == 2000
    assert TOP.limit_ms(1e9, 3e9, "fp32") == 3000
    assert TOP.bound(2e9, 1e9, "fp32") == "bandwidth"
    measured = ceilings(CallClock(CPU), ("fp32",), quick=True)
    assert min(measured.bandwidth, measured.rate["fp32"], measured.launch_ms) > 0


def test_agreement() -> None:
    a = torch.tensor([1.0, 2.0, 4.0])
    assert agreement(a, a.clone()) == 1
    assert agreement((a, a + 0.4), (a, a)) == pytest.approx(0.9)
    assert agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])) == 0.75
    assert agreement(a, a[:2]) == 0
    assert agreement(None, None) is None
    plan = vtok_kernels.MergePlan.identity(1, 4)
    assert agreement(plan, plan) == 1


def row(backend: str = "triton", chosen: bool = True, **changes: Any) -> Row:
    made = Row("max_sum", "B1 N2880 D4096 k320", "bf16", backend, chosen, [2.0, 2.0], 1e6, 1e6, "bandwidth", 1.0)
    return dataclasses.replace(made, **changes)


def test_bars_count_where_they_are_meant() -> None:
    from vtok.bench.contest import Spread

    bars = (Bar("ms", 1.0, "H100"), Bar("speedup", 8.0), Bar("share", 0.4), Bar("yardstick", 1.5, "cpu"))
    speedup = {"textbook": Spread(9, 8, 10), "yardstick": Spread(0.5, 0.5, 0.5)}
    outcomes = [Outcome([row(speedup=speedup), row("reference", False)], bars)]
    on_h100 = verdicts(outcomes, {"device": "NVIDIA H100 80GB HBM3", "kind": "cuda"})
    assert [(verdict.value, verdict.holds) for verdict in on_h100] == [(2, False), (9, True), (0.5, True)]
    assert len(verdicts(outcomes, {"device": "NVIDIA A100", "kind": "cuda"})) == 2
    (on_cpu,) = verdicts(outcomes, {"device": "Intel Xeon", "kind": "cpu"})
    assert (on_cpu.value, on_cpu.holds) == (2, False)
    assert verdicts([Outcome([row(times=[])], bars)], {"device": "H100", "kind": "cuda"}) == []
    sizes = {"B1 N2880 D64 r720": 10.0, "B1 N5760 D64 r1440": 41.0}
    matches = [row(operator="match_tokens", size=size, peak_mb=peak) for size, peak in sizes.items()]
    (memory,) = verdicts([Outcome(matches)], {"device": "x", "kind": "cpu"})
    assert (memory.value, memory.holds) == (4.1, False)


def test_time_that_is_over_leaves_cases_out() -> None:
    wanted = list(requests("tiny", ["topk", "merge_mean"]))
    assert [name for name, _ in wanted] == ["merge_mean", "topk", "merge_mean"]
    outcomes = list(run(wanted, ["fp32"], CallClock(CPU), TOP, seconds=0.0, minutes=1e-9))
    assert all("left out" in outcome.rows[0].note for outcome in outcomes)
    assert len(outcomes) == 3


def test_picture_is_xml_with_a_mark_a_row() -> None:
    rows = [row(), row("reference", False), row("textbook", False), row(operator="topk", operations=0.0)]
    tree = ElementTree.fromstring(picture(rows, TOP, "a < b"))
    marks = [node for node in tree.iter("{http://www.w3.org/2000/svg}rect") if node.get("class") == "mark"]
    assert len([node for node in marks if len(node)]) == 3  # and one in the legend for each operator
    assert len(marks) == 5
    assert all(0 < float(node.get("x", 0)) < 890 and 0 < float(node.get("y", 0)) < 550 for node in marks)


def test_csv_is_as_wide_as_its_head() -> None:
    table = list(csv.reader(table_of([row(), row(times=[], note="a, b")], "H100").splitlines()))
    assert {len(line) for line in table} == {len(table[0])}
    assert slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-xeon"
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_operators_by_name() -> None:
    assert operators_of("topk, compact", CPU) == (["topk", "compact"], [])
    with pytest.raises(vtok.VtokError, match="no operator 'magic'"):
        operators_of("magic", CPU)


def test_command(tmp_path: Path) -> None:
    tiny = ["bench", "kernels", "--sizes", "tiny", "--operators", "topk,max_sum", "--seconds", "0", "--no-compile"]
    done = CliRunner().invoke(app, [*tiny, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {row["operator"] for row in told["rows"]} == {"topk", "max_sum"}
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json", ".svg"}
    (saved,) = tmp_path.glob("*.json")
    assert json.loads(saved.read_text()) == told
    done = CliRunner().invoke(app, tiny)
    assert "share of the device" in done.stdout or "max_sum" in done.stdout
    for wrong in (["--dtype", "int8"], ["--sizes", "70b"], ["--clock", "sun"], ["--operators", "magic"]):
        assert CliRunner().invoke(app, [*tiny, *wrong]).exit_code == 2
    assert CliRunner().invoke(app, ["bench", "--keep", "9", "kernels"]).exit_code == 2


@pytest.mark.slow
def test_compiled() -> None:
    rows = {row.backend: row for row in found("topk", compile=True).rows}
    assert rows["compiled"].times or rows["compiled"].note
    rows = {row.backend: row for row in found("dpp_map", compile=True).rows}
    assert "another shape" in rows["compiled"].note
