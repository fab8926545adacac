"""A folder for the auto classes of transformers: the same model in a fresh process, with and without remote code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import vtok
from vtok.api import session_of
from vtok.errors import VtokError
from vtok.export import hf
from vtok.io import CONFIG, SHIM

from ... import models
from ...models import FAMILIES, inputs

PROMPT = [[5, "image", 4]]
METHODS = {"flowcut": 0.4, "fastv": 0.5, "divprune": 12}  # a tower's, a decoder's, one between them

RELOAD = """
import sys, torch, transformers, vtok
folder, how = sys.argv[1:]
if how == "load":
    model = vtok.load(folder)
else:
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
batch = torch.load(folder + "/../batch.pt")
with torch.no_grad():
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
kept = [[image.tolist() for image in sample] for sample in vtok.report(model).kept]
torch.save((type(model).__name__, logits, tokens, kept), folder + "/../found.pt")
"""


def fresh(folder: Path, code: str, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with a cache of its own for remote code."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules"), **changes}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), *words], env=environment, capture_output=True, text=True, timeout=300
    )


def outcome(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Any]:
    logits = model(**batch).logits
    tokens = model.generate(**batch, max_new_tokens=4, do_sample=False)
    return logits, tokens, [[image.tolist() for image in sample] for sample in vtok.report(model).kept]


@pytest.mark.parametrize(("family", "method", "how"), [("llava", "fastv", "auto"), ("qwen2_5_vl", "divprune", "load")])
def test_a_fresh_process_gives_the_same(family: str, method: str, how: str, tiny: Any, tmp_path: Path) -> None:
    model = vtok.compress(tiny(family), method, keep=METHODS[method])
    batch = inputs(family, model, PROMPT)
    torch.save(dict(batch), tmp_path / "batch.pt")
    hf.write(model, tmp_path / "out")
    done = fresh(tmp_path / "out", RELOAD, how)
    assert done.returncode == 0, done.stderr
    name, logits, tokens, kept = torch.load(tmp_path / "found.pt")
    ours = outcome(model, batch)
    assert name == type(model).__name__
    assert torch.equal(logits, ours[0]) and torch.equal(tokens, ours[1]) and kept == ours[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_class_and_load(family: str, method: str, tiny: Any, tmp_path: Path) -> None:
    if method not in vtok.methods(family):
        pytest.skip("refused")
    model = vtok.compress(tiny(family), method, keep=METHODS[method])
    batch = inputs(family, model, PROMPT)
    ours = outcome(model, batch)
    assert hf.write(model, tmp_path / "out") == "fp32"
    assert session_of(model).keep == METHODS[method]
    auto = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for again in (auto, vtok.load(tmp_path / "out")):
        assert type(again) is type(model)
        theirs = outcome(again, batch)
        assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1]) and theirs[2] == ours[2]
        assert not hasattr(again.config, "auto_map")


def test_without_trust_it_is_the_plain_model(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, PROMPT)
    before = model(**batch).logits
    hf.write(vtok.compress(model, "divprune", keep=8), tmp_path)
    plain = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(plain(**batch).logits, before)


def test_files(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "SHARD", "50KB")
    hf.write(vtok.compress(tiny("llava"), "divprune", keep=8), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json", CONFIG, f"{SHIM}.py"} <= names
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == hf.AUTO_MAP
    again = vtok.load(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision(precision: str, tmp_path: Path) -> None:
    model = vtok.compress(models.build("llava", layers=2), "divprune", keep=8)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight  # tied tensors are written once
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    assert hf.write(model, tmp_path, precision=precision) == precision
    assert next(model.parameters()).dtype == torch.float32
    again = vtok.load(tmp_path)
    assert next(again.parameters()).dtype == hf.DTYPES[precision]
    weights = sum(weight.numel() for weight in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * weights
    widened = vtok.load(tmp_path, dtype=torch.float32)
    assert next(widened.parameters()).dtype == torch.float32


def test_an_environment_without_vtok(tiny: Any, tmp_path: Path) -> None:
    hf.write(vtok.compress(tiny("llava"), "divprune", keep=8), tmp_path / "out")
    code = """
import sys, transformers
sys.modules["vtok"] = None
transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = fresh(tmp_path / "out", code)
    assert done.returncode == 1
    assert "compressed by vtok, which is not installed here" in done.stderr
    assert "leave trust_remote_code out" in done.stderr


def test_damaged_settings_are_no_reason_for_the_plain_model(tiny: Any, tmp_path: Path) -> None:
    """``pipeline`` tries the plain class after a ValueError, so the shim raises none."""
    hf.write(vtok.compress(tiny("llava"), "divprune", keep=8), tmp_path)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(Exception, match="is no vtok config") as caught:
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert not isinstance(caught.value, (ValueError, OSError, TypeError, RuntimeError))


def test_a_repository_of_the_hub(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.write(vtok.compress(tiny("llava"), "divprune", keep=8), tmp_path)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **kw: asked.append((name, kw)) or str(tmp_path)
    )
    model = hf.from_auto("owner/name", revision="main", trust_remote_code=True, adapter_kwargs=None)
    assert asked == [("owner/name", {"revision": "main"})]
    assert session_of(model).keep == 8


def test_refusals(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    with pytest.raises(VtokError, match="not compressed"):
        hf.write(model, tmp_path)
    with pytest.raises(VtokError, match=r"weights in fp32, fp16, bf16, not in int8; .* onnx"):
        hf.write(vtok.compress(model, "divprune", keep=8), tmp_path, precision="int8")
