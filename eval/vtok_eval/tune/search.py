"""The search: bisection of every method's budget on growing sets of questions, the worse half dropped each time.

It knows no model. ``Evaluator`` answers its questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from vtok.errors import VtokError
from vtok_eval.tune.estimate import Scores
from vtok_eval.tune.target import Target

SLACK = 2.0
"""A variant that fails at this many times the budget that suffices another is not bisected further."""
LIKELY = 0.5
"""Probability of the target that passes on a subset; the last step asks for the caller's."""
MARGIN = 1.03
"""By which a measured speed-up must pass its goal while searching: the check times it anew."""


@dataclass(frozen=True)
class Trial:
    """A variant (a method or chain with its options) at a budget."""

    variant: str
    keep: int | float

    @property
    def id(self) -> str:
        """As the harness names it."""
        return f"{self.variant}@{self.keep:g}"


@dataclass(frozen=True)
class Cost:
    """What a trial takes: visual tokens per image averaged over layers, MAC ratio, speed-up of the prefill if timed."""

    tokens: float
    macs: float
    speedup: float | None = None

    @property
    def key(self) -> tuple[float, float]:
        """Smaller is cheaper; to three digits, below which nothing is measured."""
        return (round(self.macs if self.speedup is None else 1 / self.speedup, 3), round(self.tokens, 3))

    def values(self, margin: float = 1.0) -> dict[str, float | None]:
        """By the names of goals; the speed-up divided by a margin."""
        speedup = None if self.speedup is None else self.speedup / margin
        return {"tokens": self.tokens, "macs": self.macs, "speedup": speedup}


class Evaluator(Protocol):
    """Who asks and measures."""

    @property
    def rungs(self) -> int:
        """Number of growing subsets."""

    def grids(self) -> Mapping[str, Sequence[int | float]]:
        """Variant -> budgets that it reaches, ascending."""

    def scores(self, trials: Sequence[Trial], rung: int) -> Mapping[Trial, Scores]:
        """Answers to all questions of a subset."""

    def costs(self, trials: Sequence[Trial]) -> Mapping[Trial, Cost]:
        """Tokens, MACs and time."""


@dataclass
class Bracket:
    """A search for the smallest place that passes: ``low`` fails or is below all, ``high`` passes or is above all.

    Attributes
    ----------
    start : int, optional
        Look there first and widen by doubled steps; without one, halve.
    """

    low: int
    high: int
    start: int | None = None
    step: int = 1
    failed: bool = False
    passed: bool = False

    def next(self) -> int | None:
        """Where to look; ``None`` when it is found."""
        if self.high - self.low <= 1:
            return None
        if self.start is None or (self.failed and self.passed):
            return (self.low + self.high) // 2
        if self.passed:
            return max(self.high - self.step, self.low + 1)
        if self.failed:
            return min(self.low + self.step, self.high - 1)
        return min(max(self.start, self.low + 1), self.high - 1)

    def tell(self, place: int, ok: bool) -> None:
        """What was seen there."""
        if self.failed or self.passed:
            self.step *= 2
        if ok:
            self.high, self.passed = place, True
        else:
            self.low, self.failed = place, True


@dataclass
class Outcome:
    """What was found.

    Attributes
    ----------
    best : Trial
        The choice, or the nearest to one.
    reached : bool
        Whether it meets the target on the calibration questions, as surely as asked.
    why : str
        In words, where it does not.
    history : list of dict
        Every trial on every subset.
    """

    best: Trial
    reached: bool
    why: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Search:
    """One search.

    Attributes
    ----------
    evaluator : Evaluator
        Who asks.
    target : Target
        What is wanted.
    confidence : float
        Probability of the target, on all calibration questions, that the choice needs.
    """

    evaluator: Evaluator
    target: Target
    confidence: float = 0.9
    history: list[dict[str, Any]] = field(default_factory=list)
    grids: dict[str, Sequence[int | float]] = field(init=False)
    _costs: dict[Trial, Cost] = field(default_factory=dict)
    _scores: dict[tuple[Trial, int], Scores] = field(default_factory=dict)

    def run(self) -> Outcome:
        """The choice: the cheapest that keeps what must be kept, or the most accurate that costs no more."""
        self.grids = dict(self.evaluator.grids())
        tops = {name: len(grid) - 1 for name, grid in self.grids.items()}
        if self.target.costs:
            tops, cheapest = self._affordable(), self.trials(dict.fromkeys(tops, 0))
            tops = {name: top for name, top in tops.items() if top >= 0}
            if not tops:
                best = min(cheapest, key=lambda trial: self.cost(trial).key)
                return self._outcome(best, False, "no method is that cheap at the smallest budget tried")
        return self._cheapest(tops) if self.target.qualities else self._most_accurate(tops)

    # -- the two aims -------------------------------------------------------------------------------------------

    def _cheapest(self, tops: dict[str, int]) -> Outcome:
        alive, places = list(tops), dict.fromkeys(tops, 0)
        last = self.evaluator.rungs - 1
        for rung in range(last + 1):
            sure = self.confidence if rung == last else LIKELY
            brackets = {
                name: Bracket(-1, tops[name] + 1, start=min(places[name], tops[name]) if rung else None)
                for name in alive
            }
            self._bisect(brackets, partial(self._pass, rung, sure))
            places.update({name: bracket.high for name, bracket in brackets.items()})
            passing = {name: places[name] for name in alive if places[name] <= tops[name]}
            if passing:
                found = {trial.variant: self.cost(trial) for trial in self.priced(self.trials(passing))}
                order = sorted(passing, key=lambda name: (found[name].key, -self._accuracy(name, places[name], rung)))
            else:  # nothing does: the most accurate ones may on more questions
                highest = {name: tops[name] for name in alive}
                self.scored(self.trials(highest), rung)
                order = sorted(alive, key=lambda name: -self._accuracy(name, tops[name], rung))
            alive = order[: math.ceil(len(alive) / 2)] if rung < last else order
        if passing:
            return self._outcome(Trial(alive[0], self.grids[alive[0]][places[alive[0]]]), True)
        tried = [trial for trial, rung in self._scores if rung == last]
        goals = self.target.qualities
        best = max(tried, key=lambda t: (self._scores[t, last].probability(goals), self._scores[t, last].accuracy))
        probability = self._scores[best, last].probability(goals)
        return self._outcome(
            best,
            False,
            f"no configuration holds it with probability {self.confidence:g} on the calibration questions; the best "
            f"has {probability:.2f}",
        )

    def _most_accurate(self, tops: dict[str, int]) -> Outcome:
        alive = list(tops)
        for rung in range(self.evaluator.rungs):
            trials = self.priced(self.trials({name: tops[name] for name in alive}))
            found = self.scored(trials, rung)
            trials = sorted(trials, key=lambda trial: (-found[trial].accuracy, self.cost(trial).key))
            alive = [trial.variant for trial in trials[: math.ceil(len(trials) / 2)]]
        return self._outcome(trials[0], True)

    def _affordable(self) -> dict[str, int]:
        """The last place of every grid that costs no more than it may; -1 where none does."""
        # budgets beyond a limit on tokens are mostly left out before, so that the largest is likely the one
        near = any(goal.name == "tokens" for goal in self.target.costs)
        brackets = {name: Bracket(-1, len(grid), len(grid) - 1 if near else None) for name, grid in self.grids.items()}

        def too_dear(trials: Sequence[Trial]) -> dict[Trial, bool]:
            self.priced(trials)
            missed = {t: Target(self.target.costs).missed(self.cost(t).values(MARGIN)) for t in trials}
            return {trial: bool(goals) for trial, goals in missed.items()}

        self._bisect(brackets, too_dear, prune=False)
        return {name: bracket.high - 1 for name, bracket in brackets.items()}

    # -- steps --------------------------------------------------------------------------------------------------

    def _bisect(
        self, brackets: dict[str, Bracket], ok: Callable[[Sequence[Trial]], Mapping[Trial, bool]], prune: bool = True
    ) -> None:
        """All variants in step, so that what they share is done once."""
        while True:
            bound = self._bound(brackets) if prune else math.inf
            spots = {
                name: spot
                for name, bracket in brackets.items()
                if (spot := bracket.next()) is not None and (bracket.low < 0 or self.grids[name][bracket.low] < bound)
            }
            if not spots:
                return
            trials = self.trials(spots)
            found = ok(trials)
            for trial in trials:
                brackets[trial.variant].tell(spots[trial.variant], found[trial])

    def _bound(self, brackets: Mapping[str, Bracket]) -> float:
        suffices = [self.grids[name][bracket.high] for name, bracket in brackets.items() if bracket.passed]
        return SLACK * min(suffices, default=math.inf)

    def _pass(self, rung: int, sure: float, trials: Sequence[Trial]) -> dict[Trial, bool]:
        found = self.scored(trials, rung)
        return {trial: found[trial].probability(self.target.qualities) >= sure for trial in trials}

    def _accuracy(self, name: str, place: int, rung: int) -> float:
        return self._scores[Trial(name, self.grids[name][place]), rung].accuracy

    def trials(self, places: Mapping[str, int]) -> list[Trial]:
        """Trials at places of the grids."""
        return [Trial(name, self.grids[name][place]) for name, place in places.items()]

    def scored(self, trials: Sequence[Trial], rung: int) -> dict[Trial, Scores]:
        """Answers, asked where they are not known."""
        new = [trial for trial in trials if (trial, rung) not in self._scores]
        for trial, scores in (self.evaluator.scores(new, rung) if new else {}).items():
            if not scores.plain_accuracy and any(goal.name == "retention" for goal in self.target.goals):
                raise VtokError(
                    f"the plain model gets none of {scores.n} questions right, so there is nothing to retain; check "
                    "the model and the tasks, or aim at speedup, tokens or macs"
                )
            self._scores[trial, rung] = scores
            self.history.append(
                {
                    "id": trial.id,
                    "variant": trial.variant,
                    "keep": trial.keep,
                    "questions": scores.n,
                    **scores.values(),
                    "probability": scores.probability(self.target.qualities) if self.target.qualities else None,
                }
            )
        return {trial: self._scores[trial, rung] for trial in trials}

    def priced(self, trials: Sequence[Trial]) -> list[Trial]:
        """The same trials, their costs measured."""
        new = [trial for trial in trials if trial not in self._costs]
        if new:
            self._costs.update(self.evaluator.costs(new))
        return list(trials)

    def cost(self, trial: Trial) -> Cost:
        """Of a trial."""
        self.priced([trial])
        return self._costs[trial]

    def _outcome(self, best: Trial, reached: bool, why: str = "") -> Outcome:
        for line in self.history:
            known = self._costs.get(Trial(line["variant"], line["keep"]))
            line["cost"] = None if known is None else known.values()
        return Outcome(best, reached, why, self.history)
