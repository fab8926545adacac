"""What the answers of a configuration say about a target: estimates, intervals, probabilities. Pure functions."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vtok_eval.harness import stats
from vtok_eval.tune.target import TOLERANCE, Goal

Marks = Mapping[str, np.ndarray]
"""Task -> bool (n,): right or wrong."""


@dataclass(frozen=True)
class Scores:
    """A configuration and the plain model on the same questions.

    Accuracy is the mean over tasks of the share of right answers; retention is that over the plain model's. Resamples
    draw questions within every task, those about one picture together, and the same ones for both.

    Attributes
    ----------
    own, plain : tuple of ndarray of bool, (n,) each
        Right or wrong, by task.
    weights : tuple of ndarray, (R, n) each
        As ``stats.resamples`` gives them.
    """

    own: tuple[np.ndarray, ...]
    plain: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, own: Marks, plain: Marks, weights: Mapping[str, np.ndarray]) -> Scores:
        """From marks and resamples by task; tasks without questions are left out."""
        names = [name for name in plain if len(plain[name])]
        own_, plain_ = tuple(own[name] for name in names), tuple(plain[name] for name in names)
        return cls(own_, plain_, tuple(weights[name] for name in names))

    @property
    def n(self) -> int:
        """Questions."""
        return sum(len(own) for own in self.own)

    @property
    def accuracy(self) -> float:
        """Mean over tasks."""
        return _macro(self.own)

    @property
    def plain_accuracy(self) -> float:
        """The plain model's."""
        return _macro(self.plain)

    @property
    def retention(self) -> float:
        """Share of the plain model's accuracy that is left; NaN where that is 0."""
        return self.accuracy / self.plain_accuracy if self.plain_accuracy else math.nan

    @property
    def differing(self) -> int:
        """Questions that one of the two gets right and the other wrong."""
        return int(sum((a != b).sum() for a, b in zip(self.own, self.plain, strict=True)))

    @cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """(R,) accuracy, retention and difference of every resample."""
        own, plain = self._drawn(self.own), self._drawn(self.plain)
        with np.errstate(divide="ignore", invalid="ignore"):
            retention = np.where(plain > 0, own / plain, np.nan)
        return {"accuracy": own, "retention": retention, "difference": own - plain}

    def _drawn(self, marks: Sequence[np.ndarray]) -> np.ndarray:
        drawn = [stats.means(x, w).astype(np.float64) for x, w in zip(marks, self.weights, strict=True)]
        return np.mean(drawn, axis=0) if drawn else np.zeros(0)

    def values(self) -> dict[str, float]:
        """Estimates by name."""
        return {"accuracy": self.accuracy, "retention": self.retention}

    def holding(self, goals: Sequence[Goal]) -> np.ndarray:
        """(R,) whether all conditions on answers hold in a resample."""
        found = np.ones(len(self.draws["accuracy"]), dtype=bool)
        for goal in goals:
            found &= self.draws[goal.name] >= goal.value - TOLERANCE  # NaN is not
        return found

    def probability(self, goals: Sequence[Goal]) -> float:
        """Share of the resamples in which all conditions hold."""
        return float(self.holding(goals).mean()) if len(self.own) else 0.0

    def meets(self, goals: Sequence[Goal]) -> bool:
        """Whether the estimates meet all conditions."""
        return all(goal.holds(self.values()[goal.name]) for goal in goals)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        intervals = {name: stats.interval(draws[np.isfinite(draws)]) for name, draws in self.draws.items()}
        return {
            "questions": self.n,
            "accuracy": {"value": self.accuracy, "ci": intervals["accuracy"]},
            "plain_accuracy": self.plain_accuracy,
            "retention": {"value": self.retention, "ci": intervals["retention"]},
            "difference": {"value": self.accuracy - self.plain_accuracy, "ci": intervals["difference"]},
            "differing": self.differing,
        }


def resampled(clusters: Mapping[str, Sequence[object]], seed: int) -> dict[str, np.ndarray]:
    """Task -> (R, n) resamples, from what each question belongs to."""
    return {name: stats.resamples(own, seed + zlib.crc32(name.encode())) for name, own in clusters.items()}


def _macro(parts: Sequence[np.ndarray]) -> float:
    return float(np.mean([part.mean() for part in parts])) if parts else math.nan


def medians(ratios: Sequence[Sequence[float]], seed: int, draws: int = stats.DRAWS) -> np.ndarray:
    """(R,) medians of ratios under resampling of what was timed.

    Parameters
    ----------
    ratios : sequence of sequences of float
        Of every question the ratios of its rounds; questions are drawn, with all their rounds.
    seed : int
        Of the draws.
    draws : int
        Number of resamples R.
    """
    rng = np.random.default_rng(seed)
    own = [np.asarray(rounds, dtype=np.float64) for rounds in ratios if len(rounds)]
    if not own:
        return np.full(draws, np.nan)
    picked = rng.integers(0, len(own), (draws, len(own)))
    return np.array([np.median(np.concatenate([own[i] for i in row])) for row in picked])


def at_most(n: int) -> float:
    """Share of questions that may still differ when none of ``n`` did, at 95% (the rule of three, exactly)."""
    return 1 - 0.05 ** (1 / n) if n else 1.0
