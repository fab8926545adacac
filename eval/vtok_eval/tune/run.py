"""``tune``: search on one part of the questions, check the choice on the rest, write it down."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vtok.api import compressed
from vtok.api import methods as fitting
from vtok.engine.plan import shape_of
from vtok.errors import VtokError
from vtok.io import CONFIG, read_config, save
from vtok_eval.harness import start, stats, store
from vtok_eval.harness.answers import Answers
from vtok_eval.harness.asking import Judge
from vtok_eval.harness.features import CAPACITY, Features
from vtok_eval.harness.ranks import Ranks
from vtok_eval.harness.results import described_task, finite, heading
from vtok_eval.harness.settings import settings
from vtok_eval.harness.sizes import token_sizes
from vtok_eval.samples import Task
from vtok_eval.tasks import limited, right
from vtok_eval.tune import candidates, estimate, split
from vtok_eval.tune.questions import Questions
from vtok_eval.tune.search import Outcome, Search
from vtok_eval.tune.target import Target, parse
from vtok_eval.tune.watch import TIMES, Watch

SCHEMA = 1
TUNED = "tune.json"


def tune(
    model: Any,
    processor: Any,
    target: str | Target,
    tasks: Sequence[Task],
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    keeps: Sequence[int | float] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    vary: bool = True,
    name: str = "",
    calibration: float = 0.5,
    confidence: float = 0.9,
    limit: int | None = None,
    batch_size: int = 1,
    max_new_tokens: int = 16,
    instruction: bool | None = None,
    seed: int = 0,
    time_samples: int = 4,
    repeats: int = 3,
    clock: str = "wall",
    best_effort: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    command: str = "",
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Find the method, options and budget that meet a target, and say how sure it is.

    Parameters
    ----------
    model, processor, tasks
        As for ``vtok_eval.harness.evaluate``.
    target : str or Target
        ``"retention>=0.98"``, ``"speedup>=2"``, ``"retention>=0.97 and tokens<=64"``. With a condition on answers the
        cheapest configuration is sought, without one the most accurate.
    out : str or Path
        Folder for ``vtok_config.json``, ``tune.json`` and the answers. A run that was stopped goes on there.
    methods : sequence of str, optional
        Names, ``"divprune+random_deep"`` composes; by default all that fit the model, and a few chains.
    keeps : sequence of int or float
        Only these budgets; by default steps of 16% down to a 64th of the tokens.
    options : mapping, optional
        Method name -> options that stay as they are.
    vary : bool
        Search layers and published settings of the methods, too.
    calibration : float
        Share of the questions to search with; the rest checks the choice.
    confidence : float
        Probability of the target on the calibration questions that the choice needs.
    name, limit, batch_size, max_new_tokens, instruction, clock, overwrite, progress, command, judge
        As for ``vtok_eval.harness.evaluate``.
    seed : int
        Of the split, the bootstrap, and methods that draw.
    time_samples, repeats : int
        Questions on which a configuration is timed, and rounds with each; 0 samples: cost is the MAC ratio.
    best_effort : bool
        Write the best configuration also where it misses the target.

    Returns
    -------
    dict
        The contents of ``tune.json``; ``"met"`` says whether the choice meets the target on the held-out questions.

    Raises
    ------
    VtokError
        A malformed target, settings that make no sense, or a folder that holds answers made with other settings.
    """
    target = parse(target) if isinstance(target, str) else target
    start.check(model, batch_size, limit, max_new_tokens, time_samples, repeats, clock)
    _check(target, confidence, time_samples)
    out, options = Path(out), options or {}
    adapter = start.plain_adapter(model)
    cut = limited(tasks, limit)
    first, rest = split.split([split.headline(task) for task in cut], calibration, seed)
    everything = methods is None
    chains = candidates.chains(fitting(adapter.family) if methods is None else methods, options, seed)
    if everything:
        chains += candidates.chains(candidates.CHAINS, {}, seed)
    shape = shape_of(adapter)
    named = (
        candidates.variants(chains, shape, options) if vary else {candidates.title(list(own)): own for own in chains}
    )
    prompts = start.prompts_of(model, processor, name, instruction)
    sizes = token_sizes(prompts, adapter, tasks)
    limits = [int(goal.value) for goal in target.costs if goal.name == "tokens" and goal.value >= 1]
    budgets = candidates.within(sorted(set(keeps)) or candidates.grid(sizes, limits), limits)
    answers = Answers(model, adapter, prompts, max_new_tokens, Features(model, adapter, CAPACITY))
    asked = settings(model, prompts, answers.config, tasks, [])
    with store.locked(out):
        _own_config(out)
        if overwrite:
            (out / TIMES).unlink(missing_ok=True)
        start.go_on(out, asked, overwrite, Ranks())
        (out / CONFIG).unlink(missing_ok=True)  # of an earlier run, not to be taken for this one's
        key = store.fingerprint(asked)
        watch = Watch(answers, out, key, time_samples, repeats, clock, progress) if time_samples else None
        questions = Questions(
            answers, asked, named, budgets, first, sizes, out, watch, judge or right, batch_size, seed, progress
        )
        outcome = Search(questions, target, confidence).run()
        held = _held_out(questions, outcome, target, rest, seed)
        entry = questions.entry(outcome.best)
        met = not target.missed(held["values"])
        found = {
            **heading(SCHEMA, command, model, adapter, name),
            "target": str(target),
            "met": met,
            "sure": met and held["probability"] >= confidence,
            "best": {
                "id": entry.id,
                "methods": [{"name": own.name, "options": _plain_options(own)} for own in entry.chain],
                "keep": entry.budget,
                "reached_on_calibration": outcome.reached,
                "why": outcome.why,
            },
            "held_out": held,
            "needed": None if met else _needed(target, held),
            "calibration": {
                "share": calibration,
                "questions": sum(len(task.samples) for task in first),
                "confidence": confidence,
                "steps": [sum(len(task.samples) for task in own) for own in questions.subsets],
            },
            "searched": {
                "variants": len(named),
                "budgets": budgets,
                "answers": sum(1 for _ in store.read(out / store.SAMPLES)),
                "answers_now": questions.asked,
                "full_grid": len(named) * len(budgets) * sum(len(task.samples) for task in (*first, *rest)),
                "notes": questions.notes,
                "trials": outcome.history,
            },
            "settings": {"seed": seed, "limit": limit, "time_samples": time_samples, "repeats": repeats},
            "tasks": [described_task(task) for task in cut],
            "problems": questions.problems(),
            "config": None,
            "python": [],
        }
        if met or best_effort:
            found["config"] = str(_written(model, entry, out, found))
            found["python"] = ["import vtok", f"model = vtok.load({str(out)!r}, model=model)"]
        found = finite(found)
        store.write_json(out / TUNED, found)
    return found


def _check(target: Target, confidence: float, time_samples: int) -> None:
    if not time_samples and target.timed:
        raise VtokError("a target on speedup needs a clock; leave --time-samples above 0, or aim at macs or tokens")
    if not 0.5 <= confidence < 1:
        raise VtokError(f"--confidence {confidence:g} must be at least 0.5 and below 1")


def _own_config(out: Path) -> None:
    """Refuse a folder whose settings somebody else wrote."""
    path = out / CONFIG
    if path.is_file() and "tuned" not in read_config(out):
        raise VtokError(f"{path} was not written by vtok tune, which would replace it; take another --out")


def _held_out(
    questions: Questions, outcome: Outcome, target: Target, rest: Sequence[Task], seed: int
) -> dict[str, Any]:
    """The choice alone, on questions that had no part in making it."""
    best = outcome.best
    scores = questions.scored([best], rest, "checking on held-out questions")[best]
    cost, rounds = questions.priced([best], rest, "counting tokens")[best]
    drawn = estimate.medians(rounds, seed)
    holds = scores.holding(target.qualities)
    for goal in target.costs:
        holds = holds & (drawn >= goal.value if goal.name == "speedup" else goal.holds(cost.values()[goal.name]))
    same = scores.differing == 0
    return {
        **scores.as_dict(),
        "cost": {**cost.values(), "speedup_ci": stats.interval(drawn) if cost.speedup is not None else None},
        "values": {**scores.values(), **cost.values()},
        "probability": float(np.mean(holds)),
        "note": f"no answer differs between the two; up to {estimate.at_most(scores.n):.1%} of such questions still may"
        if same
        else "",
    }


def _needed(target: Target, held: Mapping[str, Any]) -> str:
    """What the best configuration does meet."""
    values, parts = held["values"], []
    for goal in target.missed(values):
        value = values[goal.name]
        if value is None or not math.isfinite(value):
            parts.append(f"{goal} cannot be measured here (the plain model gets nothing right, or nothing was timed)")
        elif goal.name in ("tokens", "macs"):
            parts.append(f"{goal.name}<={math.ceil(value * 1000) / 1000:g} instead of {goal}")
        else:
            parts.append(f"{goal.name}>={math.floor(value * 1000) / 1000:g} instead of {goal}")
    return "the best found would meet " + " and ".join(parts)


def _plain_options(method: Any) -> dict[str, Any]:
    return {key: value for key, value in method.options().items() if key != "samples"}


def _written(model: Any, entry: Any, out: Path, found: Mapping[str, Any]) -> Path:
    """``vtok_config.json``, by ``vtok.save``, with where it comes from."""
    with compressed(model, list(entry.chain), keep=entry.budget):
        path = save(model, out, weights=False)
    held = found["held_out"]
    tuned = {
        "target": found["target"],
        "met": found["met"],
        "model": found["model"]["name"],
        "held_out": {key: held[key] for key in ("questions", "accuracy", "plain_accuracy", "retention", "cost")},
        "probability": held["probability"],
    }
    store.write_json(path, finite({**json.loads(path.read_text(encoding="utf-8")), "tuned": tuned}))
    return path


__all__ = ["TUNED", "tune"]
