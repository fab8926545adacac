"""Made-up results of schema 1 for the tests of reports: seeded, plausible in shape, measured nowhere.

``python -m tests.eval.fake_results FOLDER`` writes a large set and its report, to look at.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vtok_eval.harness.bits import pack
from vtok_eval.samples import Sample, Task

TOKENS, LAYERS = 576, 12
# plain accuracy, accuracy without a picture, visual tokens after which 63 % of the difference is there
TASKS = {
    "objects": (0.93, 0.05, 14),
    "exists": (0.91, 0.5, 16),
    "count": (0.84, 0.22, 40),
    "colour": (0.95, 0.15, 10),
    "position": (0.86, 0.25, 26),
    "text": (0.82, 0.01, 85),
    "detail": (0.83, 0.06, 60),
    "multi": (0.85, 0.33, 22),
}
# how far a token carries, least share of the tokens it can reach, share of the random ceiling
METHODS = {
    "flowcut": (1.9, 0.0, 0.93),
    "todre": (1.55, 0.0, 0.95),
    "transprune": (1.5, 0.3, 0.9),
    "mctf": (1.7, 0.0, 0.84),
    "random_deep": (1.4, 0.5, 0.99),
    "divprune": (1.75, 0.0, 0.96),
    "fastv": (1.1, 0.2, 0.94),
    "visionzip": (1.65, 0.0, 0.97),
    "tome": (1.35, 0.0, 0.8),
    "random": (1.0, 0.0, 1.0),
    "uniform": (1.08, 0.0, 0.99),
    "downsample": (1.2, 0.0, 0.98),
}
COLOURS = {"red": (214, 66, 58), "blue": (62, 108, 214), "green": (70, 160, 92), "yellow": (232, 190, 66)}


@dataclass(frozen=True)
class Fake:
    """What to make.

    Attributes
    ----------
    methods, keeps, tasks : sequences
        Of the run; an unreachable pair of method and budget becomes ``raised`` with a chain beside it.
    samples : int
        A task, a quarter of them in group "unseen" if ``unseen``.
    timing, unseen, blank, chains : bool
        With times, with a second group, with an entry that saw empty pictures, with chains for what is out of reach.
    refused : str or None
        A method that is refused everywhere.
    text : str
        Put into every question and answer.
    """

    methods: Sequence[str] = tuple(METHODS)
    keeps: Sequence[float] = (192, 128, 64, 32)
    tasks: Sequence[str] = tuple(TASKS)
    samples: int = 40
    timing: bool = True
    unseen: bool = True
    blank: bool = True
    chains: bool = True
    refused: str | None = None
    text: str = ""
    seed: int = 0


def make(folder: Path, fake: Fake | None = None, lines: bool = True) -> tuple[dict[str, Any], list[Task]]:
    """Write ``results.json`` and ``samples.jsonl`` into a folder; returns the results and tasks with pictures."""
    fake = fake or Fake()
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [_task(name, fake) for name in fake.tasks]
    results = _results(fake, tasks)
    plan = results["entries"]
    answers = _answers(fake, tasks, plan)
    for entry in plan:
        if entry["status"] != "refused":
            _score(entry, answers, tasks)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    if lines:
        with (folder / "samples.jsonl").open("w") as out:
            for line in _lines(fake, tasks, plan, answers):
                out.write(json.dumps(line) + "\n")
    return results, tasks


# -- samples and pictures -----------------------------------------------------------------------------------------


def _task(name: str, fake: Fake) -> Task:
    samples = []
    for number in range(fake.samples):
        group = "unseen" if fake.unseen and number % 4 == 3 else "seen"
        images = (f"{number}.png", f"{number}b.png") if name == "multi" else (f"{number}.png",)
        question = f"What colour is the small shape in picture {number}?{fake.text}"
        answer = list(COLOURS)[number % len(COLOURS)] + fake.text
        samples.append(Sample(f"{name}-{number:04d}", name, images, question, answer, group=group))
    metric = "yes/no" if name == "exists" else "accuracy"
    return Task(name, tuple(samples), lambda picture, name=name: _picture(name, picture), metric, source="made up")


def _box(task: str, picture: str) -> tuple[int, int, int]:
    rng = np.random.default_rng([*f"{task}/{picture}".encode()])
    size = 64 if task in ("detail", "text") else 130
    left, top = rng.integers(10, 326 - size, 2)
    return int(left), int(top), size


def _picture(task: str, picture: str) -> Image.Image:
    rng = np.random.default_rng([*f"{task}/{picture}".encode(), 7])
    slope = np.linspace(0, 1, 336)
    base, other = rng.integers(150, 245, (2, 3))
    field = base + (other - base) * (slope[:, None, None] + slope[None, :, None]) / 2
    image = Image.fromarray((field + rng.normal(0, 3, field.shape)).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    left, top, size = _box(task, picture)
    number = int("".join(filter(str.isdigit, picture)))
    fill = list(COLOURS.values())[number % len(COLOURS)]
    shape = draw.ellipse if number % 2 else draw.rectangle
    shape((left, top, left + size, top + size), fill=fill, outline=(40, 40, 44), width=3)
    return image


def _kept(entry: Mapping[str, Any], task: str, picture: str) -> list[int]:
    count = round(entry["counts"]["tokens_kept"])
    rng = np.random.default_rng([*f"{entry['id']}/{task}/{picture}".encode()])
    method = entry["method"]
    if method is None:
        return list(range(TOKENS))
    if method in ("uniform", "downsample"):
        return sorted({round(i * (TOKENS - 1) / max(1, count - 1)) for i in range(count)})
    score = rng.random(TOKENS)
    if not method.startswith("random"):
        left, top, size = _box(task, picture)
        rows, columns = np.divmod(np.arange(TOKENS), 24)
        x, y = columns * 14 + 7, rows * 14 + 7
        inside = (abs(x - left - size / 2) < size / 2) & (abs(y - top - size / 2) < size / 2)
        score = score + inside * METHODS.get(method.split("+")[0], (1.5,))[0] * 0.4
    return sorted(int(i) for i in np.argsort(-score)[:count])


# -- the table of entries -----------------------------------------------------------------------------------------


def _results(fake: Fake, tasks: Sequence[Task]) -> dict[str, Any]:
    groups = {task.name: [sample.group for sample in task.samples] for task in tasks}
    entries = [_entry("plain", None, None, TOKENS, fake)]
    if fake.blank:
        entries.append(_entry("blank", None, None, TOKENS, fake))
    for keep in fake.keeps:
        tokens = keep * TOKENS if keep < 1 else keep
        for method in fake.methods:
            least = METHODS[method][1] * TOKENS
            identity = f"{method}@{keep:g}"
            if method == fake.refused:
                note = f"{method} needs a tower with a CLS token; this model has none"
                refused = {"status": "refused", "note": note, "counts": None, "timing": None, "peak_mb": None}
                refused |= {"overall": None, "tasks": {}}
                entries.append(_entry(identity, method, keep, tokens, fake) | refused)
                continue
            entry = _entry(identity, method, keep, max(tokens, least), fake)
            if tokens < least:
                entry["status"] = "raised"
                entry["note"] = f"{method} cuts late and reaches no average below {math.ceil(least)} tokens here"
            entries.append(entry)
            if tokens < least and fake.chains:
                chain = _entry(f"divprune+{method}@{keep:g}", f"divprune+{method}", keep, tokens, fake)
                entries.append(chain | {"stands_in_for": identity})
    machine = {"device": "Imaginary CPU", "torch": "2.0", "transformers": "5.0", "threads": 2, "python": "3.11"}
    return {
        "schema": 1,
        "vtok": "0.1.0",
        "created": "2020-02-02T02:02:02+00:00",
        "command": f"vtok eval --model fake-llava --method {','.join(fake.methods)} --tasks all --out results/",
        "model": {
            "name": "fake-llava",
            "family": "llava",
            "parameters": 13_400_000,
            "layers": LAYERS,
            "tokens_per_image": float(TOKENS),
            "dtype": "float32",
            "device": "cpu",
        },
        "machine": machine,
        "settings": {
            "batch_size": 8,
            "limit": None,
            "seed": fake.seed,
            "max_new_tokens": 16,
            "time_samples": 16,
            "repeats": 3,
        },
        "fingerprint": "fa4e" * 8,
        "tasks": [
            {
                "name": task.name,
                "metric": task.metric,
                "samples": len(task.samples),
                "groups": {group: groups[task.name].count(group) for group in sorted(set(groups[task.name]))},
                "source": task.source,
            }
            for task in tasks
        ],
        "entries": entries,
        "problems": [
            {"task": tasks[0].name, "sample": tasks[0].samples[0].id, "entry": None, "message": "picture is truncated"},
            {"task": tasks[-1].name, "sample": "x-1", "entry": "fastv@64", "message": "empty answer" + fake.text},
        ],
    }


def _entry(identity: str, method: str | None, keep: float | None, tokens: float, fake: Fake) -> dict[str, Any]:
    share = tokens / TOKENS
    _, least, ceiling = METHODS.get((method or "random").split("+")[0], (1.5, 0.0, 0.95))
    late = method is not None and least > 0
    first = TOKENS if late else tokens
    layer_tokens = [float(first)] * (LAYERS // 3) + [max(1.0, (tokens * 1.5 - first * 0.5))] * (LAYERS - LAYERS // 3)
    mac_ratio = 0.9 * share + 0.1 * share**2
    entry = {
        "id": identity,
        "method": method,
        "options": {},
        "keep": keep,
        "budget": tokens,
        "status": "ok",
        "note": "",
        "stands_in_for": None,
        "counts": {
            "tokens_in": float(first),
            "tokens_kept": layer_tokens[-1] if late else float(tokens),
            "average_tokens": float(tokens),
            "layer_tokens": layer_tokens,
            "mac_ratio": mac_ratio if method else 1.0,
        },
        "timing": None,
        "peak_mb": 38.0 + 90 * share + (6 if method == "mctf" else 0),
    }
    if fake.timing and identity != "blank":
        prefill = 61 + 92 * mac_ratio if method is None else (58 + 92 * mac_ratio) / ceiling
        select = 0.0 if method is None else 14 * (1 - ceiling) + 0.2
        spread = lambda value, wide=0.04: {  # noqa: E731
            "median": value,
            "low": value * (1 - wide),
            "high": value * (1 + 1.5 * wide),
        }
        plain = 61 + 92
        entry["timing"] = {
            "encode": spread(48.0),
            "select": spread(select),
            "prefill": spread(prefill),
            "decode": spread(4.2 + 1.6 * share),
            "speedup": spread(plain / prefill if method else 1.0),
            "share": spread(ceiling, 0.02) if method and not method.startswith("random") else None,
            "share_at_input": spread(ceiling * 0.97, 0.02) if method else None,
        }
    return entry


# -- answers and scores -------------------------------------------------------------------------------------------


def _answers(fake: Fake, tasks: Sequence[Task], plan: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], np.ndarray]:
    """Right or wrong, per entry and task: a shared difficulty of every sample, and luck of one's own now and then."""
    found = {}
    for number, task in enumerate(tasks):
        best, blank, need = TASKS[task.name]
        rng = np.random.default_rng([fake.seed, number])
        hard = rng.random(len(task.samples))
        unseen = np.array([sample.group == "unseen" for sample in task.samples])
        for entry in plan:
            if entry["status"] == "refused":
                continue
            tokens = entry["counts"]["average_tokens"]
            carry = METHODS.get((entry["method"] or "").split("+")[0], (3.0,))[0]
            level = 1 - math.exp(-((tokens * carry / need / 2) ** 0.8))
            level = 0.0 if entry["id"] == "blank" else 1.0 if entry["method"] is None else level
            luck = np.where(rng.random(len(hard)) < 0.85, hard, rng.random(len(hard)))
            luck = hard if entry["method"] is None else luck
            found[entry["id"], task.name] = luck < (blank + (best - blank) * level) * np.where(unseen, 0.86, 1.0)
    return found


def _score(entry: dict[str, Any], answers: Mapping[tuple[str, str], np.ndarray], tasks: Sequence[Task]) -> None:
    beside = f"@{entry['keep']:g}" if entry["keep"] is not None else None
    scores = {}
    for task in tasks:
        right, plain = answers[entry["id"], task.name], answers["plain", task.name]
        random, small = (answers.get((f"{name}{beside}", task.name)) for name in ("random", "downsample"))
        seen = np.array([sample.group == "seen" for sample in task.samples])
        scores[task.name] = _cell(right, plain, random, small, seen, entry, task.metric)
    entry["tasks"] = scores
    mean = lambda pick: float(np.mean([pick(score) for score in scores.values()]))  # noqa: E731
    accuracy = mean(lambda score: score["accuracy"])
    half = mean(lambda score: score["accuracy"] - score["ci"][0]) / math.sqrt(len(scores))
    difference = None
    if entry["id"] != "plain":
        value = mean(lambda score: score["difference"]["value"])
        wide = mean(lambda score: score["difference"]["value"] - score["difference"]["ci"][0]) / math.sqrt(len(scores))
        difference = {"value": value, "ci": [value - wide, value + wide]}
    every = [answers[entry["id"], task.name] for task in tasks]
    joined = lambda name: np.concatenate([answers[name, task.name] for task in tasks])  # noqa: E731
    random = f"random{beside}"
    hard = [score["hard"] for score in scores.values() if score["hard"] and score["hard"]["n"]]
    groups = {
        group: {
            "n": sum(score["groups"][group]["n"] for score in scores.values()),
            "accuracy": mean(lambda score, group=group: score["groups"][group]["accuracy"]),
        }
        for group in next(iter(scores.values()))["groups"]
    }
    plain_mean = np.mean([answers["plain", t.name][[s.group == "seen" for s in t.samples]].mean() for t in tasks])
    entry["overall"] = {
        "n": int(sum(len(right) for right in every)),
        "correct": int(sum(right.sum() for right in every)),
        "accuracy": accuracy,
        "ci": [accuracy - half, accuracy + half],
        "f1": None,
        "retention": accuracy / float(plain_mean) if plain_mean else None,
        "difference": difference,
        "p_plain": None if difference is None else _mcnemar(np.concatenate(every), joined("plain")),
        "p_random": None
        if entry["keep"] is None or entry["id"] == random or (random, tasks[0].name) not in answers
        else _mcnemar(np.concatenate(every), joined(random)),
        "hard": {
            "n": sum(part["n"] for part in hard),
            "accuracy": float(np.average([p["accuracy"] for p in hard], weights=[p["n"] for p in hard])),
        }
        if hard
        else None,
        "groups": groups,
    }


def _cell(
    right: np.ndarray,
    plain: np.ndarray,
    random: np.ndarray | None,
    small: np.ndarray | None,
    seen: np.ndarray,
    entry: Mapping[str, Any],
    metric: str,
) -> dict[str, Any]:
    accuracy, base = float(right[seen].mean()), float(plain[seen].mean())
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / seen.sum())
    step = (right[seen].astype(float) - plain[seen]).std() * 1.96 / math.sqrt(seen.sum())
    hard = None if small is None else plain & ~small
    groups = {"seen": seen} | ({"unseen": ~seen} if not seen.all() else {})
    return {
        "n": len(right),
        "correct": int(right.sum()),
        "accuracy": accuracy,
        "ci": [max(0.0, accuracy - half), min(1.0, accuracy + half)],
        "f1": accuracy * 0.98 if metric == "yes/no" else None,
        "retention": accuracy / base if base else None,
        "difference": None
        if entry["id"] == "plain"
        else {"value": accuracy - base, "ci": [accuracy - base - step, accuracy - base + step]},
        "p_plain": None if entry["id"] == "plain" else _mcnemar(right, plain),
        "p_random": None if random is None or random is right else _mcnemar(right, random),
        "hard": None
        if hard is None or not hard.any()
        else {"n": int(hard.sum()), "accuracy": float(right[hard].mean())},
        "groups": {
            name: {"n": int(part.sum()), "accuracy": float(right[part].mean())} for name, part in groups.items()
        },
    }


def _mcnemar(one: np.ndarray, other: np.ndarray) -> float:
    wins, losses = int((one & ~other).sum()), int((~one & other).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n if n else 1.0
    return min(1.0, 2 * tail)


def _lines(
    fake: Fake, tasks: Sequence[Task], plan: Sequence[Mapping[str, Any]], answers: Mapping[tuple[str, str], np.ndarray]
) -> Any:
    for entry in plan:
        if entry["status"] == "refused":
            continue
        for task in tasks:
            for number, sample in enumerate(task.samples):
                right = bool(answers[entry["id"], task.name][number])
                yield {
                    "entry": entry["id"],
                    "task": task.name,
                    "sample": sample.id,
                    "prompt": sample.question,
                    "answer": sample.answer if right else "purple" + fake.text,
                    "truth": sample.answer,
                    "correct": right,
                    "kept": [pack(_kept(entry, task.name, picture), TOKENS) for picture in sample.images],
                    "tokens": [TOKENS] * len(sample.images),
                    "layers_average": entry["counts"]["average_tokens"],
                    "error": None,
                }


if __name__ == "__main__":
    from vtok_eval import render

    target = Path(sys.argv[1])
    _, made = make(target, replace(Fake(), samples=int(sys.argv[2]) if len(sys.argv) > 2 else 60))
    render.write(target, made)
