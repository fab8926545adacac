"""The harness on random models: every cell, every column, and what must not change an answer."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import vtok
from vtok.errors import VtokError
from vtok_eval.harness import bits, store
from vtok_eval.harness.answers import Answers
from vtok_eval.harness.table import show

from ..conftest import anatomy
from . import tiny


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def base(request: Any, tmp_path_factory: Any) -> tuple[str, Any, Path, dict[str, Any]]:
    """Family, (model, processor), folder and results of one uninterrupted run."""
    family, built = request.param, tiny.build(request.param)
    out = tmp_path_factory.mktemp(family) / "out"
    return family, built, out, tiny.run(family, out, built=built, blank=True)


def samples(out: Path) -> dict[store.Key, dict[str, Any]]:
    found = list(store.read(out / store.SAMPLES))
    lines = {store.key_of(line): line for line in found}
    assert len(lines) == len(found)
    return lines


def test_every_entry_answers_every_sample_once(base: Any) -> None:
    _, _, out, results = base
    lines = samples(out)
    running = [entry["id"] for entry in results["entries"]]
    assert running[:2] == ["plain", "blank"]
    assert {f"{name}@0.25" for name in tiny.METHODS} < set(running)
    assert len(lines) == 9 * len(running)
    assert results == json.loads((out / store.RESULTS).read_text())
    for line in lines.values():
        kept = [bits.unpack(mask, n) for mask, n in zip(line["kept"], line["tokens"], strict=True)]
        assert line["error"] is None
        assert sum(count for count, _ in line["layers"]) == 4
        if line["entry"] in ("plain", "blank"):
            assert [len(own) for own in kept] == line["tokens"]
            assert line["mac_ratio"] == 1
        else:
            assert 0 < line["mac_ratio"] < 1
            assert line["layers_average"] < max(line["tokens"])


def test_numbers_are_those_of_the_report(base: Any) -> None:
    _, (model, processor), out, results = base
    lines, plain = samples(out), tiny.task("colour")
    for entry in results["entries"][2:]:
        sample = plain.samples[4]  # two pictures
        line = lines[entry["id"], "colour", sample.id]
        text = f"{processor.image_token}\n" * 2 + sample.question + "\n" + plain.instruction
        if processor.chat_template:
            content = [{"type": "image"}] * 2 + [{"type": "text", "text": f"{sample.question}\n{plain.instruction}"}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert line["prompt"] == text
        inputs = processor(text=[text], images=[[plain.picture(name) for name in sample.images]], return_tensors="pt")
        with vtok.compressed(model, entry["method"].split("+"), keep=entry["budget"]):
            model(**inputs)
            report = vtok.report(model)
        kept = [own.tolist() for own in report.kept[0]]
        assert [bits.unpack(mask, n) for mask, n in zip(line["kept"], line["tokens"], strict=True)] == kept
        layers = [tokens for count, tokens in line["layers"] for _ in range(count)]
        assert layers == pytest.approx(report.layer_tokens)
        assert line["layers_average"] == pytest.approx(report.average_tokens, abs=1e-4)
        assert line["mac_ratio"] == pytest.approx(report.mac_ratio, abs=1e-6)


def test_scores(base: Any) -> None:
    _, _, out, results = base
    lines, by_id = samples(out), {entry["id"]: entry for entry in results["entries"]}
    group = {own.id: own.group for name, n in (("colour", 5), ("exists", 4)) for own in tiny.task(name, n).samples}

    def accuracy(entry: str, task: str, wanted: str = "seen") -> float:
        own = [v["correct"] for k, v in lines.items() if k[:2] == (entry, task) and group[k[2]] == wanted]
        return sum(own) / len(own)

    for entry in results["entries"]:
        score = entry["tasks"]["colour"]
        assert score["n"] == 4
        assert score["accuracy"] == accuracy(entry["id"], "colour") == score["groups"]["seen"]["accuracy"]
        assert score["groups"]["unseen"] == {"n": 1, "accuracy": accuracy(entry["id"], "colour", "unseen")}
        assert score["f1"] is None
        assert entry["tasks"]["exists"]["f1"] is not None
        overall = entry["overall"]
        assert overall["n"] == 7
        means = [accuracy(entry["id"], task) for task in ("colour", "exists")]
        assert overall["accuracy"] == pytest.approx(sum(means) / 2)
        assert overall["ci"][0] <= overall["accuracy"] <= overall["ci"][1]
        reference = by_id["plain"]["overall"]["accuracy"]
        assert overall["retention"] == pytest.approx(overall["accuracy"] / reference)
        assert overall["difference"]["value"] == pytest.approx(overall["accuracy"] - reference)
        assert (overall["p_plain"] is None) == (entry["id"] == "plain")
        assert (overall["p_random"] is None) == (entry["method"] in (None, "random") or entry["status"] == "raised")
        if overall["hard"] is None:
            assert entry["keep"] is None or entry["status"] == "raised"
            continue
        hard = [
            key[1:]
            for key, line in lines.items()
            if key[0] == "plain" and line["correct"] and group[key[2]] == "seen"
            and not lines[(f"downsample@{entry['keep']:g}", *key[1:])]["correct"]
        ]  # fmt: skip
        assert overall["hard"]["n"] == len(hard)
        if hard:
            share = sum(lines[(entry["id"], *key)]["correct"] for key in hard) / len(hard)
            assert overall["hard"]["accuracy"] == pytest.approx(share)


def test_unreachable_budget_is_raised_beside_its_composition(base: Any) -> None:
    _, _, _, results = base
    by_id = {entry["id"]: entry for entry in results["entries"]}
    raised, twin = by_id["fastv@0.25"], by_id["divprune+fastv@0.25"]
    assert raised["status"] == "raised" and raised["budget"] > raised["keep"] == 0.25
    assert "reaches no average below" in raised["note"]
    assert raised["counts"]["average_tokens"] > 0.25 * raised["counts"]["tokens_in"] + 0.5
    assert twin["status"] == "ok" and twin["stands_in_for"] == "fastv@0.25"
    assert twin["counts"]["average_tokens"] == pytest.approx(0.25 * twin["counts"]["tokens_in"], abs=0.6)
    assert [entry["id"] for entry in results["entries"]].index("divprune+fastv@0.25") == (
        [entry["id"] for entry in results["entries"]].index("fastv@0.25") + 1
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_precision(tmp_path: Path, family: str) -> None:
    model, processor = tiny.build(family)
    settings: dict[str, Any] = {"methods": ["flowcut", "divprune"], "keeps": [0.5], "tasks": [tiny.task(count=3)]}
    results = tiny.run(family, tmp_path, built=(model.bfloat16(), processor), batch_size=2, **settings)
    assert results["model"]["dtype"] == "bfloat16"
    assert not any(line["error"] for line in samples(tmp_path).values())


def test_entries_raised_to_one_budget_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = Answers.ask
    monkeypatch.setattr(
        Answers, "ask", lambda self, entry, *more: (asked.append(entry.id), original(self, entry, *more))[1]
    )
    settings: dict[str, Any] = {
        "methods": ["fastv"],
        "keeps": [24, 20],
        "tasks": [tiny.task(count=2)],
        "time_samples": 1,
    }
    results = tiny.run("llava", tmp_path, built=LLAVA, repeats=1, **settings)
    one, other = (next(own for own in results["entries"] if own["id"] == name) for name in ("fastv@24", "fastv@20"))
    assert one["budget"] == other["budget"] > 24
    assert {key for key in one if one[key] != other[key]} == {"id", "keep"}
    assert len([name for name in asked if name.startswith("fastv@")]) == 2
    assert sum(name.startswith("fastv@") for name in next(store.read(tmp_path / store.TIMING))["rounds"][0]) == 1


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"share_features": False}])
def test_neither_batch_nor_cache_changes_an_answer(base: Any, tmp_path: Path, change: dict[str, Any]) -> None:
    family, built, out, results = base
    before = anatomy(built[0])
    other = tiny.run(family, tmp_path, built=built, blank=True, **change)
    assert anatomy(built[0]) == before
    assert samples(tmp_path) == samples(out)
    assert other["entries"] == results["entries"]
    assert other["fingerprint"] == results["fingerprint"]


def test_cache_encodes_a_picture_once(base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family, built, _, _ = base
    made: list[Answers] = []
    init = Answers.__init__
    monkeypatch.setattr(Answers, "__init__", lambda self, *args: (made.append(self), init(self, *args))[1])
    tiny.run(family, tmp_path, built=built, methods=["divprune", "random", "flowcut"], keeps=[0.5])
    features = made[0].features
    pictures = {
        name for task in (tiny.task("colour"), tiny.task("exists", 4)) for s in task.samples for name in s.images
    }
    assert features.misses == 2 * len(pictures)  # once for all that leave the tower alone, once for flowcut
    assert features.hits + features.misses == 4 * 10


def test_refused_method_is_listed(tmp_path: Path) -> None:
    class Never(vtok.Method):
        name, summary, site = "never", "", "input"

        def refuse(self, shape: Any) -> str:
            return "it never does"

    results = tiny.run("llava", tmp_path, methods=["random", Never()], keeps=[16], tasks=[tiny.task(count=1)])
    entry = results["entries"][-1]
    assert entry["id"] == "never@16" and entry["status"] == "refused"
    assert entry["note"] == "never cannot serve llava: it never does"
    assert entry["overall"] is None and entry["tasks"] == {}


def test_budget_above_the_picture_is_noted(tmp_path: Path) -> None:
    results = tiny.run("llava", tmp_path, methods=["random"], keeps=[64, 100, 63], tasks=[tiny.task(count=1)])
    notes = {entry["id"]: entry["note"] for entry in results["entries"]}
    assert notes["random@100"] == "every picture has at most 100 tokens, which all stay"
    assert notes["random@63"] == ""
    lines = samples(tmp_path)
    assert lines["random@100", "colour", "colour-0"]["answer"] == lines["plain", "colour", "colour-0"]["answer"]


def test_options_seed_and_methods_as_objects(tmp_path: Path) -> None:
    methods = ["random", "divprune+random_deep", vtok.get("fastv", k=3), ["divprune", vtok.get("fastv", k=1)]]
    options = {"random_deep": {"layer": 2, "seed": 9}}
    results = tiny.run(
        "llava", tmp_path, methods=methods, keeps=[60], options=options, seed=5, tasks=[tiny.task(count=1)]
    )
    found = {entry["id"]: entry["options"] for entry in results["entries"][1:]}
    assert found == {
        "random@60": {"seed": 5},
        "divprune+random_deep@60": {"random_deep.layer": 2, "random_deep.seed": 9},
        "fastv(k=3)@60": {"k": 3},
        "divprune+fastv(k=1)@60": {"fastv.k": 1},
    }


def test_timing_is_paired_and_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tiny.build("llava")
    settings: dict[str, Any] = {
        "built": built,
        "methods": ["divprune", "fastv"],
        "keeps": [48],
        "tasks": [tiny.task(count=3)],
    }
    settings |= {"time_samples": 2, "repeats": 2}
    results = tiny.run("llava", tmp_path, **settings)
    entries = {entry["id"]: entry for entry in results["entries"]}
    for name, entry in entries.items():
        timing = entry["timing"]
        assert entry["peak_mb"] > 0
        assert timing["encode"]["median"] < timing["prefill"]["median"]
        assert (timing["select"] is None) == (timing["speedup"] is None) == (name == "plain")
    assert entries["divprune@48"]["timing"]["share"] == entries["divprune@48"]["timing"]["share_at_input"]
    assert entries["fastv@48"]["timing"]["share"] != entries["fastv@48"]["timing"]["share_at_input"]
    lines = list(store.read(tmp_path / store.TIMING))
    assert len(lines) == 2 and all(len(line["rounds"]) == 2 for line in lines)
    ceilings = ["random, input, 48", "random, cuts of fastv@48"]
    assert set(lines[0]["rounds"][0]) == {*entries, *ceilings}
    ratios = [own[ceilings[1]]["prefill"] / own["fastv@48"]["prefill"] for line in lines for own in line["rounds"]]
    assert entries["fastv@48"]["timing"]["share"]["low"] == pytest.approx(min(ratios), abs=1e-4)
    again = tiny.run("llava", tmp_path, **settings)
    assert [entry["timing"] for entry in again["entries"]] == [entry["timing"] for entry in results["entries"]]
    assert len(list(store.read(tmp_path / store.TIMING))) == 2


def test_timing_never_uses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtok_eval.harness import features, timing

    def forbidden(*_: Any) -> None:
        raise AssertionError("a timed pass asked for remembered features")

    built = tiny.build("llava")
    original = timing.measure

    def watched(*args: Any) -> Any:
        monkeypatch.setattr(features.Features, "_around", forbidden)
        return original(*args)

    monkeypatch.setattr("vtok_eval.harness.run.timing.measure", watched)
    tiny.run(
        "llava",
        tmp_path,
        built=built,
        methods=["random"],
        keeps=[32],
        tasks=[tiny.task(count=1)],
        time_samples=1,
        repeats=1,
    )


# -- problems -----------------------------------------------------------------------------------------------------


def test_broken_picture_leaves_the_others_alone(base: Any, tmp_path: Path) -> None:
    family, built, out, _ = base
    tasks = [tiny.task("colour", broken=1), tiny.task("exists", 4)]
    results = tiny.run(family, tmp_path, built=built, blank=True, tasks=tasks, batch_size=3)
    whole, lines = samples(out), samples(tmp_path)
    assert lines.keys() == whole.keys()
    for key, line in lines.items():
        if key[2] == "colour-1":
            assert line["error"] == "the picture broken cannot be read" and not line["correct"]
        else:
            assert line == whole[key]
    problem = {"task": "colour", "sample": "colour-1", "entry": None, "message": "the picture broken cannot be read"}
    assert [own for own in results["problems"] if "empty answer" not in own["message"]] == [problem]
    assert all(entry["tasks"]["colour"]["n"] == 3 for entry in results["entries"])


def test_nothing_but_broken_pictures(tmp_path: Path) -> None:
    task = tiny.task(count=1, broken=0)
    results = tiny.run("llava", tmp_path, built=LLAVA, methods=["random"], keeps=[16], tasks=[task], time_samples=1)
    assert "NaN" not in (tmp_path / store.RESULTS).read_text()
    for entry in results["entries"]:
        assert entry["overall"]["n"] == 0
        assert entry["overall"]["accuracy"] is None
        assert entry["timing"] is None
    assert len(results["problems"]) == 1
    show(results, tmp_path, Console(file=io.StringIO(), width=200))


def test_failed_accelerator_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.AcceleratorError("device-side assert")

    monkeypatch.setattr(LLAVA[0], "generate", fail, raising=False)
    with pytest.raises(VtokError, match=r"plain made the cpu fail.*what is written so far is kept"):
        tiny.run("llava", tmp_path, built=LLAVA, methods=["random"], keeps=[16], tasks=[tiny.task(count=1)])


def test_failure_of_one_entry_on_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtok.methods.divprune import DivPrune

    original, built = DivPrune.select, tiny.build("llava")

    def select(self: Any, view: Any, count: int) -> Any:
        if 1 in view.places:
            raise RuntimeError("no second picture\nplease")
        return original(self, view, count)

    monkeypatch.setattr(DivPrune, "select", select)
    results = tiny.run(
        "llava", tmp_path, built=built, methods=["divprune", "random"], keeps=[16], tasks=[tiny.task()], batch_size=5
    )
    (problem,) = results["problems"]
    assert problem == {
        "task": "colour", "sample": "colour-4", "entry": "divprune@16", "message": "RuntimeError: no second picture",
    }  # fmt: skip
    lines = samples(tmp_path)
    assert [key for key, line in lines.items() if line["error"]] == [("divprune@16", "colour", "colour-4")]
    assert results["entries"][1]["tasks"]["colour"]["n"] == 4  # it counts, as wrong
    monkeypatch.setattr(DivPrune, "select", original)
    again = tiny.run(
        "llava", tmp_path, built=built, methods=["divprune", "random"], keeps=[16], tasks=[tiny.task()], batch_size=5
    )
    assert again["problems"] == []  # errors are tried again


def test_empty_answers_are_wrong_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vtok_eval.harness.prompts import Prompts

    monkeypatch.setattr(Prompts, "answers", lambda self, tokens: [""] * len(tokens))
    results = tiny.run(
        "llava", tmp_path, methods=["random"], keeps=[16], tasks=[tiny.task(count=30)], judge=lambda *_: True
    )
    assert results["entries"][1]["overall"]["accuracy"] == 0
    own = [problem for problem in results["problems"] if problem["entry"] == "random@16"]
    assert len(own) == 21
    assert own[0]["message"] == "empty answer, counted as wrong"
    assert own[-1] == {
        "task": "colour", "sample": None, "entry": "random@16", "message": "10 more empty answers, counted as wrong",
    }  # fmt: skip


BAD: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"limit": 0}, "limit=0 must be at least 1"),
    ({"time_samples": -1}, "time_samples=-1 must be at least 0"),
    ({"clock": "sun"}, "no clock"),
    ({"tasks": []}, "nothing to ask"),
    ({"tasks": [tiny.task(), tiny.task()]}, "same name"),
    ({"methods": []}, "no method to evaluate"),
    ({"methods": ["nosuch"]}, "no method 'nosuch'"),
    ({"keeps": [0]}, "keep=0"),
    ({"options": {"fastv": {"layers": 3}}}, "no option 'layers'"),
    ({"options": {"mctf": {}}}, "not among the methods"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_settings(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(VtokError, match=message):
        tiny.run("llava", tmp_path / "out", **{"built": LLAVA, **change})
    assert not (tmp_path / "out").exists()


LLAVA = tiny.build("llava")


def test_compressed_model_and_bare_tower(tmp_path: Path) -> None:
    model, processor = LLAVA
    with vtok.compressed(model, "random", keep=8), pytest.raises(VtokError, match="compressed already"):
        tiny.run("llava", tmp_path, built=LLAVA)
    with pytest.raises(VtokError, match="no language model"):
        tiny.run("llava", tmp_path, built=(model.model.vision_tower, processor))
    with pytest.raises(VtokError, match="has no tokenizer"):
        tiny.run("llava", tmp_path, built=(model, processor.image_processor))


def test_instruction(tmp_path: Path) -> None:
    model, processor = tiny.build("llava")
    only: dict[str, Any] = {
        "methods": ["random"],
        "keeps": [8],
        "tasks": [dataclasses.replace(tiny.task(count=1), instruction="One word.")],
    }
    for number, (name, marked, asked, expected) in enumerate(
        [("m", None, None, True), ("nano-m", None, None, False), ("m", False, None, False), ("m", False, True, True)]
    ):
        if marked is not None:
            model.config.vtok_instruction = marked
        out = tmp_path / str(number)
        tiny.run("llava", out, built=(model, processor), name=name, instruction=asked, **only)
        assert samples(out)["plain", "colour", "colour-0"]["prompt"].endswith("\nOne word.") == expected
