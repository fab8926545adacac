"""The plug-in for VLMEvalKit: against a stand-in with its documented interface, and inside the real one."""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vtok
from vtok.api import session_of
from vtok_eval import vlmevalkit

from .small import photo, save

REAL = importlib.util.find_spec("vlmeval") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small"))


class Base:
    """``vlmeval.vlm.base.BaseModel``, as far as it matters."""

    allowed_types = ("text", "image", "video")

    def __init__(self) -> None:
        self.dump_image_func = None

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """``supported_VLM`` of the stand-in, with one model in it."""
    found: dict[str, Any] = {"llava_v1.5_7b": object()}
    contents = {
        "vlmeval": {},
        "vlmeval.config": {"supported_VLM": found},
        "vlmeval.vlm": {},
        "vlmeval.vlm.base": {"BaseModel": Base},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    vlmevalkit.model_class.cache_clear()
    yield found
    vlmevalkit.model_class.cache_clear()


def test_a_registered_model_answers(table: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    given = vlmevalkit.register(
        "vtok-small", pretrained=str(folder), device="cpu", method="fastv", keep=0.7, k=3, max_new_tokens=3
    )
    assert table["vtok-small"] is given
    model = table["vtok-small"](use_vllm=False)  # as infer_data calls it for some names
    assert isinstance(model, Base)
    session = session_of(model.model)
    assert session.name == "fastv" and session.keep == 0.7 and session.methods[0].k == 3
    photo().save(tmp_path / "a.png")
    message = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": "what is this"}]
    answer = model.generate(message, dataset="MMBench")
    assert answer == model.chat_inner([{"role": "user", "content": message}]) and isinstance(answer, str)
    assert model.answerer.new_tokens == 6


def test_names(table: dict[str, Any], folder: Path) -> None:
    vlmevalkit.register("mine", pretrained=str(folder))
    again = vlmevalkit.register("mine", pretrained=str(folder), method="divprune", keep=8)
    assert table["mine"] is again
    with pytest.raises(vtok.VtokError, match=r"a model llava_v1\.5_7b of its own"):
        vlmevalkit.register("llava_v1.5_7b", pretrained=str(folder))


def test_wrong_settings_show_at_once(table: dict[str, Any], folder: Path) -> None:
    for given, says in (
        ({}, "which model"),
        ({"pretrained": "x", "method": "nope", "keep": 8}, "no method 'nope'"),
        ({"pretrained": "x", "method": "fastv", "keep": 8, "colour": 1}, "no option 'colour'"),
    ):
        with pytest.raises(vtok.VtokError, match=says):
            vlmevalkit.register("wrong", **given)
    assert "wrong" not in table


def test_what_it_does_not_do(table: dict[str, Any], folder: Path) -> None:
    made = vlmevalkit.register("small", pretrained=str(folder), device="cpu")
    with pytest.raises(vtok.VtokError, match="leave --use-vllm out"):
        made(use_vllm=True)
    with pytest.raises(vtok.VtokError, match="asks about a video"):
        made().generate([{"type": "video", "value": "film.mp4"}])


def test_without_vlmevalkit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval.config", None)
    with pytest.raises(vtok.VtokError, match="pip install ms-vlmeval"):
        vlmevalkit.register(pretrained="x")


SCRIPT = """
import sys, vtok_eval.vlmevalkit as vlmevalkit
vlmevalkit.register("vtok-Qwen2-VL-like", pretrained=sys.argv[1], device="cpu", method="divprune", keep=16,
                    max_new_tokens=3)
from vlmeval.run import main
sys.argv = ["run.py", "--data", "tiny", "--model", "vtok-Qwen2-VL-like", "--mode", "infer", "--work-dir", sys.argv[2]]
main()
"""


@pytest.mark.skipif(not REAL, reason="VLMEvalKit is not installed: pip install ms-vlmeval==0.0.20")
def test_real_run(folder: Path, tmp_path: Path) -> None:
    """A data set of two questions through the kit's own ``run.py``."""
    rows = ["index\timage\tquestion\tanswer"]
    for number in range(2):
        file = io.BytesIO()
        photo(number).save(file, "PNG")
        rows.append(f"{number}\t{base64.b64encode(file.getvalue()).decode()}\twhat is this\tdog")
    (tmp_path / "tiny.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    env = {**os.environ, "LMUData": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    import pandas

    found = pandas.read_excel(next((tmp_path / "out").glob("**/*_tiny.xlsx")))
    assert len(found) == 2 and found["prediction"].notna().all()
