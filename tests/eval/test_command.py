"""``vtok eval`` from end to end: a saved model and a folder of questions, one process and two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vtok.cli import ELSEWHERE, app
from vtok_eval.harness import store

from . import tiny


@pytest.fixture(autouse=True)
def _eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELSEWHERE, "eval", "vtok_eval.harness:command")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """A saved model of each family, and tasks."""
    root = tmp_path_factory.mktemp("folders")
    found = {"data": root / "data"}
    for family in tiny.FAMILIES:
        found[family] = root / family
        for part in tiny.build(family):
            part.save_pretrained(root / family)
    (root / "data" / "images").mkdir(parents=True)
    for task in (tiny.task("colour", 4), tiny.task("exists", 3)):
        lines = []
        for sample in task.samples:
            for name in sample.images:
                tiny.picture(name).save(root / "data" / "images" / f"{name}.png")
            images = [f"{name}.png" for name in sample.images]
            record = {"id": sample.id, "images": images, "question": sample.question, "answer": sample.answer}
            lines.append(json.dumps({**record, "group": sample.group}) + "\n")
        (root / "data" / f"{task.name}.jsonl").write_text("".join(lines))
    return found


def arguments(folders: dict[str, Path], family: str, out: Path, *more: str) -> list[str]:
    given = {
        "--model": folders[family],
        "--data": folders["data"],
        "--out": out,
        "--method": "random,flowcut",
        "--keep": "16",
    }
    fixed = ["--max-new-tokens", "2", "--time-samples", "0", "--device", "cpu", "--no-report"]
    return ["eval", *(str(x) for pair in given.items() for x in pair), *fixed, *more]


def call(*given: str) -> Any:
    return CliRunner().invoke(app, list(given), env={"COLUMNS": "200"})


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_table_and_json(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    found = call(*arguments(folders, family, tmp_path, "--blank"))
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    for part in ("7 questions of 2 tasks", "plain", "blank", "random", "flowcut", "accuracy", "retained", "wrote"):
        assert part in words
    results = json.loads((tmp_path / store.RESULTS).read_text())
    assert results["command"].startswith("vtok eval")
    assert [task["name"] for task in results["tasks"]] == ["colour", "exists"]
    again = call(*arguments(folders, family, tmp_path, "--blank", "--json"))
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["entries"] == results["entries"]
    # the same numbers as from the model in memory
    from vtok_eval.tasks import load

    memory = tiny.run(
        family,
        tmp_path / "memory",
        tasks=load("all", folders["data"]),
        methods=["random", "flowcut"],
        keeps=[16],
        judge=None,
        blank=True,
    )
    assert memory["entries"] == results["entries"]


WRONG: list[tuple[list[str], str]] = [
    (["--tasks", "colour,nosuch"], "there is no task 'nosuch'"),
    (["--method", "nosuch"], "there is no method 'nosuch'"),
    (["--method", ","], "--method is empty"),
    (["--keep", "many"], "--keep many is no budget"),
    (["--keep", "0"], "keep=0"),
    (["--option", "layer=3"], "--option layer=3 is not of the form method.name=value"),
    (["--option", "fastv.k=3"], "options for 'fastv', which is not among the methods"),
    (["--option", "random.sede=3"], "random has no option 'sede'"),
    (["--method", "random,random=flowcut"], "two rows are called random"),
    (["--method", "late="], "late= is no row"),
    (["--method", "a@b=random"], "a@b=random is no row"),
    (["--dtype", "int8"], "dtype 'int8' is unknown"),
    (["--device", "moon"], "no device 'moon'"),
    (["--limit", "0"], "limit=0"),
]


@pytest.mark.parametrize(("more", "message"), WRONG)
def test_wrong_arguments(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    if more[0] != "--limit":
        monkeypatch.setattr("vtok.io.plain", lambda *_, **__: pytest.fail("the model was loaded before that was found"))
    given = arguments(folders, "llava", tmp_path / "out")
    if more[0] in given:
        given[given.index(more[0]) + 1] = more[1]
    else:
        given += more
    found = call(*given)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())
    assert not (tmp_path / "out").exists()


def test_a_method_has_several_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    given = arguments(folders, "llava", tmp_path, "--no-blank", "--json")
    given[given.index("--method") + 1] = "random,other=random,both=divprune+random_deep"
    for option in ("random.seed=1", "other.seed=2", "both.random_deep.layer=5"):
        given += ["--option", option]
    found = call(*given)
    assert found.exit_code == 0, found.output
    options = {entry["id"]: entry["options"] for entry in json.loads(found.stdout)["entries"]}
    assert options["random@16"] == {"seed": 1}
    assert options["other@16"] == {"seed": 2}
    assert options["both@16"] == {"random_deep.layer": 5}


@pytest.mark.parametrize("name", ["nosuch", "no/such/folder/here"])
def test_wrong_model(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = arguments(folders, "llava", tmp_path / "out")
    given[given.index("--model") + 1] = name
    found = call(*given)
    assert found.exit_code == 2
    assert "no hub id" in found.output or "cannot load" in found.output


def test_folder_without_processor(folders: dict[str, Path], tmp_path: Path) -> None:
    tiny.build("llava")[0].save_pretrained(tmp_path / "model")
    given = arguments({**folders, "llava": tmp_path / "model"}, "llava", tmp_path / "out")
    found = call(*given)
    assert found.exit_code == 2
    assert "processor" in found.output


def test_options_and_all_methods(folders: dict[str, Path], tmp_path: Path) -> None:
    given = arguments(folders, "llava", tmp_path, "--limit", "1", "--tasks", "colour", "-o", "fastv.k=1", "--no-blank")
    given[given.index("--method") + 1] = "all"
    found = call(*given, "--json")
    assert found.exit_code == 0, found.output
    entries = {entry["method"]: entry for entry in json.loads(found.stdout)["entries"]}
    assert {"tome", "mctf", "visionzip", "divprune", "random_deep"} < set(entries)
    assert entries["fastv"]["options"] == {"k": 1}


def test_geometry_by_name() -> None:
    from vtok_eval.harness.loading import load

    for name in ("tiny-llava", "tiny-qwen2_5_vl"):
        model, processor = load(name, torch.float32, torch.device("meta"))
        text = f"{processor.image_token} what is it?"
        given = processor(text=[text], images=[[tiny.picture("0")]], return_tensors="pt")
        placeholder = model.config.image_token_id
        assert int((given["input_ids"] == placeholder).sum()) in (16, 576)
        assert processor.tokenizer.decode(given["input_ids"][0], skip_special_tokens=True).strip() == "what is it?"


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    family = "llava"
    one, two = tmp_path / "one", tmp_path / "two"
    assert call(*arguments(folders, family, one)).exit_code == 0
    # --multi_gpu is how accelerate says "torchrun"; the processes find no GPU and stay on the CPU
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    given = arguments(folders, family, two)[1:]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2] / "eval")}
    command = [sys.executable, *launch, "-m", "vtok_eval", *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7 questions of 2 tasks") == 1  # the first process alone speaks
    results = [json.loads((out / store.RESULTS).read_text()) for out in (one, two)]
    for key in ("entries", "tasks", "problems", "fingerprint"):
        assert results[0][key] == results[1][key]
    assert [result["settings"]["processes"] for result in results] == [1, 2]
    answers = [{store.key_of(line): line for line in store.read(out / store.SAMPLES)} for out in (one, two)]
    assert answers[0] == answers[1]
    assert not list(two.glob(store.RANKS))
