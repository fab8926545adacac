"""Intervals and tests on right and wrong answers. Pure functions of arrays, seeded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 2000
LEVEL = 0.95


def resamples(clusters: Sequence[object], seed: int, draws: int = DRAWS) -> np.ndarray:
    """Weights of a bootstrap: how often each sample is drawn.

    Questions about the same picture are drawn together, as they are right or wrong together.

    Parameters
    ----------
    clusters : sequence of hashable, (n,)
        What each sample belongs to; all different: the ordinary bootstrap.
    seed : int
        The same seed gives every entry the same resamples, which pairs them.
    draws : int
        Number of resamples R.

    Returns
    -------
    ndarray, (R, n)
        Counts.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    if not names:
        return np.zeros((draws, 0), dtype=np.float32)
    owner = np.array([names[name] for name in clusters])
    drawn = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    return drawn[:, owner].astype(np.float32)


def means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) weighted means of ``values`` (n,) under ``weights`` (R, n)."""
    total = weights.sum(1)
    return (weights @ values.astype(np.float32)) / np.where(total == 0, 1, total)


def interval(draws: np.ndarray, level: float = LEVEL) -> list[float]:
    """Percentile interval of bootstrap draws (R,)."""
    if draws.size == 0:
        return [math.nan, math.nan]
    tail = (1 - level) / 2
    return [float(x) for x in np.quantile(draws.astype(np.float64), [tail, 1 - tail])]


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided McNemar test that two raters are right equally often on the same samples.

    Parameters
    ----------
    first, second : ndarray of bool, (n,)
        Right or wrong.

    Returns
    -------
    float
        Binomial probability, under 1/2, of a split of the samples on which they differ at least as uneven as this one.
    """
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    differ, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(differ, i) for i in range(fewer + 1)) / 2**differ)
