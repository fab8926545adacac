"""Which method runs at which budget: the entries of a table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from vtok.api import adapter_of, compressed
from vtok.bench.contest import reachable, title
from vtok.budget import check_keep
from vtok.engine.plan import shape_of, stages_of
from vtok.errors import VtokError
from vtok.method import Method, registry, resolve

PLAIN, BLANK = "plain", "blank"
FIRST_STAGE = "divprune"
"""What is put in front of a method that cannot reach a budget alone."""

Asked = str | Method | Sequence[str | Method]


@dataclass(frozen=True)
class Entry:
    """A method at a budget, or the plain model.

    Attributes
    ----------
    id : str
        ``"plain"``, or ``"flowcut@64"``.
    method : str, optional
        ``"flowcut"``, ``"divprune+random_deep"``; ``None`` for the plain model.
    chain : tuple of Method
        What acts, in order of sites.
    keep, budget : int or float, optional
        The budget asked for, and the one it runs with.
    status : str
        ``"ok"``, ``"raised"`` (runs at the smallest budget that it reaches) or ``"refused"`` (does not run).
    note : str
        A sentence on the status.
    stands_in_for : str, optional
        The raised entry that this chain stands beside.
    shares_features : bool
        Neither acts in the vision tower nor reads anything there, so image features are the plain model's.
    blank : bool
        Asked with grey pictures: what the questions alone give away.
    """

    id: str
    method: str | None = None
    chain: tuple[Method, ...] = ()
    keep: int | float | None = None
    budget: int | float | None = None
    status: str = "ok"
    note: str = ""
    stands_in_for: str | None = None
    shares_features: bool = True
    blank: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults, by name; by ``method.name`` in a chain."""
        lead = len(self.chain) > 1
        return {
            f"{own.name}.{key}" if lead else key: value
            for own in self.chain
            for key, value in own.options().items()
            if key != "samples"
        }

    def on(self, model: nn.Module) -> AbstractContextManager:
        """The model compressed in this way, for a block."""
        return compressed(model, list(self.chain), keep=self.budget) if self.chain else nullcontext()

    def fingerprint(self) -> dict[str, Any]:
        """What its answers depend on."""
        names = [own.name or type(own).__name__ for own in self.chain]
        found = {"methods": names, "options": self.options, "budget": self.budget}
        digests = [own.digest() for own in self.chain]
        return found | {"weights": digests} if any(digests) else found


def originals(entries: Sequence[Entry]) -> dict[str, str]:
    """Entry -> the first that does the same: budgets out of reach are all raised to one, which need not run twice."""
    found = {}
    for entry in entries:
        same = (
            own.id for own in entries if (own.chain, own.budget, own.blank) == (entry.chain, entry.budget, entry.blank)
        )
        found[entry.id] = next(same)
    return found


def line_up(
    model: Any,
    methods: Sequence[Asked],
    keeps: Sequence[int | float],
    options: Mapping[str, Any],
    sizes: Sequence[int],
    blank: bool = False,
) -> list[Entry]:
    """The plain model, then every method at every budget.

    Parameters
    ----------
    model : nn.Module
        Not compressed.
    methods : sequence
        Names (``"divprune+random_deep"`` composes; ``"late=fastv"`` is another row of the same method, called late),
        methods, or lists of them.
    keeps : sequence of int or float
        Budgets.
    options : mapping
        Name -> options, for methods given by name: the method's, or the row's (``"late"``, in a chain
        ``"late.fastv"``).
    sizes : sequence of int
        Visual tokens of the images that will come.
    blank : bool
        Add the plain model with grey pictures.

    Returns
    -------
    list of Entry
        In the order asked for; behind one that cannot reach its budget stands the chain that does.

    Raises
    ------
    VtokError
        An unknown method or option, or a budget that is none.
    """
    chains = resolved(methods, options)
    found = {PLAIN: Entry(PLAIN)}
    if blank:
        found[BLANK] = Entry(BLANK, blank=True, note="the plain model with grey pictures: what the questions give away")
    for name, chain in chains.items():
        for keep in keeps:
            entry = _entry(model, name, chain, check_keep(keep), sizes)
            found.setdefault(entry.id, entry)
            if entry.status == "raised":
                for twin in _stand_in(model, entry, options, sizes):
                    found[twin.id] = twin
    return list(found.values())


def resolved(methods: Sequence[Asked], options: Mapping[str, Any]) -> dict[str, tuple[Method, ...]]:
    """Name -> chain, without a model: wrong names and options are found before weights are loaded.

    Raises
    ------
    VtokError
        An unknown method or option, options for a method that is not asked for, or no method.
    """
    if not methods:
        raise VtokError("no method to evaluate; name some, such as divprune,fastv")
    chains: dict[str, tuple[Method, ...]] = {}
    used: set[str] = set()
    for asked in methods:
        row, asked = _row(asked)
        parts = asked.split("+") if isinstance(asked, str) else [asked] if isinstance(asked, Method) else list(asked)
        chain: list[Method] = []
        for part in parts:
            owners = _owners(part, row, len(parts) == 1)
            used.update(owners)
            given = {key: value for owner in owners for key, value in options.get(owner, {}).items()}
            chain += resolve(part, given)
        name = row or title(asked)
        if name in chains:
            raise VtokError(f"two rows are called {name}; give one another name, such as other={name}")
        chains[name] = resolve(chain, {})
    for name in options:
        if name not in used:
            raise VtokError(f"there are options for {name!r}, which is not among the methods; add it to them")
    return chains


def drawing(name: str, seed: int) -> dict[str, int]:
    """The option ``seed`` of a method that draws; nothing for one that does not, and for seed 0."""
    return {"seed": seed} if seed and "seed" in getattr(registry().get(name), "__dataclass_fields__", {}) else {}


def _row(asked: Asked) -> tuple[str, Asked]:
    """The name of ``"name=method"`` and what runs in it; no name otherwise."""
    if not isinstance(asked, str) or "=" not in asked:
        return "", asked
    row, _, method = asked.partition("=")
    if not (re.fullmatch(r"[\w.-]+", row) and method):
        raise VtokError(f"{asked} is no row; write its name and what runs in it, such as late=fastv")
    return row, method


def _owners(part: Any, row: str, alone: bool) -> list[str]:
    """Under which names the options of a method of a row stand, the row's last: they overrule the method's."""
    if not isinstance(part, str):
        return []
    return [part, *([row] if row and alone else []), *([f"{row}.{part}"] if row else [])]


def _entry(model: Any, name: str, chain: tuple[Method, ...], keep: int | float, sizes: Sequence[int]) -> Entry:
    entry = Entry(f"{name}@{keep:g}", name, chain, keep, keep)
    adapter = adapter_of(model)
    shape = shape_of(adapter)
    try:
        for reason in filter(None, (own.refuse(shape) for own in chain)):
            raise VtokError(f"{name} cannot serve {adapter.family}: {reason}")
        chain = tuple(own.prepare(model) for own in chain)
        budget = reachable(model, adapter, chain, keep, sizes)
        stages = [stage for own in chain for stage in stages_of(own, shape)]
        tower = any(stage.site == "encoder" or "saliency" in stage.reads for stage in stages)
        entry = dataclasses.replace(entry, chain=chain, budget=budget, shares_features=not tower)
        with entry.on(model):
            pass
    except VtokError as error:
        return dataclasses.replace(entry, status="refused", note=str(error), shares_features=False)
    if budget != keep:
        note = f"{name} cuts late and reaches no average below {budget:g} on this model; it runs at that"
        entry = dataclasses.replace(entry, status="raised", note=note)
    return entry


def _stand_in(model: Any, entry: Entry, options: Mapping[str, Any], sizes: Sequence[int]) -> Iterator[Entry]:
    """The chain that reaches the budget which ``entry`` does not."""
    first = resolve(FIRST_STAGE, options.get(FIRST_STAGE, {}))
    assert entry.keep is not None
    twin = _entry(model, f"{FIRST_STAGE}+{entry.method}", (*first, *entry.chain), entry.keep, sizes)
    if twin.status == "ok":
        yield dataclasses.replace(
            twin, stands_in_for=entry.id, note=f"stands beside {entry.id}, which cannot reach this budget alone"
        )
