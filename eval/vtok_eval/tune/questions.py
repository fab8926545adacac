"""The search's questions to a real model: every answer goes to ``samples.jsonl`` and is asked for once."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
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
from vtok_eval.samples import Task
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
    _known: dict[store.Key, Answer] = field(default_factory=dict)
    _weights: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

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
        last = len(self.budgets)
        starts = {name: self._lowest(-1, partial(self._fits, name)) for name in self.chains}
        # some methods refuse a budget only when they run: one question at the smallest tells
        running = self._run([self._trial(name, at) for name, at in starts.items() if at < last])
        for name, at in starts.items():
            if at < last and self._trial(name, at) not in running:
                starts[name] = self._lowest(at, partial(self._runs, name))
        found = {name: list(self.budgets[at:]) for name, at in starts.items() if at < last}
        for name, at in starts.items():
            if at == last:
                self.notes[name] = self.entry(self._trial(name, last - 1)).note or "runs at no budget"
            elif at:
                self.notes[name] = f"reaches no budget below {self.budgets[at]:g}"
        if not found:
            raise VtokError(
                "no method can be searched on this model: " + "; ".join(f"{k}: {v}" for k, v in self.notes.items())
            )
        return found

    def _trial(self, name: str, place: int) -> Trial:
        return Trial(name, self.budgets[place])

    def _fits(self, name: str, place: int) -> bool:
        return self.entry(self._trial(name, place)).status == "ok"

    def _runs(self, name: str, place: int) -> bool:
        return bool(self._run([self._trial(name, place)]))

    def _lowest(self, low: int, fits: Callable[[int], bool]) -> int:
        """The first place behind ``low`` from which on all fit."""
        high = len(self.budgets)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _run(self, trials: Sequence[Trial]) -> set[Trial]:
        """Those that can answer a question (all, where the plain model cannot)."""
        task = next(task for task in self.probe if task.samples)
        sample = task.samples[0]
        found = self._found(trials, [replace(task, samples=(sample,))], "trying")
        if found[PLAIN, task.name, sample.id].error is not None:
            return set(trials)
        return {trial for trial in trials if found[trial.id, task.name, sample.id].error is None}

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
        key = store.fingerprint({name: [sample.id for sample in own] for name, own in asked.items()})
        if key not in self._weights:
            clusters = {name: [sample.images or sample.id for sample in own] for name, own in asked.items()}
            self._weights[key] = resampled(clusters, self.seed)

        def marks(entry: str) -> dict[str, np.ndarray]:
            return {name: np.array([_right(found[entry, name, s.id]) for s in own]) for name, own in asked.items()}

        plain = marks(PLAIN)
        return {trial: Scores.of(marks(trial.id), plain, self._weights[key]) for trial in trials}

    def priced(
        self, trials: Sequence[Trial], tasks: Sequence[Task], title: str
    ) -> dict[Trial, tuple[Cost, list[list[float]]]]:
        """Tokens, MACs, speed-up, and the timed ratios that the speed-up is the median of."""
        found = self._found(trials, tasks, title)
        ratios = self.watch.ratios([self.entry(trial) for trial in trials], tasks) if self.watch else {}
        prices: dict[Trial, tuple[Cost, list[list[float]]]] = {}
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
        missing = wanted - self._known.keys()
        if missing:  # an earlier run may have asked
            self._known.update(collect(store.read(self.out / store.SAMPLES), missing))
            missing -= self._known.keys()
        if missing:
            self._record(entries)
            with progress_bar(f"{title}: {len(trials)} configurations", len(wanted), self.progress) as advance:
                asking = Asking(
                    self.answers, entries, tasks, self.batch_size, self.judge, self.out, Ranks(), advance
                )  # fmt: skip
                asking.run()
            self.asked += len(missing)
            self._known.update(collect(store.read(self.out / store.SAMPLES), missing))
        return self._known

    def _record(self, entries: Sequence[Entry]) -> None:
        """What the answers depend on, before there are any."""
        own = {**self.settings, "entries": {entry.id: entry.fingerprint() for entry in entries}}
        store.write_json(self.out / store.SETTINGS, store.check(self.out, own))


def _right(answer: Answer) -> bool:
    return answer.correct and answer.error is None
