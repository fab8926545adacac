"""`vtok.export.export` and `vtok export`: checked, written, loaded again, asked; or nothing but the reason."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

import vtok
from vtok.api import adapter_of
from vtok.cli import app
from vtok.errors import VtokError
from vtok.export import answers, export, probes, verify, writing
from vtok.io import CONFIG, SHIM
from vtok.resampler import OrderedResampler, ResamplerConfig, files

from ...eval import tiny as small

QUICK: dict[str, Any] = {"samples": 3, "new_tokens": 3, "bar": False}


def built(family: str) -> tuple[Any, Any]:
    return small.build(family)


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    model, processor = built("llava")
    vtok.compress(model, "visionzip", keep=8)
    made = export(model, tmp_path / "out", processor=processor, name="some-llava", command="vtok export", **QUICK)
    assert verify(tmp_path / "out") == made
    assert made.target == "hf" and made.precision == "fp32" and made.plan is None
    assert made.source["name"] == "some-llava" and made.source["family"] == "llava"
    assert made.compression == {
        "methods": [{"name": "visionzip", "options": {}}],
        "keep": 8,
        "positions": json.loads((tmp_path / "out" / CONFIG).read_text())["positions"],
    }
    assert {"config.json", "model.safetensors", CONFIG, f"{SHIM}.py", "tokenizer.json"} <= made.files.keys()
    found = made.parity
    assert found is not None and found.passed and found.fresh_process
    assert (found.samples, found.answers_equal, found.kept_equal, found.source) == (3, 3, 3, "bundled")
    # another process may place its arrays otherwise, and matrix products then round otherwise
    assert found.max_logit_difference < 1e-5 * found.logit_range
    assert found.accuracy == found.reference_accuracy
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_manifest_names_trained_weights_as_they_were_asked_for(tmp_path: Path) -> None:
    model, processor = built("llava")
    door = files.door(adapter_of(model))
    sizes = {"dim": door.dim, "width": 32, "head_dim": 16, "blocks": 1, "tokens": 8}
    weights = str(files.save(OrderedResampler(files.made_for(ResamplerConfig(**sizes), door)), tmp_path / "mine"))
    vtok.compress(model, "flextok", keep=4, weights=weights)
    made = export(model, tmp_path / "out", processor=processor, fresh=False, **QUICK)
    assert made.compression["methods"] == [{"name": "flextok", "options": {"weights": weights}}]
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["methods"][0]["options"] == {"weights": "flextok"}


def test_a_pipeline_over_an_exported_folder(tmp_path: Path) -> None:
    model, processor = built("llava")
    vtok.compress(model, "divprune", keep=8)
    export(model, tmp_path / "out", processor=processor, fresh=False, **QUICK)
    task = transformers.pipeline("image-text-to-text", model=str(tmp_path / "out"), trust_remote_code=True)
    text = f"{processor.image_token}\nwhat?"
    picture = small.picture("1")
    said = task(images=picture, text=text, max_new_tokens=3, return_full_text=False)
    assert vtok.report(task.model).tokens_kept == 8
    inputs = processor(images=picture, text=text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said[0]["generated_text"].strip() == processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_method_inside_the_decoder_and_no_processor(tmp_path: Path) -> None:
    model, _ = built("qwen2_5_vl")
    vtok.compress(model, "fastv", keep=0.75)
    made = export(model, tmp_path / "out", **QUICK)
    assert made.parity is not None and made.parity.passed and made.parity.source == "drawn pictures"
    assert made.parity.accuracy is None


def test_half_precision_is_judged_by_its_logits(tmp_path: Path) -> None:
    model, _ = built("llava")
    vtok.compress(model, "uniform", keep=8)
    made = export(model, tmp_path / "out", precision="fp16", fresh=False, **QUICK)
    assert made.precision == "fp16" and made.parity is not None
    assert "5%" in made.parity.rule and 0 < made.parity.max_logit_difference < 0.05 * made.parity.logit_range


def test_choices_that_hang_on_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export may choose otherwise as often as the model does when its pixels change in their last bit."""
    model, processor = built("llava")
    vtok.compress(model, "divprune", keep=8)
    asked, of_model = answers.of_folder, answers.of_model
    nudges: list[float] = []

    def otherwise(found: list[answers.Answer]) -> list[answers.Answer]:
        return [dataclasses.replace(one, kept=(0, *one.kept[1:-1], 99)) for one in found]

    def steady(*args: Any, nudge: float = 0.0) -> list[answers.Answer]:
        nudges.append(nudge)
        return of_model(*args, nudge=nudge)

    monkeypatch.setattr(answers, "of_folder", lambda *args: otherwise(asked(*args)))
    monkeypatch.setattr(answers, "of_model", steady)
    with pytest.raises(VtokError, match=r"at least 99\.00% of the kept tokens shared"):
        export(model, tmp_path / "out", processor=processor, fresh=False, **QUICK)
    assert nudges[-1] == 2.0**-23
    monkeypatch.setattr(
        answers, "of_model", lambda *args, nudge=0.0: (otherwise if nudge else list)(of_model(*args, nudge=nudge))
    )
    found = export(model, tmp_path / "out", processor=processor, fresh=False, **QUICK).parity
    assert found is not None and found.shared_with_itself == found.kept_shared < 0.99


def test_nudged_pixels_are_seeded_and_close() -> None:
    model, processor = built("llava")
    vtok.compress(model, "divprune", keep=8)
    questions, _ = probes.find(model, processor, count=2)
    ask = functools.partial(answers.of_model, model, processor, questions, 1, lambda steps: None)
    plain, one, two, far = (torch.stack([a.logits for a in ask(nudge=size)]) for size in (0, 2**-23, 2**-23, 0.1))
    assert torch.equal(one, two)
    torch.testing.assert_close(one, plain, atol=1e-4, rtol=0)
    assert (far - plain).abs().max() > 1e-4


def test_other_answers_leave_nothing_but_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built("llava")
    vtok.compress(model, "uniform", keep=8)
    true = answers.of_folder

    def damaged(folder: Path, *rest: Any) -> Any:
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, "keep": 4}))
        return true(folder, *rest)

    monkeypatch.setattr(answers, "of_folder", damaged)
    with pytest.raises(VtokError, match=r"the hf export does not answer .* nothing was written"):
        export(model, tmp_path / "out", fresh=False, **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_process_that_fails_says_why(tmp_path: Path) -> None:
    model, _ = built("llava")

    @vtok.register("only_here")
    class OnlyHere(vtok.get("uniform").__class__):  # type: ignore[misc]
        pass

    try:
        vtok.compress(model, "only_here", keep=8)
        with pytest.raises(VtokError, match=r"does not work in a fresh process.*'only_here', which is not registered"):
            export(model, tmp_path / "out", **QUICK)
        assert list(tmp_path.iterdir()) == []
        assert export(model, tmp_path / "out", fresh=False, **QUICK).parity is not None
    finally:
        from vtok.method import _REGISTRY

        del _REGISTRY["only_here"]


def test_refusals(tmp_path: Path) -> None:
    model, processor = built("llava")
    with pytest.raises(VtokError, match="is not compressed"):
        export(model, tmp_path / "out")
    vtok.compress(model, "divprune", keep=8)
    with pytest.raises(VtokError, match="no target 'gguf'; known are hf, onnx, openvino, pt2"):
        export(model, tmp_path / "out", to="gguf")
    with pytest.raises(VtokError, match="nothing needs to be fixed"):
        export(model, tmp_path / "out", fixed=True, **QUICK)
    with pytest.raises(VtokError, match="at least 1 question"):
        export(model, tmp_path / "out", samples=[])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(VtokError, match="holds other files"):
        export(model, tmp_path / "out", processor=processor, **QUICK)


def test_what_graphs_leave_out_is_left_out_of_the_comparison() -> None:
    model, _ = built("llava")
    vtok.compress(model, ["divprune", vtok.get("todre", decision=0.5)], keep=8, positions="keep")
    plan = {"left_out": ["todre"]}
    with writing._without_late(model, plan):
        assert vtok.api.session_of(model).methods[-1].decision is None
        assert vtok.api.session_of(model).keep == 8
    assert vtok.api.session_of(model).methods[-1].decision == 0.5
    vtok.compress(model, "fastv", keep=0.75)
    with pytest.raises(VtokError, match="no option that takes its stage"), writing._without_late(model, plan):
        pass


# -- the command --------------------------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["export", *words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, processor = built("llava")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["--samples", "2", "--new-tokens", "2"]
    done = run(str(folder), str(out), "--method", "todre", "-o", "decision=null", "--keep", "8", *asked)
    assert done.exit_code == 0, done.output
    assert "2 of 2 answers equal (bundled)" in done.output
    assert f'vtok.load("{out}")' in done.output.replace("\n", "")
    made = verify(out)
    assert made.precision == "bf16"  # as the file was
    assert made.compression["methods"] == [{"name": "todre", "options": {"decision": None}}]
    assert made.parity is not None and made.parity.max_logit_difference == 0.0
    # a folder that says how it is compressed is exported as it is
    assert run(str(out), str(tmp_path / "again"), "--precision", "fp32", *asked).exit_code == 0
    assert verify(tmp_path / "again").compression == made.compression
    done = run(str(folder), str(out), "--method", "uniform", "--keep", "8", *asked)
    assert done.exit_code == 2 and "--overwrite" in done.output
    done = run(str(folder), str(out), "--method", "uniform", "--keep", "8", "--overwrite", "--json", *asked)
    assert done.exit_code == 0 and json.loads(done.stdout)["compression"]["methods"][0]["name"] == "uniform"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "OUT", "--method", "uniform", "--keep", "8"], "'nowhere' is no folder, no embedded model"),
        (["MODEL", "OUT"], "does not say how to compress it; name a method"),
        (["MODEL", "OUT", "--method", "nothing", "--keep", "8"], "no method 'nothing'"),
        (["MODEL", "OUT", "--method", "uniform"], "uniform needs a budget"),
        (["MODEL", "OUT", "--method", "uniform", "--keep", "8", "--to", "gguf"], "--to gguf is unknown"),
        (["MODEL", "OUT", "--method", "uniform", "--keep", "8", "--size", "448"], "--size 448 is not of the form"),
    ],
)
def test_bad_words(words: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    named = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    done = run(*(named.get(word, word) for word in words))
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


# -- graphs -------------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert vtok.export.export is export
    from vtok.export import runtime

    assert all(getattr(vtok, name) is getattr(runtime, name) for name in ("OnnxVLM", "OpenVinoVLM", "Pt2VLM"))
    with pytest.raises(AttributeError, match="no attribute 'GgufVLM'"):
        _ = vtok.GgufVLM


@pytest.mark.parametrize(("to", "package"), [("pt2", "torch"), ("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_graphs_answer_as_the_model_does(to: str, package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    model, processor = built("llava")
    vtok.compress(model, vtok.get("todre", decision=0.5), keep=8)
    with pytest.raises(VtokError, match="second stage inside the decoder"):
        export(model, tmp_path / "out", to, processor=processor, **QUICK)
    made = export(model, tmp_path / "out", to, processor=processor, fixed=True, fresh=to == "onnx", **QUICK)
    assert verify(tmp_path / "out") == made
    assert made.plan is not None and made.plan["kept"] == 8 and made.plan["left_out"]
    assert {"config.json", CONFIG, "tokenizer.json"} <= made.files.keys()
    found = made.parity
    assert found is not None and found.answers_equal == found.kept_equal == 3
    assert vtok.api.session_of(model).methods[0].decision == 0.5


def test_int8(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, _ = built("llava")
    vtok.compress(model, "divprune", keep=8)
    made = export(model, tmp_path / "out", "onnx", precision="int8", fresh=False, **QUICK)
    assert made.precision == "int8" and made.parity is not None and "30%" in made.parity.rule
    with pytest.raises(VtokError, match="pt2 has no precision int8; take fp32"):
        export(model, tmp_path / "other", "pt2", precision="int8", **QUICK)
