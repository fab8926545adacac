"""One meaning of ``keep``: visual tokens per image, averaged over the decoder layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vtok.errors import VtokError


def check_keep(keep: int | float | None) -> int | float:
    """Validate a budget: an int >= 1 (tokens per image) or a float in (0, 1] (share).

    Raises:
        VtokError: anything else.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)):
        raise VtokError(
            f"keep={keep!r} is not a budget; give an int (visual tokens per image, for example 64) "
            "or a float in (0, 1] (share of them, for example 0.25)"
        )
    if isinstance(keep, int) and keep < 1:
        raise VtokError(f"keep={keep} would leave no visual token; give at least 1, or a share in (0, 1]")
    if isinstance(keep, float) and not 0.0 < keep <= 1.0:
        raise VtokError(f"keep={keep} is not a share in (0, 1]; for a number of tokens give an int, such as keep=64")
    return keep


def target_tokens(keep: int | float, tokens: int) -> float:
    """The layer average that ``keep`` asks of an image of ``tokens`` tokens (never more than it has)."""
    return min(float(keep), float(tokens)) if isinstance(keep, int) else keep * tokens


@dataclass(frozen=True)
class Profile:
    """Where a method cuts inside the decoder, and how hard relative to what enters the decoder.

    ``layers[i]`` is the first layer that sees ``shares[i]`` of the entry tokens. ``floor`` is the smallest number of
    tokens a cut may leave.
    """

    layers: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()
    floor: int = 1

    def average(self, depth: int, shares: Sequence[float] | None = None) -> float:
        """Layer average relative to the entry count."""
        shares = self.shares if shares is None else shares
        total, seen, share = 0.0, 0, 1.0
        for layer, next_share in zip(self.layers, shares, strict=True):
            total, seen, share = total + (layer - seen) * share, layer, next_share
        return (total + (depth - seen) * share) / depth

    def soften(self, depth: int, goal: float, least: float = 0.0) -> tuple[float, ...] | None:
        """Shares raised to one common power so that the average becomes ``goal``; ``None`` if no power reaches it.

        A power keeps the method's own shape: 1 is the published schedule, above 1 cuts harder, below 1 softer. No share
        falls below ``least``, the share that the smallest allowed cut is.
        """
        if goal >= 1.0:
            return (1.0,) * len(self.shares)
        if not self.layers or goal < self.layers[0] / depth:
            return None
        # the power at which even the gentlest cut leaves next to nothing
        gentlest = max(self.shares)
        low, high = 0.0, 64.0 if not 0 < gentlest < 1 else max(64.0, math.log(1e-9) / math.log(gentlest))
        for _ in range(80):
            middle = (low + high) / 2
            if self.average(depth, [max(share**middle, least) for share in self.shares]) > goal:
                low = middle
            else:
                high = middle
        shares = tuple(max(share**high, least) for share in self.shares)
        return shares if self.average(depth, shares) <= goal * 1.001 + 1e-9 else None


@dataclass(frozen=True)
class Counts:
    """Tokens of one image: ``entry`` reach the decoder, ``cuts[i]`` are left by the decoder's i-th cut."""

    tokens: int
    entry: int
    cuts: tuple[int, ...]


def solve(tokens: int, keep: int | float, depth: int, profile: Profile, has_entry: bool, name: str = "") -> Counts:
    """Split the budget of one image between the entry stage and the decoder's cuts.

    With an entry stage (a method at the encoder or input site) the decoder keeps its published schedule and the
    entry count is solved; it is softened only when even all tokens at the entry would stay below the budget.
    Without one, the schedule itself is bent (``Profile.soften``).

    Raises:
        VtokError: the budget is smaller than a late-cutting method can reach; names the smallest it can.
    """
    goal = target_tokens(keep, tokens)
    if goal >= tokens:
        return Counts(tokens, tokens, (tokens,) * len(profile.layers))
    if not profile.layers:
        return Counts(tokens, max(1, min(tokens, round(goal))) if has_entry else tokens, ())
    entry = tokens
    shares: tuple[float, ...] | None
    if has_entry and goal / profile.average(depth) <= tokens:
        entry = max(1, min(tokens, round(goal / profile.average(depth))))
        shares = profile.shares
    else:
        shares = profile.soften(depth, goal / tokens, profile.floor / tokens)
    if shares is None and has_entry:  # a picture of a few tokens, whose cuts may leave no fewer
        entry, shares = max(1, int(goal)), (1.0,) * len(profile.layers)
    if shares is None:
        raise VtokError(unreachable(name, tokens, depth, profile))
    cuts = []
    for share in shares:
        cuts.append(max(min(profile.floor, entry), min(entry, round(entry * share))))
    counts = Counts(tokens, entry, tuple(cuts))
    # floors can lift a tiny budget above what was asked; half a token a layer is rounding, more is a refusal
    if not has_entry and average(counts, profile, depth) > goal + 0.5 + 1e-6:
        raise VtokError(unreachable(name, tokens, depth, profile))
    return counts


def average(counts: Counts, profile: Profile, depth: int) -> float:
    """Layer average of one image's counts."""
    total, seen, now = 0.0, 0, counts.entry
    for layer, cut in zip(profile.layers, counts.cuts, strict=True):
        total, seen, now = total + (layer - seen) * now, layer, cut
    return (total + (depth - seen) * now) / depth


def smallest(tokens: int, depth: int, profile: Profile) -> int:
    """Smallest int budget a method with this profile reaches on ``tokens`` tokens without an entry stage."""
    first = profile.layers[0]
    last = profile.layers[-1]
    middle = [(b - a) for a, b in zip(profile.layers, profile.layers[1:], strict=False)]
    least = (first * tokens + sum(middle) * profile.floor + (depth - last) * profile.floor) / depth
    return max(1, math.ceil(least - 1e-9))


def unreachable(name: str, tokens: int, depth: int, profile: Profile) -> str:
    """The refusal of a budget below what a late-cutting method can reach."""
    least = smallest(tokens, depth, profile)
    share = math.ceil(100 * least / tokens) / 100
    return (
        f"{name or 'this method'} first cuts before decoder layer {profile.layers[0]} of {depth}, so on {tokens} "
        f"visual tokens its layer average cannot go below {least}; ask for keep>={least} (or {share:.2f}), "
        f'or put a first stage before it, for example ["divprune", "{name or "fastv"}"]'
    )
