"""Intervals and tests against scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from vtok_eval.harness import stats


@pytest.mark.parametrize(
    ("both", "first", "second"), [(5, 3, 9), (0, 0, 0), (2, 7, 0), (10, 4, 4), (1, 1, 2), (3, 40, 75)]
)
def test_mcnemar_is_the_binomial_test(both: int, first: int, second: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    a = np.array([True] * both + [True] * first + [False] * second + [False] * 3)
    b = np.array([True] * both + [False] * first + [True] * second + [False] * 3)
    expected = scipy.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert stats.mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert stats.mcnemar(b, a) == stats.mcnemar(a, b)


def test_mcnemar_by_counting_every_split() -> None:
    a, b = np.array([1, 1, 1, 0, 1], dtype=bool), np.array([0, 0, 1, 1, 0], dtype=bool)
    splits = [sum(signs) for signs in itertools.product((0, 1), repeat=4)]  # four samples differ, one for b
    assert stats.mcnemar(a, b) == sum(min(x, 4 - x) <= 1 for x in splits) / 2**4


def test_resamples_draw_clusters_whole() -> None:
    clusters = ["a", "a", "b", "c", "b", "a"]
    weights = stats.resamples(clusters, seed=3, draws=500)
    assert weights.shape == (500, 6)
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 4]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    assert np.array_equal(weights, stats.resamples(clusters, seed=3, draws=500))
    assert not np.array_equal(weights, stats.resamples(clusters, seed=4, draws=500))


def test_interval_covers_as_brute_force_does() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.7
    found = stats.interval(stats.means(right, stats.resamples(range(80), seed=1, draws=20000)))
    brute = [right[rng.integers(0, 80, 80)].mean() for _ in range(20000)]
    assert found == pytest.approx(np.quantile(brute, [0.025, 0.975]).tolist(), abs=0.0126)
    error = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 80)
    assert found == pytest.approx([right.mean() - error, right.mean() + error], abs=0.03)


def test_paired_interval_is_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(0)
    plain = rng.random(200) < 0.7
    other = plain ^ (rng.random(200) < 0.05)
    weights = stats.resamples(range(200), seed=0)
    low, high = stats.interval(stats.means(other * 1.0 - plain, weights))
    apart = stats.means(other, weights) - stats.means(plain, stats.resamples(range(200), seed=1))
    wide = stats.interval(apart)
    assert high - low < 0.6 * (wide[1] - wide[0])
    assert low <= other.mean() - plain.mean() <= high


def test_clusters_widen_the_interval() -> None:
    right = np.repeat(np.random.default_rng(0).random(50) < 0.6, 4)
    widths = []
    for clusters in (range(200), np.repeat(np.arange(50), 4).tolist()):
        low, high = stats.interval(stats.means(right, stats.resamples(clusters, seed=0)))
        widths.append(high - low)
    assert widths[1] / widths[0] == pytest.approx(2, abs=0.3)  # four times as few independent samples


def test_nothing_asked() -> None:
    assert stats.means(np.zeros(0), stats.resamples([], 0)).tolist() == [0.0] * stats.DRAWS
    assert all(math.isnan(x) for x in stats.interval(np.zeros(0)))
