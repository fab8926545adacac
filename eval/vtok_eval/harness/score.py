"""From answers to the numbers of ``results.json``."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vtok_eval.harness import bits, counts, stats
from vtok_eval.harness.cells import PLAIN, Entry
from vtok_eval.harness.store import Key, key_of
from vtok_eval.samples import Task
from vtok_eval.tasks import yes_no_f1

SEEN = "seen"
LISTED = 20
"""Empty answers of an entry on a task that are listed one by one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What scoring needs of a line of ``samples.jsonl``."""

    correct: bool
    answer: str
    error: str | None
    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    average: float
    layers: tuple[tuple[float, float], ...]
    mac_ratio: float


def collect(lines: Iterable[Mapping[str, Any]], wanted: set[Key]) -> dict[Key, Answer]:
    """Lines by what they answer, as far as asked for."""
    found = {}
    for line in lines:
        key = key_of(line)
        if key in wanted:
            found[key] = Answer(
                bool(line["correct"]),
                line["answer"],
                line["error"],
                tuple(line["tokens"]),
                tuple(bits.count(mask) for mask in line["kept"]),
                line["layers_average"],
                tuple((run[0], run[1]) for run in line["layers"]),
                line["mac_ratio"],
            )
    return found


class Table:
    """Every entry on every task.

    Samples that the plain model could not be asked (a missing or broken picture) are left out for all; a sample on
    which one entry alone fails counts as wrong there.

    Parameters
    ----------
    entries : sequence of Entry
        The plain model among them.
    tasks : sequence of Task
        With the samples that were asked.
    answers : mapping
        As ``collect`` gives them.
    seed : int
        Of the bootstrap.
    """

    def __init__(
        self, entries: Sequence[Entry], tasks: Sequence[Task], answers: Mapping[Key, Answer], seed: int = 0
    ) -> None:
        self.entries, self.tasks, self.answers = entries, tasks, answers
        self.samples = {
            task.name: [own for own in task.samples if answers[PLAIN, task.name, own.id].error is None]
            for task in tasks
        }
        self.head: dict[str, np.ndarray] = {}
        self.weights: dict[str, np.ndarray] = {}
        for name, samples in self.samples.items():
            groups = [own.group for own in samples]
            self.head[name] = np.array([SEEN not in groups or group == SEEN for group in groups], dtype=bool)
            clusters = [own.images or own.id for own, head in zip(samples, self.head[name], strict=True) if head]
            self.weights[name] = stats.resamples(clusters, seed + zlib.crc32(name.encode()))
        self.by_id = {entry.id: entry for entry in entries}
        self._right = {
            (entry.id, name): np.array([self._is_right(entry, name, own.id) for own in samples], dtype=bool)
            for entry in entries
            if entry.status != "refused"
            for name, samples in self.samples.items()
        }

    def _is_right(self, entry: Entry, task: str, sample: str) -> bool:
        found = self.answers[entry.id, task, sample]
        return found.correct and found.error is None

    # -- scores -------------------------------------------------------------------------------------------------

    def scores(self, entry: Entry) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Overall, and by task."""
        own = {task.name: self._score(entry, [task.name]) for task in self.tasks if len(self.samples[task.name])}
        overall = self._score(entry, list(own))
        found = [score["f1"] for score in own.values() if score["f1"] is not None]
        overall["f1"] = sum(found) / len(found) if found else None
        return overall, own

    def _score(self, entry: Entry, names: Sequence[str]) -> dict[str, Any]:
        """Means over tasks of what is a share; tests over all their samples together."""
        own, plain = self._heads(entry.id, names), self._heads(PLAIN, names)
        weights = [self.weights[name] for name in names]
        draws = _macro([stats.means(x, w) for x, w in zip(own, weights, strict=True)])
        accuracy, reference = _mean_of_means(own), _mean_of_means(plain)
        apart = _macro([stats.means(x * 1.0 - y, w) for x, y, w in zip(own, plain, weights, strict=True)])
        equal = entry.status == "ok" and entry.keep is not None
        return {
            "n": int(sum(len(x) for x in own)),
            "correct": int(sum(x.sum() for x in own)),
            "accuracy": accuracy,
            "ci": stats.interval(draws),
            "f1": self._f1(entry, names[0]) if len(names) == 1 else None,
            "retention": accuracy / reference if reference else None,
            "difference": {"value": accuracy - reference, "ci": stats.interval(apart)},
            "p_plain": None if entry.id == PLAIN else stats.mcnemar(_joined(own), _joined(plain)),
            "p_random": self._against_random(entry, names) if equal else None,
            "hard": self._hard(entry, names) if equal else None,
            "groups": self._groups(entry, names),
        }

    def _heads(self, entry: str, names: Sequence[str]) -> list[np.ndarray]:
        return [self._right[entry, name][self.head[name]] for name in names]

    def _at(self, method: str, keep: float | None) -> str | None:
        found = next((own for own in self.entries if own.method == method and own.keep == keep), None)
        return found.id if found is not None and found.status == "ok" else None

    def _against_random(self, entry: Entry, names: Sequence[str]) -> float | None:
        other = self._at("random", entry.keep)
        if other is None or other == entry.id:
            return None
        return stats.mcnemar(_joined(self._heads(entry.id, names)), _joined(self._heads(other, names)))

    def against(self, first: str, second: str) -> dict[str, Any]:
        """How much more often one entry is right than another on the same samples: the difference of their overall
        accuracies with its paired bootstrap interval, and McNemar's p."""
        names = [task.name for task in self.tasks if len(self.samples[task.name])]
        own, other = self._heads(first, names), self._heads(second, names)
        weights = [self.weights[name] for name in names]
        apart = _macro([stats.means(x * 1.0 - y, w) for x, y, w in zip(own, other, weights, strict=True)])
        return {
            "value": _mean_of_means(own) - _mean_of_means(other),
            "ci": stats.interval(apart),
            "p": stats.mcnemar(_joined(own), _joined(other)),
        }

    def _hard(self, entry: Entry, names: Sequence[str]) -> dict[str, Any] | None:
        """Samples that the plain model gets right and downsampling to the same budget gets wrong."""
        other = self._at("downsample", entry.keep)
        if other is None:
            return None
        hard = _joined(self._heads(PLAIN, names)) & ~_joined(self._heads(other, names))
        right = _joined(self._heads(entry.id, names))[hard]
        return {"n": int(hard.sum()), "accuracy": float(right.mean()) if len(right) else None}

    def _groups(self, entry: Entry, names: Sequence[str]) -> dict[str, Any]:
        found: dict[str, list[np.ndarray]] = {}
        for name in names:
            groups = np.array([own.group for own in self.samples[name]])
            for group in dict.fromkeys(groups.tolist()):
                found.setdefault(group, []).append(self._right[entry.id, name][groups == group])
        return {
            group: {"n": int(sum(len(x) for x in parts)), "accuracy": _mean_of_means(parts)}
            for group, parts in found.items()
        }

    def _f1(self, entry: Entry, name: str) -> float | None:
        task = next(task for task in self.tasks if task.name == name)
        if task.metric != "yes/no":
            return None
        pairs = [
            (self.answers[entry.id, name, own.id].answer, own.answer)
            for own, head in zip(self.samples[name], self.head[name], strict=True)
            if head
        ]
        return yes_no_f1(pairs)

    # -- counts -------------------------------------------------------------------------------------------------

    def counts(self, entry: Entry) -> dict[str, Any]:
        """Visual tokens per image and costs, means over all images that were asked about."""
        found = [
            self.answers[entry.id, name, own.id] for name, samples in self.samples.items() for own in samples
        ]  # fmt: skip
        found = [own for own in found if own.error is None and own.tokens]
        images = [len(own.tokens) for own in found]
        if not found:
            return {"tokens_in": 0, "tokens_kept": 0, "average_tokens": 0, "layer_tokens": [], "mac_ratio": 1.0}
        whole = sum(images)
        layers = np.average([counts.spread(own.layers) for own in found], axis=0, weights=images)
        return {
            "tokens_in": sum(sum(own.tokens) for own in found) / whole,
            "tokens_kept": sum(sum(own.kept) for own in found) / whole,
            "average_tokens": sum(own.average * n for own, n in zip(found, images, strict=True)) / whole,
            "layer_tokens": [round(float(x), 4) for x in layers],
            "mac_ratio": sum(own.mac_ratio for own in found) / len(found),
        }

    def tokens_per_image(self) -> float:
        """Mean before anything is dropped."""
        return self.counts(self.by_id[PLAIN])["tokens_in"]

    def note(self, entry: Entry) -> str:
        """The entry's note, and whether its budget is beyond the pictures."""
        if entry.keep is None or entry.status == "refused":
            return entry.note
        sizes = [
            size
            for name, samples in self.samples.items()
            for own in samples
            for size in self.answers[PLAIN, name, own.id].tokens
        ]
        whole = sum(1 for size in sizes if isinstance(entry.budget, int) and size <= entry.budget)
        if not whole:
            return entry.note
        which = "every picture has" if whole == len(sizes) else f"{whole} of {len(sizes)} pictures have"
        told = f"{which} at most {entry.budget} tokens, which all stay"
        return "; ".join(filter(None, (entry.note, told)))

    # -- problems -----------------------------------------------------------------------------------------------

    def problems(self) -> list[dict[str, Any]]:
        """What went wrong, sample by sample; ``entry`` is ``None`` where it went wrong for all."""
        found = []
        running = [entry.id for entry in self.entries if entry.status != "refused"]
        for task in self.tasks:
            empty: dict[str, list[str]] = {}
            for sample in task.samples:
                own = {entry: self.answers[entry, task.name, sample.id] for entry in running}
                errors = {entry: answer.error for entry, answer in own.items() if answer.error is not None}
                if len(errors) == len(running) and len(set(errors.values())) == 1:
                    found.append(_problem(task.name, sample.id, None, str(errors[PLAIN])))
                    continue
                found += [_problem(task.name, sample.id, entry, str(error)) for entry, error in errors.items()]
                for entry, answer in own.items():
                    if answer.error is None and not answer.answer:
                        empty.setdefault(entry, []).append(sample.id)
            for entry, samples in empty.items():
                found += [
                    _problem(task.name, name, entry, "empty answer, counted as wrong") for name in samples[:LISTED]
                ]
                if len(samples) > LISTED:
                    message = f"{len(samples) - LISTED} more empty answers, counted as wrong"
                    found.append(_problem(task.name, None, entry, message))
        return found


def _problem(task: str, sample: str | None, entry: str | None, message: str) -> dict[str, Any]:
    return {"task": task, "sample": sample, "entry": entry, "message": message}


def _macro(draws: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(draws, axis=0) if draws else np.zeros(0)


def _mean_of_means(parts: Sequence[np.ndarray]) -> float:
    parts = [part for part in parts if len(part)]
    return float(np.mean([part.mean() for part in parts])) if parts else math.nan


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)
