"""Cards of accelerated models: made of committed numbers, and every number in them is one of those."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from vtok.cli import app
from vtok.errors import VtokError
from vtok.export.manifest import Manifest, Parity
from vtok_eval.cards import read, render, unproven
from vtok_eval.cards.command import write

from . import tiny
from .fake_results import Fake, make

ROOT = Path(__file__).parents[2]
PARITY = Parity(100, "bundled", 16, 99, 98, 0.9987, 3.21e-5, 21.37, 0.79, 0.8, rule="all equal", passed=True)
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/card.json"))


def folder(at: Path, to: str, method: str, keep: float, **changes: Any) -> Path:
    """An export as its manifest tells of it."""
    at.mkdir()
    (at / "weights").write_bytes(b"0" * 123_456)
    source = {"name": "fake-llava", "family": "llava", "class": "Llava", "parameters": 13_400_000}
    compression = {"methods": [{"name": method, "options": {}}], "keep": keep, "positions": "keep"}
    plan = None if to == "hf" else {"kept": int(keep), "left_out": ["todre does not act before decoder layer 7"]}
    command = f"vtok export fake-llava {at.name} --to {to} --method {method} --keep {keep:g}"
    note = Manifest(to, "fp32", source, compression, plan, parity=PARITY, command=command)
    dataclasses.replace(note, **changes).write(at)
    return at


@pytest.fixture
def exports(tmp_path: Path) -> list[Path]:
    return [
        folder(tmp_path / "llava-flowcut-64", "hf", "flowcut", 64),
        folder(tmp_path / "llava-flowcut-64-onnx", "onnx", "flowcut", 64),
        folder(tmp_path / "llava-todre-32", "openvino", "todre", 32),
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    make(tmp_path / "results", Fake(methods=("flowcut", "todre", "random"), keeps=(64, 32), samples=20), lines=False)
    return tmp_path / "results"


def test_a_card_says_what_was_measured(exports: list[Path], results: Path, tmp_path: Path) -> None:
    card = write(exports, tmp_path / "cards", results=results, picture=False)
    assert card == tmp_path / "cards" / "llava-flowcut-64"
    text = (card / "README.md").read_text()
    assert text.startswith("---\nlicense: other\nlibrary_name: transformers\n")
    assert "base_model: fake-llava\n" in text and "- flowcut\n- todre\n---" in text
    measured = json.loads((results / "results.json").read_text())
    entry = next(entry for entry in measured["entries"] if entry["id"] == "flowcut@64")
    low, high = entry["tasks"]["text"]["ci"]
    accuracy = entry["tasks"]["text"]["accuracy"]
    assert f"{100 * accuracy:.1f} ({100 * low:.1f}\N{EN DASH}{100 * high:.1f})" in text
    assert f"{entry['timing']['speedup']['median']:.2f}\N{MULTIPLICATION SIGN}" in text
    assert measured["command"] in text and "Imaginary CPU, 2 threads" in text
    assert "| llava-flowcut-64-onnx | onnx | fp32 | 0.1 | 99 of 100 | 98 of 100 | 3.21e-05 of 21.4 |" in text
    assert "79.0 (model 80.0)" in text
    worst = min(entry["tasks"], key=lambda task: entry["tasks"][task]["difference"]["value"])
    assert f"flowcut at 64: what suffers first is {worst}, " in text
    assert "- todre does not act before decoder layer 7\n" in text
    assert 'vtok.load("llava-flowcut-64")' in text and 'vtok.OnnxVLM("llava-flowcut-64-onnx")' in text
    assert "vtok export fake-llava llava-todre-32 --to openvino" in text
    kept = json.loads((card / "results.json").read_text())
    assert [entry["id"] for entry in kept["entries"]] == ["plain", "blank", "flowcut@64", "todre@32"]
    assert unproven(card) == []
    assert render(read(card)) == text


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("99 of 100", "97 of 100", ["97", "text"]),
        ("3.21e-05", "3.21e-06", ["3.21e-06", "text"]),
        ("0.1 |", "0.7 |", ["text"]),
        ("## Limits", "## Limits\n\n99.87 % of the answers are right.", ["text"]),
        ("## Limits", "## Limits\n\nTwice as fast: 2.05 times.", ["2.05", "text"]),
    ],
)
def test_a_number_from_nowhere_is_found(
    old: str, new: str, found: list[str], exports: list[Path], results: Path, tmp_path: Path
) -> None:
    card = write(exports, tmp_path / "cards", results=results, picture=False, name="some")
    page = card / "README.md"
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new, 1))
    assert unproven(card) == found


def test_without_results(exports: list[Path], tmp_path: Path) -> None:
    about = tmp_path / "about.md"
    about.write_text("A model of 12 layers.\n")
    card = write(exports[:1], tmp_path / "cards", about=about, licence="mit", picture=False)
    text = (card / "README.md").read_text()
    assert "license: mit" in text and "A model of 12 layers." in text
    assert "Accuracy was not measured" in text and "## Speed" not in text
    assert not (card / "results.json").exists()
    assert "no training." in text


def test_what_was_trained_beside_the_model_is_said(tmp_path: Path) -> None:
    trained = {"methods": [{"name": "flextok", "options": {"weights": "some"}}], "keep": 64, "positions": "keep"}
    out = folder(tmp_path / "out", "hf", "flextok", 64, compression=trained)
    text = (write([out], tmp_path / "cards", picture=False) / "README.md").read_text()
    assert "beside them stands what was trained for flextok." in text and "no training" not in text


def test_refusals(exports: list[Path], results: Path, tmp_path: Path) -> None:
    other = {"name": "other", "family": "llava", "class": "Llava", "parameters": 1}
    foreign = folder(tmp_path / "foreign", "hf", "flowcut", 64, source=other)
    unchecked = folder(tmp_path / "unchecked", "hf", "flowcut", 64, parity=None)
    unmeasured = folder(tmp_path / "unmeasured", "hf", "flowcut", 48)
    optioned = {"methods": [{"name": "flowcut", "options": {"llm_layer": 2}}], "keep": 64, "positions": "keep"}
    elsewise = folder(tmp_path / "elsewise", "hf", "flowcut", 64, compression=optioned)
    for paths, message in (
        ([exports[0], foreign], "made of another model"),
        ([unchecked], "no parity check"),
        ([unmeasured], r"no flowcut at keep=48 .* run vtok eval --model fake-llava --method flowcut --keep 48"),
        ([elsewise], "no flowcut at keep=64 with the options"),
        ([foreign], "these results are of fake-llava"),
    ):
        with pytest.raises(VtokError, match=message):
            write(paths, tmp_path / "cards", results=results, picture=False)
    assert not (tmp_path / "cards").exists()


def test_a_card_is_brought_up_to_date(exports: list[Path], results: Path, tmp_path: Path) -> None:
    cards = tmp_path / "cards"
    write(exports[:2], cards, results=results, name="both", picture=False)
    (tmp_path / "again").mkdir()
    better = dataclasses.replace(PARITY, answers_equal=100)
    again = folder(tmp_path / "again" / exports[1].name, "onnx", "flowcut", 64, parity=better)
    card = write([exports[2], again], cards, results=results, name="both", picture=False, update=True)
    found = json.loads((card / "card.json").read_text())["exports"]
    assert [record["folder"] for record in found] == [path.name for path in exports]
    assert [record["parity"]["answers_equal"] for record in found] == [99, 100, 99]
    foreign = folder(tmp_path / "foreign", "hf", "flowcut", 64, source={"name": "other", "family": "llava"})
    with pytest.raises(VtokError, match="about another model"):
        write([foreign], cards, name="both", picture=False, update=True)
    with pytest.raises(VtokError, match="no readable"):
        write(exports, cards, name="none", picture=False, update=True)


def test_the_command_draws_what_is_kept(tmp_path: Path) -> None:
    model, processor = tiny.build("llava")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    source = {"name": str(tmp_path / "model"), "family": "llava", "class": "Llava", "parameters": 1}
    out = folder(tmp_path / "out", "hf", "divprune", 8, source=source)
    done = CliRunner().invoke(app, ["card", str(out), "--cards", str(tmp_path / "cards"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == ["README.md", "card.json", "kept.png"]
    assert Image.open(tmp_path / "cards" / "out" / "kept.png").width > 400
    assert "![kept tokens](kept.png)" in (tmp_path / "cards" / "out" / "README.md").read_text()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_number_in_a_card_is_in_the_committed_results(card: Path) -> None:
    assert unproven(card) == []
