"""The command line: tables and JSON, pictures, and one sentence with exit code 2 for whatever a user can mend."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok import cli, demo
from vtok.api import session_of
from vtok.budget import solve
from vtok.errors import VtokError
from vtok.geometry import geometry
from vtok.values import option_value

from .models import build

PHOTO = Image.effect_mandelbrot((180, 120), (-2, -1.2, 1, 1.2), 60).convert("RGB")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    PHOTO.save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved compressed model."""
    path = tmp_path_factory.mktemp("model")
    vtok.save(vtok.compress(build("llava", layers=6), "uniform", keep=10), path)
    return path


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments: object) -> str:
    """What the command says on standard error; nothing but one sentence."""
    result = run(*arguments, code=2)
    assert "Traceback" not in result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.strip().count("\n") == 0
    return result.stderr


@pytest.mark.parametrize("command", [(), ("methods",), ("families",), ("show",), ("demo",), ("bench",)])
def test_help(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert "Usage" in result.stdout
    assert len(result.stdout.split()) > 20


def test_version_and_no_arguments() -> None:
    assert run("--version").stdout.strip() == f"vtok {vtok.__version__}"
    assert "Usage" in CliRunner().invoke(cli.app, []).output


def test_methods() -> None:
    rows = json.loads(run("methods", "--json").stdout)
    assert [row["name"] for row in rows] == vtok.methods()
    assert all(set(row) == {"name", "site", "summary", "paper", "families"} for row in rows)
    assert all(row["summary"] and row["families"] for row in rows)
    towers = json.loads(run("methods", "--family", "timm_vit", "--json").stdout)
    assert [row["name"] for row in towers] == vtok.methods("timm_vit")
    table = run("methods").stdout
    assert all(name in table for name in vtok.methods())
    assert "no family 'bert'" in refused("methods", "--family", "bert")


def test_families() -> None:
    rows = json.loads(run("families", "--json").stdout)
    assert [row["family"] for row in rows] == vtok.families()
    table = run("families").stdout
    assert all(name in table for name in vtok.families())


def test_families_in_words() -> None:
    known = vtok.families()
    languages = [name for name in known if not name.endswith("_vit")]
    assert cli._in_words(known, known) == "all"
    assert cli._in_words(languages, known) == "all VLMs"
    assert cli._in_words(languages[1:], known) == f"all VLMs but {languages[0]}"
    assert cli._in_words(known[1:], known) == f"all but {known[0]}"
    assert cli._in_words(["llava"], known) == "llava"


def test_show_with_random_weights(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = run("show", photo, "--method", "divprune", "--keep", 64, "--out", out)
    assert "visual tokens kept   64" in result.stdout
    assert "random weights" in result.stdout
    picture = Image.open(out)
    assert picture.width == picture.height  # LLaVA's processor crops
    made = json.loads(run("show", photo, "--keep", 0.5, "--out", out, "--json").stdout)
    assert made["tokens_kept"] == 288
    assert made["random_weights"] is True
    assert made["picture"] == str(out)


def test_show_with_a_folder(photo: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    shown = ("show", photo, "--model", folder, "--out", out, "--json")
    as_saved = json.loads(run(*shown).stdout)
    assert (as_saved["method"], as_saved["tokens_kept"], as_saved["random_weights"]) == ("uniform", 10, False)
    assert json.loads(run(*shown, "--keep", 7).stdout)["tokens_kept"] == 7
    chain = json.loads(run(*shown, "--method", "divprune+fastv", "--keep", 12, "--stages").stdout)
    assert chain["method"] == "divprune+fastv"
    assert Image.open(out).width > 2 * 448
    late = json.loads(run(*shown, "--method", "fastv", "--keep", 40, "-o", "k=3").stdout)
    assert late["stages"][0]["layer"] == 3


def test_show_with_a_processor(photo: Path, folder: Path, tmp_path: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "<image>": 3, "Describe": 10, "the": 11, "picture": 12, ".": 13}
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", extra_special_tokens={"image_token": "<image>"}
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    model = build("llava", layers=4)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    shown = ("show", photo, "--model", tmp_path / "model", "--keep", 9, "--out", tmp_path / "out.png", "--json")
    made = json.loads(run(*shown).stdout)
    assert (made["tokens_in"], made["tokens_kept"]) == (64, 9)
    processor.chat_template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}"
    )
    processor.save_pretrained(tmp_path / "model")
    assert json.loads(run(*shown).stdout)["kept"] == made["kept"]


def test_show_refuses_in_one_sentence(photo: Path, folder: Path, tmp_path: Path) -> None:
    assert "there is no file nothing.jpg" in refused("show", "nothing.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    assert "cannot be read as a picture" in refused("show", tmp_path / "text.jpg")
    assert "neither a folder nor one of the geometries" in refused("show", photo, "--model", "nowhere")
    assert "no method 'magic'" in refused("show", photo, "--model", folder, "--method", "magic")
    assert "--keep many is no budget" in refused("show", photo, "--keep", "many")
    assert "keep=1.7 is not a share" in refused("show", photo, "--model", folder, "--keep", 1.7)
    assert "--option k is not of the form" in refused("show", photo, "--option", "k")
    assert "give it as --keep" in refused("show", photo, "--option", "keep=3")
    assert "need a method" in refused("show", photo, "--model", folder, "--option", "k=3")
    out = ("--out", tmp_path / "out.nonsense")
    assert "cannot write the picture" in refused("show", photo, "--model", folder, *out)
    assert "holds no model" in refused("show", photo, "--model", tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("null", None),
        ("None", None),  # as messages name it
        ("True", True),
        ("false", False),
        ("[1, 2]", (1, 2)),
        ("last", "last"),
        ("none", "none"),  # a kind of quantiser
        ("", ""),
    ],
)
def test_values_of_options(text: str, value: Any) -> None:
    found = option_value(text)
    assert (found, type(found)) == (value, type(value))


def test_demo(photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    only = ("--model", "tiny-qwen2_5_vl", "--method", "divprune", "--method", "random_deep", "--repeats", 1)
    result = run("demo", "--out", out, "--photo", photo, *only)
    assert "random weights" in result.stdout
    assert "random_deep: cuts late" in result.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png",
        "tiny-qwen2_5_vl-divprune.png",
        "tiny-qwen2_5_vl-random_deep.png",
    ]
    assert "no method magic" in refused("demo", "--out", out, "--photo", photo, "--method", "magic")


def test_demo_json_with_the_bundled_photographs(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    only = ("--method", "downsample", "--repeats", 1)
    rows = json.loads(run("demo", "--out", tmp_path, "--json", *only).stdout)
    assert [(row["model"], row["method"]) for row in rows] == [(name, "downsample") for name in demo.MODELS]
    for row in rows:
        assert 0 < row["tokens_kept"] == row["average_tokens"] < row["tokens_in"]
        assert min(row["mac_ratio"], row["prefill_ms"], row["plain_ms"], row["speedup"]) > 0
        assert len(row["generated"]) == demo.NEW_TOKENS
        assert row["note"] == ""
        assert np.asarray(Image.open(tmp_path / row["picture"])).std() > 10


def test_demo_without_scikit_image_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert "pip install vtok[eval]" in refused("demo", "--out", tmp_path)


def test_a_method_that_refuses_keeps_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise VtokError("not today")

    monkeypatch.setattr(demo, "reachable", refuse)
    (row,) = demo.run(tmp_path, PHOTO, models=["tiny-llava"], methods=["uniform"], repeats=1)
    assert (row.note, row.picture, row.generated) == ("not today", "", ())


@pytest.mark.parametrize("name", demo.MODELS)
@torch.no_grad()
def test_late_cutters_get_a_budget_that_works(name: str) -> None:
    model = geometry(name)
    for method in vtok.methods():
        vtok.compress(model, method, keep=1.0)
        session = session_of(model)
        for tokens in (100, 294, 576):
            keep = demo.reachable(model, tokens, 8)
            assert keep == 8 or method in ("fastv", "random_deep", "transprune")
            entry = any(item.site != "decoder" for item in session.methods)
            solve(tokens, keep, session.depth, session.profile, entry)
    vtok.restore(model)
