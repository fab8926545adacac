"""``vtok tune``: targets, the split, statistics, the search on a table of known accuracies, and a real run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import vtok
from vtok.cli import ELSEWHERE, app
from vtok.errors import VtokError
from vtok.view import Shape
from vtok_eval.harness import stats, store
from vtok_eval.harness.asking import Asking
from vtok_eval.samples import Sample, Task
from vtok_eval.tune import candidates, estimate, split, tune
from vtok_eval.tune.estimate import Scores
from vtok_eval.tune.search import Bracket, Cost, Search, Trial
from vtok_eval.tune.target import Goal, parse

from . import tiny

# -- targets ------------------------------------------------------------------------------------------------------

READ = {
    "retention>=0.98": "retention>=0.98",
    " Retention >= 98% ": "retention>=0.98",
    "speedup>=2x": "speedup>=2",
    "speedup > 1.5, accuracy>=.8": "speedup>=1.5 and accuracy>=0.8",
    "retention>=0.97 and tokens<=64 AND macs<=30%": "retention>=0.97 and tokens<=64 and macs<=0.3",
    "tokens=<64": "tokens<=64",
}


@pytest.mark.parametrize("text", READ)
def test_targets(text: str) -> None:
    assert str(parse(text)) == READ[text]


WRONG = {
    "": "is empty",
    "fast": "is no condition",
    "retention>=": "is no condition",
    "retention 0.98": "is no condition",
    "quality>=0.9": "knows no 'quality'",
    "retention<=0.9": "wrong side",
    "tokens>=64": "wrong side",
    "speedup==2": "wrong side",
    "retention>=98": "out of range: retention must be above 0 and at most 2; for per cent write %",
    "accuracy>=1.2": "out of range",
    "tokens<=0": "out of range",
    "speedup>=1.2.3": "no number",
    "speedup>=50%": "not given in '%'",
    "retention>=2x": "not given in 'x'",
    "tokens<=64,tokens<=32": "tokens twice",
}


@pytest.mark.parametrize("text", WRONG)
def test_malformed_targets(text: str) -> None:
    with pytest.raises(VtokError, match=WRONG[text]):
        parse(text)


def test_what_holds() -> None:
    assert Goal("retention", 0.98).holds(0.98) and not Goal("retention", 0.98).holds(0.979)
    assert Goal("tokens", 64).holds(64.5) and not Goal("tokens", 64).holds(65)  # whole tokens round by less than 1%
    assert not Goal("retention", 0.5).holds(math.nan) and not Goal("speedup", 1).holds(None)
    target = parse("retention>=0.9 and speedup>=2")
    assert [str(goal) for goal in target.missed({"retention": 0.8, "speedup": 3.0})] == ["retention>=0.9"]


# -- the split ----------------------------------------------------------------------------------------------------


def some_tasks(counts: Mapping[str, int], pictures: int = 40) -> list[Task]:
    """Questions of which several share a picture, also across tasks."""
    found = []
    for name, count in counts.items():
        samples = [Sample(f"{i}", name, (f"p{i % pictures}",), "?", "yes") for i in range(count)]
        found.append(Task(name, tuple(samples), tiny.picture))
    return found


@pytest.mark.parametrize("share", [0.5, 0.25, 0.8])
@pytest.mark.parametrize("seed", [0, 3])
def test_split_keeps_pictures_together_and_tasks_in_proportion(share: float, seed: int) -> None:
    tasks = some_tasks({"a": 80, "b": 40, "c": 20})
    first, rest = split.split(tasks, share, seed)
    for task, own, other in zip(tasks, first, rest, strict=True):
        assert {s.id for s in own.samples} | {s.id for s in other.samples} == {s.id for s in task.samples}
        assert len(own.samples) + len(other.samples) == len(task.samples)
        assert abs(len(own.samples) - share * len(task.samples)) <= 3
    sides = [{split.anchor(s) for task in side for s in task.samples} for side in (first, rest)]
    assert not sides[0] & sides[1]
    assert split.split(tasks, share, seed)[0] == first
    assert split.split(tasks, share, seed + 1)[0] != first


def test_subsets_grow() -> None:
    assert split.sizes(800) == [100, 200, 400, 800]
    assert split.sizes(130) == [65, 130]
    assert split.sizes(7) == [7]
    first, _ = split.split(some_tasks({"a": 80, "b": 9}), 0.5, 0)
    before: set[tuple[str, str]] = set()
    for count in (8, 20, 44, 1000):
        found = {(task.name, s.id) for task in split.first(first, count) for s in task.samples}
        assert before <= found and abs(len(found) - min(count, 44)) <= 2
        assert {name for name, _ in found} == {"a", "b"}
        before = found


def test_split_refuses() -> None:
    with pytest.raises(VtokError, match="too few questions"):
        split.split(some_tasks({"a": 1}), 0.5, 0)
    with pytest.raises(VtokError, match="between 0 and 1"):
        split.split(some_tasks({"a": 10}), 1.0, 0)


def test_unseen_styles_are_left_out_as_in_the_headline() -> None:
    task = tiny.task(count=8)
    assert {s.group for s in split.headline(task).samples} == {"seen"}
    assert split.headline(split.replace(task, samples=task.samples[3:4])).samples == task.samples[3:4]


# -- statistics ---------------------------------------------------------------------------------------------------


def paired(n: int, plain: float, lost: float, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    reference = {name: rng.random(n) < plain for name in ("a", "b")}
    return {name: own & (rng.random(n) >= lost) for name, own in reference.items()}, reference


def test_estimates_by_hand() -> None:
    own = {"a": np.array([1, 1, 0, 0], bool), "b": np.array([1, 0], bool), "empty": np.zeros(0, bool)}
    plain = {"a": np.array([1, 1, 1, 0], bool), "b": np.array([1, 1], bool), "empty": np.zeros(0, bool)}
    found = Scores.of(own, plain, estimate.resampled({name: range(len(x)) for name, x in own.items()}, 0))
    assert found.n == 6 and found.differing == 2
    assert found.accuracy == pytest.approx(0.5) and found.plain_accuracy == pytest.approx(0.875)
    assert found.retention == pytest.approx(0.5 / 0.875)
    assert found.meets([Goal("accuracy", 0.5)]) and not found.meets([Goal("accuracy", 0.5), Goal("retention", 0.6)])


def test_probability_against_every_resample() -> None:
    """Two tasks of three questions have 27 * 27 ordered resamples: all of them, counted."""
    own = {"a": np.array([1, 0, 1], bool), "b": np.array([1, 1, 0], bool)}
    plain = {"a": np.array([1, 1, 1], bool), "b": np.array([1, 1, 0], bool)}
    goals = [Goal("retention", 0.8)]
    draws = list(itertools.product(range(3), repeat=3))
    hits = 0
    for a, b in itertools.product(draws, draws):
        mine = own["a"][list(a)].mean() + own["b"][list(b)].mean()
        hits += mine >= 0.8 * (plain["a"][list(a)].mean() + plain["b"][list(b)].mean()) - 1e-9
    weights = {name: stats.resamples(range(3), i, draws=40000) for i, name in enumerate(own)}
    assert Scores.of(own, plain, weights).probability(goals) == pytest.approx(hits / 27**2, abs=0.01)


def test_probability_is_calibrated() -> None:
    """Of configurations that truly retain 95%, about half hold "95%" with probability above one half."""
    found = []
    for seed in range(120):
        own, plain = paired(100, 0.8, 0.05, seed)
        weights = {name: stats.resamples(range(100), seed + i, draws=200) for i, name in enumerate(own)}
        found.append(Scores.of(own, plain, weights).probability([Goal("retention", 0.95)]))
    assert 0.35 < np.mean(np.array(found) >= 0.5) < 0.65
    assert 0.02 < np.mean(np.array(found) >= 0.9) < 0.2


def test_nothing_right_and_nothing_different() -> None:
    none = {"a": np.zeros(5, bool)}
    found = Scores.of(none, none, estimate.resampled({"a": range(5)}, 0))
    assert math.isnan(found.retention) and found.probability([Goal("retention", 0.1)]) == 0.0
    assert not found.meets([Goal("retention", 0.1)])
    assert estimate.at_most(100) == pytest.approx(0.0295, abs=1e-4)
    assert pytest.approx((1 - estimate.at_most(37)) ** 37) == 0.05


def test_medians_resample_questions() -> None:
    found = estimate.medians([[1.0, 1.0], [3.0, 3.0], []], seed=0, draws=4000)
    assert set(found) == {1.0, 2.0, 3.0}
    assert np.mean(found == 2.0) == pytest.approx(0.5, abs=0.03)
    assert np.isnan(estimate.medians([], 0)).all()


# -- the search, on a table ---------------------------------------------------------------------------------------

BUDGETS = [round(576 * 2 ** (-step / 4)) for step in range(24, 0, -1)]


class Book:
    """An evaluator that looks everything up: 576 tokens, four subsets, two tasks.

    ``needs`` says at which budget a variant still retains 98%; below, it loses 4% with every step; ``best`` is what it
    retains at most. ``overhead`` divides its speed-up.
    """

    def __init__(
        self,
        needs: Mapping[str, float],
        *,
        best: Mapping[str, float] | None = None,
        overhead: Mapping[str, float] | None = None,
        floor: Mapping[str, int] | None = None,
        timed: bool = True,
        total: int = 800,
    ) -> None:
        self.needs, self.best, self.overhead = needs, best or {}, overhead or {}
        self.floor, self.timed = floor or {}, timed
        self.sizes = split.sizes(total)
        self.answers: set[tuple[str, int]] = set()
        self.calls: list[tuple[Trial, int]] = []
        self.order = {name: np.random.default_rng(i).permutation(total) for i, name in enumerate(needs)}
        self.plain = np.random.default_rng(99).random(total) < 0.85
        self.weights = {n: {"a": stats.resamples(range(n), 7, draws=400)} for n in self.sizes}

    @property
    def rungs(self) -> int:
        return len(self.sizes)

    def grids(self) -> dict[str, list[int]]:
        return {name: [b for b in BUDGETS if b >= self.floor.get(name, 0)] for name in self.needs}

    def retained(self, trial: Trial) -> float:
        steps = 4 * math.log2(trial.keep / self.needs[trial.variant])
        return min(self.best.get(trial.variant, 1.0), 0.985 + 0.005 * steps if steps >= -0.1 else 0.985 + 0.04 * steps)

    def scores(self, trials: Sequence[Trial], rung: int) -> dict[Trial, Scores]:
        found = {}
        for trial in trials:
            n = self.sizes[rung]
            self.calls.append((trial, rung))
            self.answers |= {(trial.id, i) for i in range(n)}
            lost = self.order[trial.variant] < (1 - self.retained(trial)) * len(self.plain)
            own = {"a": (self.plain & ~lost)[:n]}
            found[trial] = Scores.of(own, {"a": self.plain[:n]}, self.weights[n])
        return found

    def costs(self, trials: Sequence[Trial]) -> dict[Trial, Cost]:
        return {trial: self.cost(trial) for trial in trials}

    def cost(self, trial: Trial) -> Cost:
        share = trial.keep / 576
        speedup = 1 / (0.2 + 0.8 * share) / self.overhead.get(trial.variant, 1.0) if self.timed else None
        return Cost(float(trial.keep), share, speedup)


MANY = {"good": 100, **{f"poor{i}": 200 + 20 * i for i in range(15)}}


def search(book: Book, target: str, confidence: float = 0.9) -> Any:
    return Search(book, parse(target), confidence).run()


@pytest.mark.parametrize("timed", [True, False])
def test_the_cheapest_that_keeps_enough(timed: bool) -> None:
    book = Book(MANY, timed=timed)
    found = search(book, "retention>=0.97")
    assert found.reached and found.best.variant == "good"
    assert 80 <= found.best.keep <= 145
    assert len(book.calls) == len(set(book.calls))  # nothing twice
    whole = len(MANY) * len(BUDGETS) * 800
    assert len(book.answers) < whole / 20  # 307,200 in the full grid
    first = [trial for trial, rung in book.calls if rung == 0]
    assert len(first) <= 4.6 * len(MANY)  # log2(24) probes a variant, fewer for those that are far behind
    assert len([trial for trial, rung in book.calls if rung == 3]) <= 12


def test_speed_decides_not_the_budget() -> None:
    needs = {"slow": 90, "quick": 110}
    assert search(Book(needs, overhead={"slow": 1.5}), "retention>=0.97").best.variant == "quick"
    assert search(Book(needs, overhead={"slow": 1.5}, timed=False), "retention>=0.97").best.variant == "slow"


def test_the_most_accurate_that_is_fast_enough() -> None:
    book = Book(MANY, overhead={"good": 1.1})
    found = search(book, "speedup>=2")
    assert found.reached and found.best.variant == "good"
    cost = book.cost(found.best)
    assert cost.speedup is not None and cost.speedup >= 2
    larger = Trial("good", BUDGETS[BUDGETS.index(found.best.keep) + 1])
    assert book.cost(larger).speedup < 2 * 1.03  # the largest budget that is
    assert len({trial for trial, _ in book.calls}) == len(MANY)  # only the best budget of each is asked about


def test_equal_accuracy_goes_to_the_cheaper() -> None:
    book = Book({"a": 10, "b": 10}, best={"a": 1.0, "b": 1.0}, floor={})
    book.order["b"] = book.order["a"]
    book.overhead = {"a": 1.2}
    assert search(book, "tokens<=200").best.variant == "b"


def test_conditions_on_both() -> None:
    found = search(Book({"a": 100, "b": 150}, overhead={"a": 2.2}), "retention>=0.97 and speedup>=2")
    assert found.reached and found.best.variant == "b"  # a keeps more, but at its budget is not fast enough
    tight = search(Book({"a": 100, "b": 150}), "retention>=0.97 and tokens<=50")
    assert not tight.reached and tight.best.keep <= 50


def test_budgets_out_of_reach_are_not_tried() -> None:
    book = Book({"late": 50, "early": 60}, floor={"late": 300})
    found = search(book, "retention>=0.97")
    assert found.best.variant == "early"
    assert all(trial.keep >= 300 for trial, _ in book.calls if trial.variant == "late")


def test_out_of_reach() -> None:
    book = Book({"a": 100, "b": 200}, best={"a": 0.9, "b": 0.85})
    found = search(book, "retention>=0.98")
    assert not found.reached and found.best.variant == "a" and "no configuration" in found.why
    found = search(Book(MANY), "speedup>=20")
    assert not found.reached and found.best.keep == BUDGETS[0] and "that cheap" in found.why


def test_nothing_to_retain() -> None:
    book = Book(MANY)
    book.plain[:] = False
    with pytest.raises(VtokError, match="none of 100 questions right, so there is nothing to retain"):
        search(book, "retention>=0.9")
    assert {rung for _, rung in book.calls} == {0}


def test_one_small_subset() -> None:
    found = search(Book({"a": 100, "b": 300}, total=40), "retention>=0.9", 0.6)
    assert found.reached and found.best.variant == "a"


@pytest.mark.parametrize("start", [None, 0, 5, 11, 23])
@pytest.mark.parametrize("truth", [0, 1, 7, 12, 22, 23, 24])
def test_brackets_find_every_place(start: int | None, truth: int) -> None:
    bracket, looks = Bracket(-1, 24, start), 0
    while (place := bracket.next()) is not None:
        assert 0 <= place < 24
        bracket.tell(place, place >= truth)
        looks += 1
    assert bracket.high == truth
    assert looks <= (5 if start is None else 10)


# -- candidates ---------------------------------------------------------------------------------------------------

LLAVA = Shape(depth=12, tower_depth=6, has_cls=True, packed=False, tiled=False, family="llava")


def test_variants_change_one_thing() -> None:
    found = candidates.variants(candidates.chains(["fastv", "divprune+random_deep"], {}), LLAVA, {})
    assert {"fastv", "fastv(k=3)", "fastv(k=6)", "divprune+random_deep", "divprune+random_deep(layer=0.5)"} <= set(
        found
    )
    assert len(set(found.values())) == len(found)
    fixed = candidates.variants(candidates.chains(["fastv"], {"fastv": {"k": 4}}), LLAVA, {"fastv": {"k": 4}})
    assert list(fixed) == ["fastv(k=4)"]
    shallow = dataclasses.replace(LLAVA, depth=3)
    assert set(candidates.variants(candidates.chains(["fastv"], {}), shallow, {})) == {"fastv", "fastv(k=1)"}
    assert candidates.chains(["random"], {}, seed=5)[0][0].seed == 5


def test_budgets() -> None:
    found = candidates.grid([576], [64])
    assert 64 in found and found == sorted(set(found)) and found[0] == 9 and found[-1] == 484
    shares = candidates.grid([100, 300])
    assert all(isinstance(own, float) for own in shares) and shares[-1] == 0.841
    assert candidates.grid([1]) == [1]
    assert candidates.within([9, 64, 100], [64]) == [9, 64] and candidates.within([9, 64], []) == [9, 64]
    assert candidates.within([9, 64], [5]) == [9] and candidates.within(shares, [5]) == shares
    with pytest.raises(VtokError, match="nothing to tune"):
        candidates.grid([])


def test_wrong_methods() -> None:
    for names, options, message in (
        (["nosuch"], {}, "no method 'nosuch'"),
        (["fastv"], {"random": {"seed": 1}}, "not among the methods"),
        ([], {}, "no method to search"),
    ):
        with pytest.raises(VtokError, match=message):
            candidates.chains(names, options)


# -- a real model -------------------------------------------------------------------------------------------------

MODEL, PROCESSOR = tiny.build("llava")
QUICK: dict[str, Any] = {"methods": ["random", "fastv"], "vary": False, "max_new_tokens": 2, "time_samples": 0}


def agreeing(answer: str, sample: Sample) -> bool:
    """Right where the first letter is one of most letters: a coin that pruning may turn."""
    return bool(answer) and (ord(answer[0]) + len(sample.id)) % 4 > 0


def small(out: Path, target: str, **changes: Any) -> dict[str, Any]:
    tasks = [tiny.task("colour", 8), tiny.task("exists", 8)]
    settings = {**QUICK, "judge": agreeing, "progress": False, **changes}
    with torch.no_grad():
        return tune(MODEL, PROCESSOR, target, tasks, out, **settings)


def test_resume_asks_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = small(tmp_path / "whole", "tokens<=20")
    assert whole["met"] and whole["searched"]["answers_now"] == whole["searched"]["answers"]
    asked = 0
    original = Asking._lines

    def stopping(self: Any, entry: Any, batch: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 9:
            raise KeyboardInterrupt
        return original(self, entry, batch)

    monkeypatch.setattr(Asking, "_lines", stopping)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "cut", "tokens<=20")
    assert asked == 9
    again = small(tmp_path / "cut", "tokens<=20")
    lines = [store.key_of(line) for line in store.read(tmp_path / "cut" / store.SAMPLES)]
    assert len(lines) == len(set(lines)) == whole["searched"]["answers"]
    assert again["searched"]["answers_now"] == len(lines) - 8
    for key in ("best", "held_out", "met"):
        assert again[key] == whole[key]
    before = asked
    third = small(tmp_path / "cut", "tokens<=20")
    assert asked == before and third["searched"]["answers_now"] == 0 and third["best"] == whole["best"]


def test_held_out_questions_have_no_part_in_the_choice(tmp_path: Path) -> None:
    found = small(tmp_path, "tokens<=20")
    tasks = [split.headline(tiny.task(name, 8)) for name in ("colour", "exists")]
    _, rest = split.split(tasks, 0.5, 0)
    kept_back = {(task.name, s.id) for task in rest for s in task.samples}
    lines = list(store.read(tmp_path / store.SAMPLES))
    touched = {line["entry"] for line in lines if (line["task"], line["sample"]) in kept_back}
    assert touched == {"plain", found["best"]["id"]}
    assert found["held_out"]["questions"] == len(kept_back)


def test_pictures_of_different_sizes_get_shares(tmp_path: Path) -> None:
    built = tiny.build("qwen2_5_vl")
    settings = {**QUICK, "judge": agreeing, "progress": False, "methods": ["random"]}
    found = tune(*built, "macs<=0.5", [tiny.task("colour", 6)], tmp_path, **settings)
    assert found["met"] and isinstance(found["best"]["keep"], float) and found["held_out"]["cost"]["macs"] <= 0.505


def test_budgets_that_a_method_refuses_late_are_no_end(tmp_path: Path) -> None:
    """mctf can at most halve in each of its layers, which only shows when it runs: it is timed all the same."""
    found = small(tmp_path, "speedup>=0.001", methods=["mctf"], keeps=[2, 40], time_samples=1, repeats=1)
    assert found["met"] and found["best"]["keep"] == 40
    assert found["held_out"]["cost"]["speedup"] is not None


def test_config_of_somebody_else_stays(tmp_path: Path) -> None:
    with vtok.compressed(MODEL, "random", keep=8):
        vtok.save(MODEL, tmp_path, weights=False)
    before = (tmp_path / "vtok_config.json").read_text()
    with pytest.raises(VtokError, match="not written by vtok tune"):
        small(tmp_path, "tokens<=20")
    assert (tmp_path / "vtok_config.json").read_text() == before


def test_settings_that_make_no_sense(tmp_path: Path) -> None:
    for target, changes, message in (
        ("speedup>=2", {}, "needs a clock"),
        ("tokens<=20", {"confidence": 1.0}, "confidence"),
        ("tokens<=20", {"limit": 0}, "limit=0"),
        ("tokens<=20", {"calibration": 0.0}, "calibration"),
    ):
        with pytest.raises(VtokError, match=message):
            small(tmp_path / "out", target, **changes)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> tuple[Path, Path]:
    """A saved model, and questions whose truth is what it answers."""
    from vtok_eval.harness.answers import greedy
    from vtok_eval.harness.prompts import Prompts

    root = tmp_path_factory.mktemp("tune")
    for part in (MODEL, PROCESSOR):
        part.save_pretrained(root / "model")
    (root / "data" / "images").mkdir(parents=True)
    prompts, lines = Prompts(PROCESSOR, True), []
    task = tiny.task("colour", 12)
    for sample in task.samples:
        pictures = [tiny.picture(name) for name in sample.images]
        inputs = prompts.inputs([prompts.text(task, sample)], [pictures])
        with torch.no_grad():
            out = MODEL.generate(**inputs, generation_config=greedy(MODEL, prompts, 2))
        answer = prompts.answers(out[:, inputs["input_ids"].shape[1] :])[0] or "nothing"
        for name, picture in zip(sample.images, pictures, strict=True):
            picture.save(root / "data" / "images" / f"{name}.png")
        images = [f"{name}.png" for name in sample.images]
        lines.append(json.dumps({"id": sample.id, "images": images, "question": sample.question, "answer": answer}))
    (root / "data" / "colour.jsonl").write_text("\n".join(lines) + "\n")
    return root / "model", root / "data"


def call(folders: tuple[Path, Path], out: Path, target: str, *more: str) -> Any:
    given = ["tune", "--model", str(folders[0]), "--data", str(folders[1]), "--target", target, "--out", str(out)]
    fixed = ["--max-new-tokens", "2", "--device", "cpu", "--method", "random,divprune", "--no-variants"]
    return CliRunner().invoke(app, [*given, *fixed, *more], env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def _tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ELSEWHERE, "tune", "vtok_eval.tune:command")


def test_command_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    found = call(folders, tmp_path, "tokens<=16 and speedup>=0.01", "--time-samples", "1", "--repeats", "1")
    assert found.exit_code == 0, found.output
    words = " ".join(found.output.split())
    for part in ("met", "choice", "held-out", "had no part in the choice", "probability", "vtok.load(", "speed-up"):
        assert part in words, found.output
    best = json.loads((tmp_path / "tune.json").read_text())["best"]
    model = vtok.load(tmp_path, model=tiny.build("llava")[0])  # the line that it prints
    from vtok.api import session_of

    assert [own.name for own in session_of(model).methods] == [own["name"] for own in best["methods"]]
    assert session_of(model).keep == best["keep"] == 16
    tuned = json.loads((tmp_path / "vtok_config.json").read_text())["tuned"]
    assert (tuned["met"] and tuned["target"] == "speedup>=0.01 and tokens<=16") or tuned["target"].startswith("tokens")


def test_command_line_refuses(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given = ["--time-samples", "0", "--keep", "1,2"]
    found = call(folders, tmp_path, "retention>=1.5", *given)
    assert found.exit_code == 1, found.output
    words = " ".join(found.output.split())
    for part in ("not met", "best found", "would meet retention>=", "instead of retention>=1.5", "--best-effort"):
        assert part in words, found.output
    assert not (tmp_path / "vtok_config.json").exists()
    found = call(folders, tmp_path, "retention>=1.5", *given, "--best-effort", "--json")
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert not told["met"] and told["searched"]["answers_now"] == 0
    assert (tmp_path / "vtok_config.json").is_file()
    assert call(folders, tmp_path, "retention>=1.5", *given).exit_code == 1
    assert not (tmp_path / "vtok_config.json").exists()  # the one of before is not taken for this run's


def test_wrong_words_do_not_wait_for_the_model(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vtok.io.plain", lambda *_, **__: pytest.fail("the model was loaded before that was found"))
    for target, more, message in (
        ("speed=2", [], "knows no 'speed'"),
        ("retention>=0.9", ["--calibration", "2"], "--calibration 2"),
        ("retention>=0.9", ["--keep", "8,0.5"], "mixes tokens and shares"),
        ("retention>=0.9", ["--tasks", "nosuch"], "there is no task 'nosuch'"),
        ("retention>=0.9", ["--dtype", "int8"], "dtype 'int8' is unknown"),
    ):
        found = call(folders, tmp_path / "out", target, *more)
        assert found.exit_code == 2 and message in " ".join(found.output.split()), found.output
    assert not (tmp_path / "out").exists()
