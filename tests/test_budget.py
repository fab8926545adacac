"""One meaning of `keep`: what `solve` answers, for all budgets, sizes and schedules."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import vtok
from vtok.budget import Counts, Profile, average, check_keep, smallest, solve, target_tokens

quick = settings(max_examples=200, deadline=None)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, Profile]:
    """A depth and cuts inside it: later cuts leave no more than earlier ones."""
    depth = draw(st.integers(2, 48))
    layers = draw(st.lists(st.integers(1, depth - 1), min_size=1, max_size=min(4, depth - 1), unique=True))
    shares = draw(st.lists(st.floats(0.01, 0.95), min_size=len(layers), max_size=len(layers)))
    return depth, Profile(tuple(sorted(layers)), tuple(sorted(shares, reverse=True)), draw(st.integers(0, 4)))


tokens = st.integers(1, 3000)
keeps = st.one_of(st.integers(1, 4000), st.floats(0.001, 1.0))


def rounding(profile: Profile, depth: int) -> float:
    """Half a token of every layer's count, and what a cut must leave anyhow."""
    return 0.5 + 0.5 * profile.average(depth) + profile.floor + 1e-6


@quick
@given(tokens, keeps)
def test_without_cuts_inside_the_decoder(tokens: int, keep: float) -> None:
    counts = solve(tokens, keep, 32, Profile(), has_entry=True)
    assert counts.cuts == ()
    assert 1 <= counts.entry <= tokens
    assert abs(counts.entry - max(1.0, target_tokens(keep, tokens))) <= 0.5


@quick
@given(tokens, keeps, schedules())
def test_with_an_entry_stage_every_budget_is_met(tokens: int, keep: float, schedule: tuple[int, Profile]) -> None:
    depth, profile = schedule
    counts = solve(tokens, keep, depth, profile, has_entry=True)
    check(counts, profile, tokens)
    asked = target_tokens(keep, tokens)
    assert average(counts, profile, depth) <= max(1.0, asked) + rounding(profile, depth)
    # an entry of one token is as small as it gets; above that, nothing is given away
    if counts.entry > 1 and counts.entry < tokens:
        assert average(counts, profile, depth) >= asked - rounding(profile, depth)


@quick
@given(tokens, keeps, schedules())
def test_without_an_entry_stage_it_is_met_or_refused(tokens: int, keep: float, schedule: tuple[int, Profile]) -> None:
    depth, profile = schedule
    goal = target_tokens(keep, tokens)
    try:
        counts = solve(tokens, keep, depth, profile, has_entry=False, name="mine")
    except vtok.VtokError as error:
        # refused only when it cannot be had, and what the message proposes can
        assert goal < smallest(tokens, depth, profile)
        least, share = re.search(r"keep>=(\d+) \(or ([\d.]+)\)", str(error)).groups()  # type: ignore[union-attr]
        assert int(least) == smallest(tokens, depth, profile)
        for proposed in (int(least), min(1.0, float(share))):
            solve(tokens, proposed, depth, profile, has_entry=False)
        return
    check(counts, profile, tokens)
    assert counts.entry == tokens
    assert average(counts, profile, depth) <= goal + 0.5 + 1e-6
    assert average(counts, profile, depth) >= goal * 0.998 - 0.5 - 1e-6


def check(counts: Counts, profile: Profile, tokens: int) -> None:
    assert counts.tokens == tokens
    assert 1 <= counts.entry <= tokens
    assert len(counts.cuts) == len(profile.layers)
    assert list(counts.cuts) == sorted(counts.cuts, reverse=True)
    assert all(min(profile.floor, counts.entry) <= cut <= counts.entry for cut in counts.cuts)


@quick
@given(tokens, schedules(), st.booleans())
def test_everything_is_everything(tokens: int, schedule: tuple[int, Profile], has_entry: bool) -> None:
    depth, profile = schedule
    for keep in (1.0, tokens, tokens + 1):
        counts = solve(tokens, keep, depth, profile, has_entry)
        assert counts == Counts(tokens, tokens, (tokens,) * len(profile.layers))


@quick
@given(tokens, st.integers(1, 3000), st.integers(1, 3000), schedules(), st.booleans())
def test_more_budget_never_keeps_less(tokens: int, a: int, b: int, schedule: tuple[int, Profile], entry: bool) -> None:
    depth, profile = schedule
    a, b = sorted((a, b))
    assume(entry or a >= smallest(tokens, depth, profile))
    low, high = (solve(tokens, keep, depth, profile, entry) for keep in (a, b))
    assert low.entry <= high.entry
    assert average(low, profile, depth) <= average(high, profile, depth) + rounding(profile, depth)


@quick
@given(schedules(), st.floats(0.01, 1.0))
def test_bent_schedules_keep_their_shape(schedule: tuple[int, Profile], goal: float) -> None:
    depth, profile = schedule
    shares = profile.soften(depth, goal)
    if shares is None:
        assert goal <= profile.layers[0] / depth * 1.01 + 0.01
        return
    assert list(shares) == sorted(shares, reverse=True)
    assert all(0 <= share <= 1 for share in shares)
    assert math.isclose(profile.average(depth, shares), goal, rel_tol=2e-3, abs_tol=1e-6)


def test_published_schedules_are_what_they_say() -> None:
    fastv = Profile((2,), (0.5,))
    assert solve(576, (2 + 30 * 0.5) / 32, 32, fastv, has_entry=False).cuts == (288,)
    transprune = Profile((7, 9, 12), (0.875, 0.625, 0.125))
    assert solve(576, transprune.average(32), 32, transprune, has_entry=False).cuts == (504, 360, 72)
    deep = Profile((20,), (38 / 284,))
    assert solve(576, 192, 32, deep, has_entry=True) == Counts(576, 284, (38,))  # the released 192 setting


@pytest.mark.parametrize("keep", [1, 64, 0.001, 0.5, 1.0])
def test_good_budgets(keep: float) -> None:
    assert check_keep(keep) == keep


@pytest.mark.parametrize("keep", [0, -3, 1.7, 0.0, -0.5, math.nan, math.inf, True, False, "64", None, [64], 64 + 0j])
def test_bad_budgets(keep: object) -> None:
    with pytest.raises(vtok.VtokError, match=r"keep=.*(give|int)"):
        check_keep(keep)  # type: ignore[arg-type]


def test_the_smallest_share_is_rounded_up() -> None:
    """0.664 is refused where 0.6667 is the least."""
    with pytest.raises(vtok.VtokError, match=r"keep>=43 \(or 0\.68\)") as caught:
        solve(64, 0.3, 6, Profile((4,), (0.1,)), has_entry=False, name="random_deep")
    assert re.search(
        r"random_deep.*layer 4 of 6.*64 visual tokens.*below 43.*\"divprune\", \"random_deep\"", str(caught.value)
    )
