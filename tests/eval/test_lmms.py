"""The plug-in for lmms-eval: alone against a stand-in with the interface of 0.7.3, and inside the real one."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import vtok
from vtok_eval import lmms

from .small import TOKENS, photo, save

REAL = importlib.util.find_spec("lmms_eval") is not None
needs_real = pytest.mark.skipif(not REAL, reason="lmms-eval is not installed: pip install lmms-eval==0.7.3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("small"))


# -- alone ------------------------------------------------------------------------------------------------------------


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    def to_dict(self) -> dict[str, int]:
        return {key: value for key, value in vars(self).items() if key.endswith("put_tokens") and value is not None}


@dataclass
class GenerationResult:
    text: Any
    token_counts: TokenCounts | None = None


class Base:
    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    def clean(self) -> None:
        del self.model  # type: ignore[attr-defined]

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


def parse(text: str) -> dict[str, Any]:
    """As lmms-eval reads ``--model_args``: numbers become numbers."""
    pairs = dict(part.split("=", 1) for part in text.split(",") if part)
    return {key: int(text) if text.isnumeric() else _number(text) for key, text in pairs.items()}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


@dataclass
class Request:
    args: tuple


@dataclass
class Standin:
    """The modules that the plug-in imports, and what it logged."""

    model: ModuleType
    logged: list[tuple] = field(default_factory=list)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Standin]:
    logged: list[tuple] = []
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *given: logged.append(given)},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
        "lmms_eval.utils": {"simple_parse_args_string": parse},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "vtok_eval.lmms_model", raising=False)
    yield Standin(importlib.import_module("vtok_eval.lmms_model"), logged)
    sys.modules.pop("vtok_eval.lmms_model", None)


DOCS = [{"pictures": [1], "question": "what is this"}, {"pictures": [2, 3], "question": "how many dog"}]
DOCS += [{"pictures": [], "question": "what color"}, {"pictures": [4], "question": "what color of the object"}]


def visuals(doc: dict[str, Any]) -> list[Any]:
    return [photo(seed) for seed in doc["pictures"]]


def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "image", "url": picture} for picture in visuals(doc)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


HOW: dict[str, Any] = {"max_new_tokens": 3, "until": ["\n\n"], "do_sample": False}


def simple(docs: list[dict], **how: Any) -> list[Request]:
    rows = enumerate(docs)
    return [Request((doc["question"], {**HOW, **how}, visuals, i, "task", "test")) for i, doc in rows]


def chat(docs: list[dict], **how: Any) -> list[Request]:
    rows = enumerate(docs)
    return [Request((doc["question"], messages, {**HOW, **how}, i, "task", "test")) for i, doc in rows]


def made(standin: Standin, folder: Path, kind: str = "Vtok", arguments: str = "", **added: Any) -> Any:
    text = f"pretrained={folder},device=cpu" + (f",{arguments}" if arguments else "")
    model = getattr(standin.model, kind).create_from_arg_string(text, {"max_batch_size": None, **added})
    model.task_dict = {"task": {"test": DOCS}}
    return model


def test_manifest(standin: Standin) -> None:
    found = lmms.manifest()
    assert found.model_id == "vtok"
    for path, is_simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, name = path.rsplit(".", 1)
        cls = getattr(importlib.import_module(module), name)
        assert issubclass(cls, Base) and cls.is_simple is is_simple


def test_entry_point_is_light() -> None:
    """lmms-eval loads it at every start, whatever model was asked for."""
    code = "import sys, vtok_eval.lmms; print(sorted({'torch', 'transformers', 'vtok'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["Vtok", "VtokChat"])
def test_answers_in_order_with_their_costs(standin: Standin, folder: Path, kind: str) -> None:
    requests = simple(DOCS) if kind == "Vtok" else chat(DOCS)
    one = made(standin, folder, kind, "method=divprune,keep=16").generate_until(requests)
    three = made(standin, folder, kind, "method=divprune,keep=16", batch_size="3").generate_until(requests)
    assert [result.text for result in one] == [result.text for result in three]
    counts = [result.token_counts.to_dict() for result in three]
    assert [own["visual_tokens"] for own in counts] == [TOKENS, TOKENS, 0, TOKENS]
    assert [own["kept_tokens_input"] for own in counts] == [16, 16, 0, 16]
    assert counts[1]["input_tokens"] - 2 * 16 < counts[1]["input_tokens"] and counts[0]["output_tokens"] == 3
    assert all(own["prefill_ms"] > 0 for own in counts)


def test_chat_and_simple_agree(standin: Standin, folder: Path) -> None:
    texts = [
        [result.text for result in made(standin, folder, kind).generate_until(requests)]
        for kind, requests in (("Vtok", simple(DOCS)), ("VtokChat", chat(DOCS)))
    ]
    assert texts[0] == texts[1]


def test_requests_with_other_settings_go_apart(standin: Standin, folder: Path) -> None:
    model = made(standin, folder, batch_size=4)
    requests = simple(DOCS)
    requests[1].args[1]["max_new_tokens"] = 1
    counts = [result.token_counts.output_tokens for result in model.generate_until(requests)]
    assert counts == [3, 1, 3, 3]
    assert requests[0].args[1] == HOW, "a request is cached by its settings: they stay as they were"


def test_default_length(standin: Standin, folder: Path) -> None:
    model = made(standin, folder, arguments="max_new_tokens=2")
    requests = simple(DOCS[:1])
    del requests[0].args[1]["max_new_tokens"]
    assert model.generate_until(requests)[0].token_counts.output_tokens == 2


def test_throughput_block(standin: Standin, folder: Path) -> None:
    made(standin, folder, arguments="method=fastv,keep=0.7").generate_until(simple(DOCS))
    seconds, tokens, speed, means = standin.logged[-1]
    assert tokens == 12 and speed == pytest.approx(tokens / seconds)
    assert means["visual_tokens"] == means["kept_tokens_input"] == TOKENS > means["kept_tokens_layers"]
    assert means["prefill_ms"] > 0 and means["prefill_peak_mb"] > 0 and means["total_requests"] == 4


def test_no_requests(standin: Standin, folder: Path) -> None:
    """A rank without documents is asked all the same."""
    model = made(standin, folder)
    assert model.generate_until([]) == [] and model.loglikelihood([]) == [] and not standin.logged


def test_likelihoods_are_losses(standin: Standin, folder: Path) -> None:
    model = made(standin, folder, arguments="method=divprune,keep=16", batch_size=3)
    requests = [Request(("what is this", f" {word}", visuals, 0, "task", "test")) for word in ("dog", "cat", "red")]
    requests += [Request(("what color", lambda doc: " blue", visuals, 3, "task", "test")), Request(("", " dog"))]
    found = [result.text for result in model.loglikelihood(requests)]
    assert all(loss > 0 and greedy is False for loss, greedy in found)
    assert len({loss for loss, _ in found}) == 5
    assert all(isinstance(result, tuple) and not result.strip() for result in found)


def test_command_line_fills_what_model_args_leave_open(standin: Standin, folder: Path) -> None:
    assert made(standin, folder, arguments="batch_size=2", batch_size=1, device="meta").batch_size == 2
    with pytest.raises(vtok.VtokError, match="give a number"):
        made(standin, folder, batch_size="auto")
    with pytest.raises(vtok.VtokError, match="at least one"):
        made(standin, folder, batch_size=0)
    with pytest.raises(vtok.VtokError, match="no argument 'metod'"):
        made(standin, folder, arguments="metod=fastv")


def test_clean_lets_go_of_the_model(standin: Standin, folder: Path) -> None:
    model = made(standin, folder, arguments="method=divprune,keep=16")
    model.generate_until(simple(DOCS[:1]))
    network = weakref.ref(model.model)
    model.clean()
    gc.collect()
    assert network() is None


def test_what_it_does_not_do(standin: Standin, folder: Path) -> None:
    model = made(standin, folder)
    with pytest.raises(vtok.VtokError, match="answers in one round"):
        model.generate_until_multi_round([])
    request = Request(("what", dict(HOW), lambda doc: ["film.mp4"], 0, "task", "test"))
    with pytest.raises(vtok.VtokError, match="reads pictures only"):
        model.generate_until([request])
    film = lambda doc: [{"role": "user", "content": [{"type": "video", "url": "film.mp4"}]}]  # noqa: E731
    with pytest.raises(vtok.VtokError, match="holds video"):
        made(standin, folder, "VtokChat").generate_until([Request(("", film, dict(HOW), 0, "task", "test"))])


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "vtok_eval.lmms_model", raising=False)
    with pytest.raises(vtok.VtokError, match="pip install lmms-eval"):
        importlib.import_module("vtok_eval.lmms_model")


# -- the bundled tasks ------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """``!function`` stays a name."""


Loader.add_constructor("!function", lambda loader, node: str(node.value))


def read(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader)


def test_a_file_for_every_bundled_task() -> None:
    from vtok_eval import tasks

    group = read(lmms.TASKS / "vtok.yaml")
    assert group["task"] == [f"vtok_{name}" for name in tasks.NAMES]
    shared = read(lmms.TASKS / "_bundled.yaml")
    assert list(shared["dataset_kwargs"]["data_files"]) == list(tasks.NAMES)
    utils = importlib.import_module("vtok_eval.lmms_tasks.utils")
    for key in ("process_docs", "doc_to_visual", "doc_to_text", "process_results"):
        assert callable(getattr(utils, shared[key].removeprefix("utils.")))
    for name in tasks.NAMES:
        own = read(lmms.TASKS / f"{name}.yaml")
        assert (own["include"], own["task"], own["test_split"]) == ("_bundled.yaml", f"vtok_{name}", name)


def test_scoring_of_a_row() -> None:
    utils = importlib.import_module("vtok_eval.lmms_tasks.utils")
    task, samples = utils.bundled("exists")
    sample = next(iter(samples.values()))
    doc = {"task": "exists", "id": sample.id, "scored_as": "accuracy"}
    assert utils.score(doc, [sample.answer])["accuracy"] == 1.0
    assert utils.score(doc, [""])["accuracy"] == 0.0
    assert utils.score({**doc, "scored_as": "unseen"}, [sample.answer]) == {"unseen": 1.0}
    assert utils.f1([("yes", "yes"), ("Yes.", "no")]) == pytest.approx(2 / 3)
    row = {"task": "exists", "images": list(sample.images), "question": "Is it?", "instruction": "Say yes."}
    assert utils.question(row) == "Is it?\nSay yes." and len(utils.pictures(row)) == len(sample.images)
    assert task.metric == "yes/no"


# -- the real one -----------------------------------------------------------------------------------------------------


def run(folder: Path, out: Path, tasks: str, *more: str, arguments: str = "", launcher: tuple[str, ...] = ()) -> str:
    """Output of the command line in a process of its own."""
    given = f"pretrained={folder},device=cpu" + (f",{arguments}" if arguments else "")
    own = ("--model", "vtok", "--model_args", given, "--include_path", str(lmms.TASKS), "--output_path", str(out))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out / "hub"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, "lmms_eval", *own, "--tasks", tasks, "--log_samples", *more]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and "Error during evaluation" not in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:]
    )
    return done.stdout


def results(out: Path) -> dict[str, Any]:
    return json.loads(next(out.glob("*/*_results.json")).read_text(encoding="utf-8"))


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in next(out.glob(f"*/*_samples_{task}.jsonl")).read_text().splitlines()]


@needs_real
def test_real_entry_point() -> None:
    found = {entry.value for entry in entry_points(group="lmms_eval.models") if entry.name == "vtok"}
    assert found == {"vtok_eval.lmms:manifest"}


@needs_real
@pytest.mark.slow
def test_real_run_answers_as_the_harness(folder: Path, tmp_path: Path) -> None:
    """Prompts, answers, accuracy and counts of ``vtok eval`` on the same samples."""
    from vtok_eval import tasks
    from vtok_eval.arguments import Arguments
    from vtok_eval.harness import evaluate

    names = ("exists", "multi")
    wanted = ",".join(f"vtok_{name}" for name in names)
    text = run(folder, tmp_path / "lmms", wanted, "--limit", "6", "-b", "4", arguments="method=divprune,keep=16")
    assert "avg_kept_tokens_input" in text and "avg_prefill_ms" in text
    model, processor = Arguments.of({"pretrained": str(folder), "device": "cpu"}).open()
    first = [dataclasses.replace(task, samples=task.samples[:6]) for task in tasks.load(names)]
    how: dict[str, Any] = {"name": "other", "time_samples": 0, "progress": False, "report": False}
    ours = evaluate(model, processor, ["divprune"], [16], first, tmp_path / "ours", **how)
    entry = next(entry for entry in ours["entries"] if entry["id"] == "divprune@16")
    lines = [json.loads(line) for line in (tmp_path / "ours" / "samples.jsonl").read_text().splitlines()]
    answers = {line["sample"]: line["answer"] for line in lines if line["entry"] == "divprune@16"}
    theirs = results(tmp_path / "lmms")
    for name, task in zip(names, first, strict=True):
        found = [line["filtered_resps"] for line in samples(tmp_path / "lmms", f"vtok_{name}")]
        assert found == [answers[sample.id] for sample in task.samples]
        own = theirs["results"][f"vtok_{name}"]
        if "accuracy,none" in own:
            assert own["accuracy,none"] == pytest.approx(entry["tasks"][name]["accuracy"])
    assert theirs["throughput"]["avg_kept_tokens_input"] == pytest.approx(entry["counts"]["tokens_kept"])
    assert samples(tmp_path / "lmms", "vtok_multi")[0]["token_counts"][0]["kept_tokens_input"] == 16
