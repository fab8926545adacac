"""``vtok tokenizer``: from pictures to tokens and back, on a tokenizer that was trained for seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from vtok import cli
from vtok.tokenizers import FlexTok
from vtok.tokenizers.store import KINDS, read

pytestmark = pytest.mark.grad
COMMANDS = ("train", "encode", "decode", "show", "stats")


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["tokenizer", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def refused(*arguments: object) -> str:
    result = run(*arguments, code=2)
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty soft blobs of colour and one broken file."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for place in range(30):
        coarse = torch.randint(0, 256, (3, 3, 3), generator=generator, dtype=torch.uint8)
        picture = Image.fromarray(coarse.numpy()).resize((48, 40), Image.Resampling.BICUBIC)
        picture.save(folder / f"{place:02d}.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder of a training, and what it printed."""
    out = tmp_path_factory.mktemp("run")
    given = ["--data", pictures, "--preset", "test", "--steps", 12, "--batch", 4, "--share", 0.2, "--out", out]
    return out, run("train", *given, "--device", "cpu")


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help(command: tuple[str, ...]) -> None:
    assert len(run(*command, "--help").stdout.split()) > 30


def test_the_command_is_found() -> None:
    assert "tokenizer" in CliRunner().invoke(cli.app, ["--help"]).output


def test_training_leaves_a_tokenizer_and_its_measures(trained: tuple[Path, Any], pictures: Path) -> None:
    out, printed = trained
    assert isinstance(FlexTok.from_pretrained(out / "tokenizer"), FlexTok)
    report = json.loads((out / "report.json").read_text())[pictures.name]
    assert [row["k"] for row in report["curve"]["rows"]] == [1, 2, 4, 8]
    assert len(report["statistics"]["positions"]) == 8
    assert report["curve"]["pictures"] + len(report["left_out"]) == 6
    assert Image.open(out / f"{pictures.name}.png").size[0] > 5 * 128
    assert "PSNR" in printed.stdout and "positions" in printed.stdout


def test_a_finished_training_is_not_done_again(trained: tuple[Path, Any], pictures: Path) -> None:
    out, _ = trained
    before = (out / "log.jsonl").read_text()
    given = ["--data", pictures, "--preset", "test", "--batch", 4, "--share", 0.2, "--out", out, "--device", "cpu"]
    found = json.loads(run("train", *given, "--steps", 12, "--json").stdout)
    assert found == json.loads((out / "report.json").read_text())
    assert (out / "log.jsonl").read_text() == before
    assert "other settings (steps: 12 there, 13 here)" in refused("train", *given, "--steps", 13)


def test_another_decoder_for_the_same_tokens(trained: tuple[Path, Any], pictures: Path, tmp_path: Path) -> None:
    out, _ = trained
    given = ["--data", pictures, "--steps", 1, "--batch", 4, "--share", 0.2, "--start", out, "--device", "cpu"]
    run("train", *given, "-o", "decoder=flow", "--out", tmp_path / "flow")
    old, new = (FlexTok.from_pretrained(folder / "tokenizer") for folder in (out, tmp_path / "flow"))
    images = torch.rand(2, 3, 32, 32)
    assert new.config.decoder == "flow" and torch.equal(new.encode(images), old.encode(images))
    run("encode", out, pictures, "--limit", 2, "--out", tmp_path / "tokens.safetensors")
    run("decode", tmp_path / "flow", tmp_path / "tokens.safetensors", "--steps", 2, "--out", tmp_path / "drawn")
    assert len(list((tmp_path / "drawn").iterdir())) == 2
    assert "leave one of them out" in refused("train", *given, "--preset", "test", "--out", tmp_path / "both")
    assert "tokens is 4 here and 8 there" in refused("train", *given, "-o", "tokens=4", "--out", tmp_path / "other")


def test_tokens_go_to_a_file_and_back(trained: tuple[Path, Any], pictures: Path, tmp_path: Path) -> None:
    out, _ = trained
    file = tmp_path / "tokens.safetensors"
    result = run("encode", out, pictures, "--out", file)
    assert "left out broken.jpg" in result.stderr and "30 pictures, 8 tokens each" in result.stdout
    tokens = read(file)
    assert len(tokens.rows) == 30 and tokens.codes == 64000 and tokens.labels[0] == "00.png"
    assert 30 * 8 * 2 < file.stat().st_size < 30 * 8 * 2 + 2000

    written = json.loads(run("decode", out, file, "--out", tmp_path / "back", "--json").stdout)
    assert len(written) == 30 and written[0].endswith("000000-00.png")
    tok = FlexTok.from_pretrained(out / "tokenizer")
    wanted = tok.decode(torch.stack(tokens.rows[:1]))[0]
    found = torch.from_numpy(np.array(Image.open(written[0]))).permute(2, 0, 1) / 255
    assert (found - wanted).abs().max() < 1 / 255
    run("decode", out, file, "--out", tmp_path / "few", "-k", 2, "--limit", 3)
    assert len(list((tmp_path / "few").iterdir())) == 3
    assert (tmp_path / "few" / "000001-01.png").read_bytes() != (tmp_path / "back" / "000001-01.png").read_bytes()
    assert "from 1 to 8" in refused("encode", out, pictures, "-k", 9, "--out", tmp_path / "none")


def test_tokens_of_another_tokenizer_are_refused(trained: tuple[Path, Any], pictures: Path, tmp_path: Path) -> None:
    FlexTok.preset("test").save_pretrained(tmp_path / "other")
    run("encode", tmp_path / "other", pictures / "03.png", "--out", tmp_path / "t.safetensors")
    assert "another tokenizer" in refused("decode", trained[0], tmp_path / "t.safetensors", "--out", tmp_path / "none")


@pytest.mark.parametrize(("bits", "most"), [(None, 0.002), (6, 0.5)])
def test_continuous_tokens_are_stored_in_few_bits(
    bits: int | None, most: float, pictures: Path, tmp_path: Path
) -> None:
    tok = FlexTok.preset("test", quantiser="none", code_dim=4).eval()
    tok.save_pretrained(tmp_path / "tok")
    file = tmp_path / "t.safetensors"
    given = ["encode", tmp_path / "tok", pictures, "--out", file, "--json", *(() if bits is None else ("--bits", bits))]
    found = json.loads(run(*given).stdout)
    assert found["pictures"] == 30 and list(found["left_out"]) == ["broken.jpg"]
    numbers = 30 * 8 * 4 * (bits or 16) // 8
    assert numbers < found["bytes"] < numbers + 2500
    tokens = read(file)
    assert tokens.codes is None and tokens.rows[0].shape == (8, 4)
    from vtok.tokenizers.data import find, view

    image = view(find(pictures).picture(0), 32)
    wanted = tok.encode(image[None])[0]
    assert (tokens.rows[0] - wanted).abs().max() < most * wanted.std()
    run("decode", tmp_path / "tok", file, "--out", tmp_path / "back", "-k", 3)
    assert "continuous" in refused("stats", file)
    assert "continuous" in refused("stats", tmp_path / "tok", "--data", pictures)


def test_bits_are_for_continuous_tokens(trained: tuple[Path, Any], pictures: Path, tmp_path: Path) -> None:
    assert "leave it out" in refused("encode", trained[0], pictures, "--bits", 4, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_as_many_tokens_as_it_takes(pictures: Path, tmp_path: Path) -> None:
    FlexTok.preset("test", halting=True).save_pretrained(tmp_path / "tok")
    file = tmp_path / "t.safetensors"
    run("encode", tmp_path / "tok", pictures, "-k", "auto", "--quality", 0.1, "--out", file)
    assert all(1 <= len(row) <= 8 for row in read(file).rows)
    run("decode", tmp_path / "tok", file, "--out", tmp_path / "back")
    run("stats", file)


def test_reconstructions_are_drawn(trained: tuple[Path, Any], pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "sheet.png"
    found = json.loads(run("show", trained[0], pictures, "--out", out, "-k", "1,3,8", "--rows", 2, "--json").stdout)
    assert [row["k"] for row in found["curve"]["rows"]] == [1, 3, 8]
    assert found["curve"]["pictures"] == 30
    assert Image.open(out).size == (8 + 4 * 136, 23 + 8 + 2 * (128 + 31))
    assert "PSNR" in run("show", trained[0], pictures / "01.png", "--out", out).stdout
    assert "such as out.png" in refused("show", trained[0], pictures, "--out", tmp_path / "sheet.xyz")


@pytest.mark.parametrize("kind", ["npy", "jsonl", "safetensors"])
def test_statistics_of_any_tokenizer(kind: str, tmp_path: Path) -> None:
    tokens = torch.randint(0, 50, (200, 6), generator=torch.Generator().manual_seed(0))
    file = tmp_path / f"t.{kind}"
    if kind == "npy":
        np.save(file, tokens.numpy().astype("int32"))
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in tokens.tolist()))
    else:
        save_file({"anything": tokens.int()}, file)
    found = json.loads(run("stats", file, "--codes", 60, "--levels", "6,10", "--json").stdout)
    assert (found["images"], found["tokens"], found["codes"], found["used"]) == (200, 1200, 60, 50)
    assert abs(found["zipf"][0]["exponent"]) < 0.15 and len(found["positions"]) == 6
    printed = run("stats", file).stdout
    assert "Zipf" in printed and "dead tail" in printed and "gzip" in printed


def test_statistics_with_a_tokenizer(trained: tuple[Path, Any], pictures: Path) -> None:
    found = json.loads(run("stats", trained[0], "--data", pictures, "--json").stdout)
    assert found["images"] == 30 and found["codes"] == 64000 and found["positions"][0]["channels"] is not None
    assert "add --data" in refused("stats", trained[0])


def test_codes_are_stored_in_the_narrowest_kind() -> None:
    assert next(kind for most, kind in KINDS.items() if most >= 64000) == torch.uint16


def test_what_cannot_be_done_is_told(trained: tuple[Path, Any], pictures: Path, tmp_path: Path) -> None:
    out = trained[0]
    assert "neither a folder nor an installed tokenizer" in refused("encode", "nowhere", pictures)
    assert "has no config.json" in refused("encode", pictures, pictures)
    assert "no folder of pictures" in refused("encode", out, "nowhere")
    assert "no end" in refused("encode", out, "scenes", "--out", tmp_path / "none")
    assert "there is no file" in refused("decode", out, tmp_path / "none.safetensors")
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    assert "cannot be read as tokens" in refused("decode", out, tmp_path / "odd.safetensors")
    assert "no ending" in refused("stats", pictures / "00.png")
    np.save(tmp_path / "floats.npy", np.zeros((3, 3)))
    assert "cannot be read as tokens" in refused("stats", tmp_path / "floats.npy")
    assert "no tokenizer preset" in refused("train", "--preset", "huge", "--out", tmp_path / "run")
    assert "no option" in refused("train", "--data", pictures, "-o", "colour=3", "--out", tmp_path / "run")
    assert "name=value" in refused("train", "--data", pictures, "-o", "colour", "--out", tmp_path / "run")
    assert "REPA" in refused("train", "--data", pictures, "-o", "repa=8", "--out", tmp_path / "run")
    assert "whole numbers" in refused("show", out, pictures, "-k", "1,two")
    assert not (tmp_path / "run").exists()
