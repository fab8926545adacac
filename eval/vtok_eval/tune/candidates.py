"""What is searched: methods, their layers and published settings, chains, and budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vtok.bench.contest import title
from vtok.budget import check_keep
from vtok.engine.plan import stages_of
from vtok.errors import VtokError
from vtok.method import Method, get, resolve
from vtok.view import Shape
from vtok_eval.harness.cells import drawing

CHAINS = ("divprune+random_deep", "flowcut+random_deep", "visionzip+random_deep", "divprune+fastv")
"""Searched beside the single methods: a first stage that reaches any budget, and a second that cuts late."""
STEPS = 4
"""Budgets to every halving of the tokens: steps of 16%, finer than a thousand questions can tell apart."""
OCTAVES = 6
"""Halvings down to the smallest budget, a 64th of the tokens."""


def chains(names: Sequence[str], options: Mapping[str, Mapping[str, Any]], seed: int = 0) -> list[tuple[Method, ...]]:
    """The methods asked for.

    Parameters
    ----------
    names : sequence of str
        ``"fastv"``; ``"divprune+random_deep"`` composes.
    options : mapping
        Method name -> options that the user fixed.
    seed : int
        Of methods that draw.

    Raises
    ------
    VtokError
        An unknown method or option, or options for a method that is not asked for.
    """
    if not names:
        raise VtokError("no method to search; name some, such as divprune,fastv, or take all")
    present = {part for name in names for part in name.split("+")}
    for name in options:
        if name not in present:
            raise VtokError(f"there are options for {name!r}, which is not among the methods; add it to them")
    found = []
    for name in names:
        parts = [get(part, **{**drawing(part, seed), **options.get(part, {})}) for part in name.split("+")]
        found.append(resolve(parts, {}))
    return found


def variants(
    asked: Iterable[tuple[Method, ...]], shape: Shape, options: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[Method, ...]]:
    """Title -> chain: every chain as it is, then with one of its methods changed in one way.

    Options that the user fixed stay.
    """
    found: dict[str, tuple[Method, ...]] = {}
    for chain in asked:
        changed = [chain]
        for place, method in enumerate(chain):
            for change in _changes(method, shape):
                if not set(change) & set(options.get(method.name, {})):
                    changed.append((*chain[:place], dataclasses.replace(method, **change), *chain[place + 1 :]))
        for own in changed:
            if own not in found.values():
                found[title(list(own))] = own
    return found


def _changes(method: Method, shape: Shape) -> list[dict[str, Any]]:
    """Settings worth a look: layers by depth, and those of published presets."""
    found = [dict(change) for change in method.variants(shape)]
    for preset in method.presets.values():
        found = [*found, {key: value for key, value in preset.items() if key != "keep"}]
    names = {item.name for item in dataclasses.fields(method)}
    unique: list[dict[str, Any]] = []
    for change in found:
        if not change or not set(change) <= names or change in unique:
            continue
        changed = dataclasses.replace(method, **change)
        if changed != method and _acts(changed, shape):
            unique.append(change)
    return unique


def _acts(method: Method, shape: Shape) -> bool:
    """Whether this model has the layers that a method acts at: published settings are of models with 32."""
    try:
        stages_of(method, shape)
    except VtokError:
        return False
    return True


def grid(sizes: Sequence[int], wanted: Iterable[int | float] = ()) -> list[int | float]:
    """Budgets, ascending: tokens where all pictures have the same number of them, shares where not.

    Parameters
    ----------
    sizes : sequence of int
        Visual tokens of the pictures.
    wanted : iterable of int or float
        Budgets that must be among them.
    """
    if not sizes:
        raise VtokError("no picture of these tasks opens, so there is nothing to tune; see the folder given as --data")
    shares = [2 ** (-step / STEPS) for step in range(1, STEPS * OCTAVES + 1)]
    most = max(sizes)
    if len(sizes) == 1:
        found = {max(1, round(most * share)) for share in shares} | {own for own in wanted if own < most}
    else:
        found = {round(share, 3) for share in shares if share * most >= 1}
        found |= {own if isinstance(own, float) else round(own / most, 3) for own in wanted if own < most}
    return sorted(check_keep(own) for own in found) or [1]


def within(budgets: Sequence[int | float], limits: Sequence[int]) -> list[int | float]:
    """Budgets in tokens that a limit on tokens allows, the smallest at least; shares are not known to."""
    allowed = [own for own in budgets if isinstance(own, float) or own <= min(limits, default=own)]
    return allowed or list(budgets[:1])
