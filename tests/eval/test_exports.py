"""The table of exports: what is tried, what a refusal offers, and that a stopped run goes on."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vtok.errors import VtokError
from vtok_eval.cards import exports

PARITY = {"samples": 4, "answers_equal": 4, "accuracy": 0.75, "reference_accuracy": 0.5}
MANIFEST = {"files": {"a": {"bytes": 3}, "b": {"bytes": 4}}, "parity": PARITY, "versions": {"torch": "2"}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What would have been run; the second stage of todre and fastv are refused as ``vtok export`` refuses them."""
    seen: list[list[str]] = []

    def run(call: list[str], **_: Any) -> SimpleNamespace:
        seen.append(call)
        Path(call[call.index("export") + 2]).mkdir(exist_ok=True)
        method = call[call.index("--method") + 1]
        if method == "todre" and "--fixed" not in call:
            return SimpleNamespace(
                returncode=2, stdout="", stderr="Error: a second stage; export it\nwith fixed, or so"
            )
        if method == "fastv":
            return SimpleNamespace(returncode=2, stdout="", stderr="noise\nError: drops tokens\ninside the decoder")
        return SimpleNamespace(returncode=0, stdout=json.dumps(MANIFEST), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def command(out: Path, **changes: str) -> None:
    exports.command(
        **{"models": "m", "method": "todre,fastv,tome", "to": "hf,onnx:int8", "keep": "9", **changes},
        samples=4,
        out=out,
    )


def test_every_pair_and_its_reasons(calls: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command(tmp_path)
    text = (tmp_path / exports.TABLE).read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["`todre`", "4 of 4 (fixed)", "75.0 % right, 50.0 before (fixed)"],
        ["`fastv`", "- (1)", "- (1)"],
        ["`tome`", "4 of 4", "75.0 % right, 50.0 before"],
    ]
    assert text.strip().endswith("1. drops tokens inside the decoder")
    assert [call[call.index("--precision") + 1] for call in calls if "--precision" in call] == ["int8"] * 4
    lines = [json.loads(line) for line in (tmp_path / exports.LINES).read_text().splitlines()]
    assert [line.get("bytes") for line in lines] == [7, 7, None, None, 7, 7]


def test_a_stopped_run_goes_on(calls: list[list[str]], tmp_path: Path) -> None:
    command(tmp_path, method="tome")
    first = (tmp_path / exports.TABLE).read_text()
    assert len(calls) == 2
    command(tmp_path, method="tome,flowcut")
    assert len(calls) == 4
    command(tmp_path, method="tome")
    assert (tmp_path / exports.TABLE).read_text() == first and len(calls) == 4
    with pytest.raises(VtokError, match="another budget than 5"):
        command(tmp_path, keep="5")


def test_options_go_to_their_method_and_folders_stay_where_asked(calls: list[list[str]], tmp_path: Path) -> None:
    exports.command("some/m", "tome,flextok", "hf,onnx:int8", "9", 4, ["flextok.weights={model}"], True, tmp_path)
    given = [[call[i + 1] for i, word in enumerate(call) if word == "--option"] for call in calls]
    assert given == [[], [], ["weights=some/m"], ["weights=some/m"]]
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["m-flextok-9-hf", "m-flextok-9-onnx-int8", "m-tome-9-hf", "m-tome-9-onnx-int8"]
    exports.command("some/m", "divprune", "hf", "9", 4, None, False, tmp_path)
    assert not (tmp_path / "m-divprune-9-hf").exists()
