"""Distilling resamplers: the recipes of the nano models, and ``vtok tokenizer distill`` on a folder of questions."""

from __future__ import annotations

import json
import sys
import tomllib
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok.resampler import command, files
from vtok.resampler.distill import Distillation, Recipe
from vtok_eval import scenes
from vtok_eval.models import nano, resamplers
from vtok_eval.train import resampler as recipes

ROOT = Path(__file__).parents[2]
NANO = ("nano-llava", "nano-qwen")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes of a few steps, and entry points as an installed copy has them."""
    tiny = {
        "config": {"width": 32, "head_dim": 16, "blocks": 1, "tokens": 16, "halting": True, "scheme": "salient"},
        "drawn": 2,
        "scenes": {"size": 2, "questions": 3, "pairs": 0.5, "lists": 0.5},
        "saliency": {"steps": 3, "rate": 1e-3},
        "features": {"steps": 3, "rate": 1e-3},
        "answers": {"steps": 3, "rate": 1e-3},
        "halting": {"steps": 2, "rate": 1e-3},
    }
    for name in NANO:
        monkeypatch.setitem(recipes.RECIPES, name, tiny)
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]

    def entry_points(group: str) -> list[EntryPoint]:
        return [EntryPoint(name, value, group) for name, value in points[group].items()]

    monkeypatch.setattr(command, "entry_points", entry_points)
    monkeypatch.setattr(files, "entry_points", entry_points)


def test_entry_points_name_what_is_there() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    for group in ("vtok.models", "vtok.resamplers", "vtok.distill"):
        for value in points[group].values():
            module, name = value.split(":")
            assert callable(getattr(import_module(module), name))


@pytest.mark.grad
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NANO)
def test_a_nano_resampler_from_drawing_to_use(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = nano.blank(name, scenes.words())
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(resamplers, "DATA", tmp_path / "shipped")
    with pytest.raises(vtok.VtokError, match=f"came without the resampler {name}; train it: python -m vtok_eval.train"):
        vtok.compress(model, "flextok", keep=9, weights=name)
    folder = recipes.run(name, tmp_path / "run", loaded=(model, processor))
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert stages == ["saliency", "features", "answers", "halting"]
    folder.rename(tmp_path / name)
    (tmp_path / "shipped").mkdir()
    (tmp_path / name).rename(tmp_path / "shipped" / name)
    assert files.load(name).leave.weight.abs().max() > 0
    # as the harness uses it
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(text=[text], images=[Image.new("RGB", (448, 448), "red")], return_tensors="pt")
    with torch.no_grad():
        for keep in (9, "auto"):
            vtok.compress(model, "flextok", keep=keep, weights=name)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert vtok.report(model).tokens_kept == 9 if keep == 9 else vtok.report(model).tokens_kept <= 16
    # a second run finds what was drawn and every stage done
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "drawn").iterdir()}
    recipes.run(name, tmp_path / "run", loaded=(vtok.restore(model), processor))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "drawn").iterdir()} == before
    again = files.load(tmp_path / "run" / "resampler")
    assert torch.equal(again.leave.weight, files.load(name).leave.weight)
    # a head alone, for tokens that stay
    start = tmp_path / "run" / "resampler"
    headed = files.load(recipes.run(name, tmp_path / "head", start=start, loaded=(model, processor))).state_dict()
    changed = {key for key, value in again.state_dict().items() if not torch.equal(value, headed[key])}
    assert changed and all(key.startswith("halting.") for key in changed)
    lines = (tmp_path / "head" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["halting"]
    other = "nano-qwen" if name == "nano-llava" else "nano-llava"
    with pytest.raises(vtok.VtokError, match=r"belong to a .* model, and this is a"):
        recipes.run(other, tmp_path / "other", start=start, loaded=nano.blank(other, scenes.words()))


@pytest.mark.usefixtures("short")
def test_what_scenes_are_not_drawn_for(tmp_path: Path) -> None:
    for model in ("small-llava", str(tmp_path)):
        with pytest.raises(vtok.VtokError, match=r"scenes are drawn for nano-llava, nano-qwen.*as --data"):
            recipes.distill(model, tmp_path / "out")
    with pytest.raises(vtok.VtokError, match="no recipe for a resampler of 'small-llava'"):
        recipes.run("small-llava", tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Questions and pictures."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    lines = []
    for number, colour in enumerate(("red", "blue", "green")):
        Image.new("RGB", (90, 60), colour).save(data / "images" / f"{colour}.png")
        lines.append({"image": f"{colour}.png", "question": "what colour?", "answer": colour, "id": str(number)})
    lines.append({"images": ["red.png", "blue.png"], "question": "the same colour?", "answer": "no"})
    (data / "asked.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return data


def invoke(*arguments: object) -> Any:
    from vtok.tokenizers.app import app

    return CliRunner().invoke(app, ["distill", *map(str, arguments)])


@pytest.mark.grad
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NANO)
def test_distil_a_folder_from_the_command_line(name: str, folder: Path, tmp_path: Path) -> None:
    model, processor = nano.blank(name, scenes.words())
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    sizes = ("--tokens", 8, "--width", 64, "--blocks", 1)
    steps = ("--saliency", 2, "--features", 2, "--answers", 2, "--halting", 1, "--batch", 2, "--device", "cpu")
    out = tmp_path / "out"
    result = invoke("--model", tmp_path / "model", "--data", folder, "--out", out, *sizes, *steps, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout.strip().splitlines()[-1])
    assert said["folder"] == str(out / "resampler") and said["tokens"] == 8
    vtok.compress(model, "flextok", keep=4, weights=said["folder"])
    assert files.load(said["folder"]).leave.weight.abs().max() > 0


@pytest.fixture
def peft() -> None:
    """Skips where peft is missing, or not the one that this transformers asks for."""
    from vtok.resampler.lora import Lora

    pytest.importorskip("peft")
    try:
        Lora(nano.blank("nano-llava", scenes.words())[0], 1)
    except vtok.VtokError as error:
        if "does not work with this peft" not in str(error):
            raise
        pytest.skip(f"peft and transformers do not fit: {error}")


def test_an_unfit_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtok.resampler.lora import Lora

    def refuse(*_: Any) -> None:
        raise ValueError("The version of PEFT you are using is not compatible")

    pytest.importorskip("peft")
    model, _ = nano.blank("nano-llava", scenes.words())
    monkeypatch.setattr(model, "add_adapter", refuse)
    with pytest.raises(vtok.VtokError, match=r"does not work with this peft .* upgrade peft"):
        Lora(model, 1)


@pytest.mark.grad
@pytest.mark.usefixtures("short", "peft")
@pytest.mark.parametrize("name", NANO)
def test_a_low_rank_change_is_learnt_along(name: str, folder: Path, tmp_path: Path) -> None:
    model, processor = nano.blank(name, scenes.words())
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    sizes = ("--tokens", 8, "--width", 64, "--blocks", 1, "--lora", 2, "--rate", 0.02)
    steps = ("--saliency", 1, "--features", 1, "--answers", 3, "--halting", 1, "--batch", 2, "--device", "cpu")
    out = tmp_path / "out"
    result = invoke("--model", tmp_path / "model", "--data", folder, "--out", out, *sizes, *steps)
    assert result.exit_code == 0, result.output
    assert "load_adapter" in result.stdout
    inputs = processor(text=[processor.image_token], images=[Image.new("RGB", (112, 112), "red")], return_tensors="pt")

    def said(network: Any) -> torch.Tensor:
        with torch.no_grad(), vtok.compressed(network, "flextok", keep=2, weights=str(out / "resampler")):
            return network(**inputs).logits[0, -1]

    before = said(model)
    torch.testing.assert_close(said(vtok.io.plain(tmp_path / "model", dtype=torch.float32)), before)
    model.load_adapter(str(out / "adapter"))
    assert (said(model) - before).abs().max() > 1e-4
    model.disable_adapters()
    torch.testing.assert_close(said(model), before)
    # a run that was stopped goes on, to the same weights
    (out / "answers.safetensors").unlink()
    first = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert invoke("--model", tmp_path / "model", "--data", folder, "--out", out, *sizes, *steps).exit_code == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == first


def test_what_lora_cannot_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtok.resampler.lora import Lora

    model, _ = nano.blank("nano-llava", scenes.words())
    with pytest.raises(vtok.VtokError, match="a rank of 1 or more"):
        Recipe(lora=4, answers=0)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "peft", None)
        with pytest.raises(vtok.VtokError, match="lora needs peft"):
            Lora(model, 4)


@pytest.mark.usefixtures("peft")
def test_a_second_change_is_refused() -> None:
    from vtok.resampler.lora import Lora

    model, _ = nano.blank("nano-llava", scenes.words())
    lora = Lora(model, 4)
    assert len(lora.changes) == 2 * 2 * 12
    with pytest.raises(vtok.VtokError, match="already has an adapter"):
        Lora(model, 4)


@pytest.mark.grad
def test_what_is_captured_is_what_the_resampler_gets(folder: Path) -> None:
    from vtok.resampler import FeatureReader, OrderedResampler, ResamplerConfig
    from vtok.resampler.data import Batches, read
    from vtok.resampler.learn import Features

    model, processor = nano.blank("nano-qwen", scenes.words())
    config = ResamplerConfig(dim=160, width=32, head_dim=16, blocks=1, tokens=8)
    learned = Features(OrderedResampler(config), FeatureReader(config, 1))
    distillation = Distillation(model, learned, Recipe(batch=2))
    batch = Batches(read(folder), processor, 4, 1, "0")[0]
    pictures = distillation.pictures(batch)
    assert len(pictures) == 5
    assert all(len(x) == rows * columns for x, (rows, columns) in pictures)
    assert [processor.tokenizer.decode(batch.target[: batch.lengths[0]], skip_special_tokens=True)] != [""]
    loss, numbers = distillation.answers(batch)
    loss.backward()
    assert learned.resampler.leave.weight.grad.abs().sum() > 0
    assert numbers["kl long"] >= 0
    assert "_vtok" not in model.__dict__


@pytest.mark.grad
@pytest.mark.parametrize("name", NANO)
def test_what_answers_hang_on_is_all_that_is_learnt_first(name: str, folder: Path) -> None:
    from vtok.resampler import FeatureReader, OrderedResampler, ResamplerConfig
    from vtok.resampler.data import Batches, read
    from vtok.resampler.learn import Features

    model, processor = nano.blank(name, scenes.words())
    dim = {"nano-llava": 384, "nano-qwen": 160}[name]
    config = ResamplerConfig(dim=dim, width=32, head_dim=16, blocks=1, tokens=8, scheme="salient")
    learned = Features(OrderedResampler(config), FeatureReader(config, 1))
    distillation = Distillation(model, learned, Recipe(batch=4))
    batch = Batches(read(folder), processor, 4, 1, "0")[0]
    loss, numbers = distillation.saliency(batch)
    loss.backward()
    # a head that knows nothing names nine tenths of the tokens alike
    sizes = [len(x) for x, _ in distillation.pictures(batch)]
    assert numbers["perplexity"] == pytest.approx(0.9 * sum(sizes) / len(sizes), rel=0.05)
    changed = [key for key, p in learned.named_parameters() if p.grad is not None]
    assert changed and all(key.startswith("resampler.saliency.") for key in changed)
    assert all(p.grad is None for p in model.parameters()) and "_vtok" not in model.__dict__


@pytest.mark.grad
def test_the_head_learns_from_answers_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtok.resampler import FeatureReader, OrderedResampler, ResamplerConfig, distill
    from vtok.resampler.data import Singles, read
    from vtok.resampler.learn import Features

    model, processor = nano.blank("nano-llava", scenes.words())
    config = ResamplerConfig(dim=384, width=32, head_dim=16, blocks=1, tokens=8, halting=True)
    learned = Features(OrderedResampler(config), FeatureReader(config, 1))
    torch.nn.init.normal_(learned.resampler.leave.weight, std=20.0)  # nothing is what it was
    given: list[tuple[list[int], list[bool]]] = []

    def loss(logits: Any, same: torch.Tensor) -> torch.Tensor:
        given.append(([len(own) for own in logits], same.tolist()))
        return torch.cat(list(logits)).sum()

    monkeypatch.setattr(distill, "agreement_loss", loss)
    asked = Singles(read(folder), processor, 4, 1, "0")[0]
    assert [len(one.lengths) for one in asked] == [1] * 4
    distillation = Distillation(model, learned, Recipe(batch=4))
    total, numbers = distillation.halting(asked)
    total.backward()
    ((pictures, same),) = given
    assert sorted(pictures) == [1, 1, 1, 2]
    assert numbers == {"same": sum(same) / 4}
    changed = [name for name, p in learned.named_parameters() if p.grad is not None]
    assert changed and all(name.startswith("resampler.halting.") for name in changed)
    assert "_vtok" not in model.__dict__
    # tokens that are the picture's own, and all of them: nothing can change
    torch.nn.init.zeros_(learned.resampler.leave.weight)
    monkeypatch.setattr(distill, "prefixes", lambda most: (most, most))
    whole = ResamplerConfig(dim=384, width=32, head_dim=16, blocks=1, tokens=1024, halting=True, scheme="farthest")
    learned.resampler = OrderedResampler(whole)
    assert distillation.halting(asked)[1] == {}  # pictures stay whole


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", r"asked.jsonl, line 5: not a JSON object"),
        ('{"image": "red.png", "question": "what?"}', r"line 5: not a JSON object with image.*'answer'"),
        ('{"image": "no.png", "question": "what?", "answer": "it"}', r"line 5: there is no picture no.png"),
    ],
)
def test_wrong_questions(folder: Path, line: str, match: str) -> None:
    from vtok.resampler.data import read

    with (folder / "asked.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(vtok.VtokError, match=match):
        read(folder)


@pytest.mark.usefixtures("short")
def test_wrong_calls(tmp_path: Path) -> None:
    from vtok.resampler.data import read

    with pytest.raises(vtok.VtokError, match=r"no folder nowhere, and no data of that name; named data here: scenes"):
        command.distill("nano-llava", tmp_path, "nowhere")
    with pytest.raises(vtok.VtokError, match=r"holds no \.jsonl file"):
        read(tmp_path)
    with pytest.raises(vtok.VtokError, match="a rate above 0"):
        Recipe(rate=0)
    with pytest.raises(vtok.VtokError, match="dtype 'float8' is unknown"):
        command._loaded("nano-llava", "cpu", "float8")


def test_a_hub_id_goes_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(name: str, **_: Any) -> None:
        asked.append(name)
        raise OSError("the hub is out of reach\nand more")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", refuse)
    with pytest.raises(vtok.VtokError, match=r"model and processor of some/model: the hub is out of reach$"):
        command._loaded("some/model", "cpu", "float32")
    with pytest.raises(vtok.VtokError, match="there is no folder some_model; give one"):
        command._loaded("some_model", "cpu", "float32")
    assert asked == ["some/model"]
