"""The search's questions to a real model: every answer goes to ``samples.jsonl`` and is asked for once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtok.errors import VtokError
from vtok.method import Method
from vtok.progress import progress as progress_bar
from vtok_eval.harness import store
from vtok_eval.harness.answers import Answers
from vtok_eval.harness.asking import Asking, Judge
from vtok_eval.harness.cells import PLAIN, Entry, line_up
from vtok_eval.harness.ranks import Ranks
from vtok_eval.harness.score import Answer, collect
from vtok_eval.samples import Sample, Task
from vtok_eval.tune import split
from vtok_eval.tune.estimate import Scores, resampled
from vtok_eval.tune.search import Cost, Trial
from vtok_eval.tune.watch import Watch

PROBED = 8
"""Questions, about, on which tokens and MACs are counted while searching."""


@dataclass
class Questions:
    """An ``Evaluator`` that asks a model.

    Attributes
    ----------
    answers : Answers
        The model.
    settings : mapping
        What answers depend on, without entries; as ``harness.settings`` gives it.
    chains : mapping
        Variant -> chain.
    budgets : sequence of int or float
        Ascending.
    calibration : sequence of Task
        Questions to search with.
    sizes : sequence of int
        Visual tokens of the pictures.
    out : Path
        Folder of the run.
    watch : Watch, optional
        Times trials; without one nothing is timed.
    judge : callable
        (answer, sample) -> right or wrong.
    batch_size, seed : int
        Questions at a time; of the bootstrap.
    progress : bool
        Show bars.
    notes : dict
        Variant -> why it is left out, or where its budgets end.
    asked : int
        Answers that this process made.
    """

    answers: Answers
    settings: Mapping[str, Any]
    chains: Mapping[str, tuple[Method, ...]]
    budgets: Sequence[int | float]
    calibration: Sequence[Task]
    sizes: Sequence[int]
    out: Path
    watch: Watch | None
    judge: Judge
    batch_size: int = 1
    seed: int = 0
    progress: bool = True
    notes: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    _entries: dict[str, Entry] = field(default_factory=dict)
    _weights: dict[tuple[int, ...], dict[str, np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        total = sum(len(task.samples) for task in self.calibration)
        self.subsets = [split.first(self.calibration, size) for size in split.sizes(total)]
        self.probe = split.first(self.calibration, PROBED)

    # -- Evaluator ----------------------------------------------------------------------------------------------

    @property
    def rungs(self) -> int:
        """Number of growing subsets."""
        return len(self.subsets)

    def grids(self) -> dict[str, list[int | float]]:
        """Variant -> budgets that it reaches on pictures of these sizes."""
        found = {}
        for name in self.chains:
            low, high = -1, len(self.budgets)  # a method that cuts late does not reach the smallest
            while high - low > 1:
                middle = (low + high) // 2
                fits = self.entry(Trial(name, self.budgets[middle])).status == "ok"
                low, high = (low, middle) if fits else (middle, high)
            if high < len(self.budgets):
                found[name] = list(self.budgets[high:])
                if high:
                    self.notes[name] = f"cuts late: reaches no budget below {self.budgets[high]:g}"
            else:
                self.notes[name] = self.entry(Trial(name, self.budgets[-1])).note
        if not found:
            raise VtokError(
                "no method can be searched on this model: " + "; ".join(f"{k}: {v}" for k, v in self.notes.items())
            )
        return found

    def scores(self, trials: Sequence[Trial], rung: int) -> dict[Trial, Scores]:
        """Answers to all questions of a subset."""
        return self.scored(trials, self.subsets[rung], f"tune, step {rung + 1} of {self.rungs}")

    def costs(self, trials: Sequence[Trial]) -> dict[Trial, Cost]:
        """On a few questions, always the same, so that a run that goes on sees what it saw."""
        return {trial: cost for trial, (cost, _) in self.priced(trials, self.probe, "counting tokens").items()}

    # -- the same on any questions ------------------------------------------------------------------------------

    def scored(self, trials: Sequence[Trial], tasks: Sequence[Task], title: str) -> dict[Trial, Scores]:
        """Right and wrong against the plain model; questions that it could not be asked are left out."""
        found = self._found(trials, tasks, title)
        asked = {task.name: [s for s in task.samples if found[PLAIN, task.name, s.id].error is None] for task in tasks}
        if not any(asked.values()):
            problem = next((own.error for own in found.values() if own.error), "there are no questions")
            raise VtokError(f"the plain model could not be asked anything, so nothing can be compared: {problem}")
        shape = tuple(map(len, asked.values()))
        if shape not in self._weights:
            clusters = {name: [sample.images or sample.id for sample in own] for name, own in asked.items()}
            self._weights[shape] = resampled(clusters, self.seed)

        def marks(entry: str) -> dict[str, np.ndarray]:
            return {name: np.array([_right(found[entry, name, s.id]) for s in own]) for name, own in asked.items()}

        plain = marks(PLAIN)
        return {trial: Scores.of(marks(trial.id), plain, self._weights[shape]) for trial in trials}

    def priced(
        self, trials: Sequence[Trial], tasks: Sequence[Task], title: str
    ) -> dict[Trial, tuple[Cost, list[list[float]]]]:
        """Tokens, MACs, speed-up, and the timed ratios that the speed-up is the median of."""
        found = self._found(trials, tasks, title)
        ratios = self.watch.ratios([self.entry(trial) for trial in trials], tasks) if self.watch else {}
        prices = {}
        for trial in trials:
            own = [found[trial.id, task.name, sample.id] for task in tasks for sample in task.samples]
            own = [answer for answer in own if answer.error is None and answer.tokens]
            images = [len(answer.tokens) for answer in own]
            if not own:
                prices[trial] = (Cost(float("inf"), float("inf")), [])
                continue
            tokens = sum(a.average * n for a, n in zip(own, images, strict=True)) / sum(images)
            macs = sum(answer.mac_ratio for answer in own) / len(own)
            rounds = ratios.get(trial.id, [])
            flat = [ratio for question in rounds for ratio in question]
            prices[trial] = (Cost(tokens, macs, statistics.median(flat) if flat else None), rounds)
        return prices

    def entry(self, trial: Trial) -> Entry:
        """The harness's entry of a trial."""
        if trial.id not in self._entries:
            lined = line_up(self.answers.model, [list(self.chains[trial.variant])], [trial.keep], {}, self.sizes)
            self._entries[trial.id] = next(own for own in lined if own.id == trial.id)
        return self._entries[trial.id]

    def problems(self) -> list[dict[str, Any]]:
        """Questions that could not be answered."""
        lines = store.read(self.out / store.SAMPLES)
        return [{key: line[key] for key in ("entry", "task", "sample", "error")} for line in lines if line["error"]]

    def _found(self, trials: Sequence[Trial], tasks: Sequence[Task], title: str) -> dict[store.Key, Answer]:
        entries = [Entry(PLAIN), *(self.entry(trial) for trial in trials)]
        wanted = {(own.id, task.name, s.id) for own in entries for task in tasks for s in task.samples}
        missing = len(wanted) - len(collect(store.read(self.out / store.SAMPLES), wanted))
        if missing:
            self._record(entries)
            steps = len(wanted)
            with progress_bar(f"{title}: {len(trials)} configurations", steps, self.progress) as advance:
                asking = Asking(
                    self.answers, entries, tasks, self.batch_size, self.judge, self.out, Ranks(), advance
                )  # fmt: skip
                asking.run()
            self.asked += missing
        return collect(store.read(self.out / store.SAMPLES), wanted)

    def _record(self, entries: Sequence[Entry]) -> None:
        """What the answers depend on, before there are any."""
        own = {**self.settings, "entries": {entry.id: entry.fingerprint() for entry in entries}}
        store.write_json(self.out / store.SETTINGS, store.check(self.out, own))


def _right(answer: Answer) -> bool:
    return answer.correct and answer.error is None


def pictures(samples: Sequence[Sample]) -> int:
    """Different pictures that questions are about."""
    return len({name for sample in samples for name in sample.images})
