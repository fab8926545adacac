"""``results.json`` as the reports see it: entries in order, and numbers that may be missing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok_eval.render.words import budget

BASELINES = ("random", "uniform", "downsample")
"""Methods that anything clever has to beat; drawn in grey."""
ENOUGH = 0.95
"""The share of the plain accuracy at which a task counts as kept."""


@dataclass(frozen=True)
class Entry:
    """One method at one budget, or a reference (the plain model; empty pictures)."""

    raw: Mapping[str, Any]

    @property
    def id(self) -> str:
        return str(self.raw["id"])

    @property
    def name(self) -> str:
        """The method with what tells it from its likes: the id without the budget."""
        return self.id.rsplit("@", 1)[0]

    @property
    def method(self) -> str | None:
        return self.raw.get("method")

    @property
    def keep(self) -> float | None:
        return self.raw.get("keep")

    @property
    def status(self) -> str:
        return str(self.raw.get("status") or "ok")

    @property
    def note(self) -> str:
        return str(self.raw.get("note") or "")

    @property
    def stands_in_for(self) -> str | None:
        return self.raw.get("stands_in_for")

    @property
    def reached(self) -> bool:
        """Ran at the budget it was asked for."""
        return self.status == "ok"

    def number(self, *path: str) -> float | None:
        """A number inside the entry; ``None`` where it or anything above it is missing."""
        return number(self.raw, *path)

    def score(self, task: str | None = None) -> Mapping[str, Any] | None:
        """The score over all tasks, or of one."""
        return self.raw.get("overall") if task is None else (self.raw.get("tasks") or {}).get(task)

    def accuracy(self, task: str | None = None) -> float | None:
        """Share of right answers."""
        return number(self.score(task), "accuracy")

    def retention(self, task: str | None = None) -> float | None:
        """Share of the plain model's accuracy."""
        return number(self.score(task), "retention")

    @property
    def tokens(self) -> float | None:
        """Visual tokens per image, averaged over the decoder layers."""
        return self.number("counts", "average_tokens")

    @property
    def speedup(self) -> float | None:
        """Of the prefill, against the plain model."""
        found = self.number("timing", "speedup", "median")
        plain = self.method is None and self.number("timing", "prefill", "median") is not None
        return 1.0 if found is None and plain else found


def number(tree: Any, *path: str) -> float | None:
    """``tree[a][b]...`` as a finite number, or ``None``."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if isinstance(tree, bool) or not isinstance(tree, int | float) or not math.isfinite(tree):
        return None
    return float(tree)


def interval(tree: Any, *path: str) -> tuple[float, float] | None:
    """``tree[a][b]...`` as a pair of finite numbers, or ``None``."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    if not isinstance(tree, Sequence) or len(tree) != 2 or not all(isinstance(x, int | float) for x in tree):
        return None
    low, high = float(tree[0]), float(tree[1])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


@dataclass(frozen=True)
class Run:
    """All of ``results.json``.

    Attributes
    ----------
    results : mapping
        As it was read.
    """

    results: Mapping[str, Any]

    @cached_property
    def entries(self) -> list[Entry]:
        """In the file's order, each chain before what it stands in for."""
        found = [Entry(raw) for raw in self.results.get("entries", ())]
        chains: dict[str, list[Entry]] = {}
        for entry in found:
            if entry.stands_in_for:
                chains.setdefault(entry.stands_in_for, []).append(entry)
        ids = {entry.id for entry in found}
        order: list[Entry] = []
        for entry in found:
            if entry.stands_in_for in ids:
                continue
            order += [*chains.get(entry.id, ()), entry]
        return order

    @cached_property
    def plain(self) -> Entry | None:
        """The uncompressed model."""
        return next((e for e in self.entries if e.method is None and e.id != "blank"), None)

    @cached_property
    def blank(self) -> Entry | None:
        """The uncompressed model on empty pictures, where the run has it."""
        return next((e for e in self.entries if e.id == "blank"), None)

    @cached_property
    def compressed(self) -> list[Entry]:
        """Everything but the references."""
        return [e for e in self.entries if e is not self.plain and e is not self.blank]

    @cached_property
    def keeps(self) -> list[float]:
        """Budgets, the largest first."""
        return sorted({e.keep for e in self.compressed if e.keep is not None}, key=self.in_tokens, reverse=True)

    @cached_property
    def names(self) -> list[str]:
        """Methods and chains, in the order in which they come first."""
        return list(dict.fromkeys(e.name for e in self.compressed))

    @cached_property
    def tasks(self) -> list[Mapping[str, Any]]:
        return list(self.results.get("tasks", ()))

    @cached_property
    def task_names(self) -> list[str]:
        return [str(task["name"]) for task in self.tasks]

    @cached_property
    def groups(self) -> list[str]:
        """Sample groups, ``seen`` first; empty where there is only one."""
        found = list(dict.fromkeys(group for task in self.tasks for group in task.get("groups") or ()))
        return sorted(found, key=lambda group: (group != "seen", group)) if len(found) > 1 else []

    @property
    def model(self) -> Mapping[str, Any]:
        return self.results.get("model") or {}

    @property
    def full(self) -> float | None:
        """Visual tokens per image of the plain model."""
        return number(self.model, "tokens_per_image")

    @property
    def samples(self) -> int:
        return sum(int(task.get("samples") or 0) for task in self.tasks)

    def in_tokens(self, keep: float) -> float:
        """A budget in tokens, for sorting and axes."""
        return keep * (self.full or 1.0) if keep < 1 else keep

    def at(self, keep: float) -> list[Entry]:
        """The entries of one budget: best first; behind a chain what it stands in for; refusals last."""
        here = [e for e in self.compressed if e.keep == keep]
        chains = {e.stands_in_for: e for e in here if e.stands_in_for}

        def place(entry: Entry) -> tuple[bool, float, bool]:
            leader = chains.get(entry.id, entry)
            return (leader.accuracy() is None, -(leader.accuracy() or 0.0), entry is not leader)

        return sorted(here, key=place)

    def reached(self, keep: float) -> list[Entry]:
        """Those of ``at`` that ran at the budget."""
        return [e for e in self.at(keep) if e.reached and e.accuracy() is not None]

    def named(self, name: str, keep: float | None) -> Entry | None:
        """A method at a budget."""
        return next((e for e in self.compressed if e.name == name and e.keep == keep), None)

    def drawn(self) -> list[Entry]:
        """Entries with a place in a plot; what was raised to one and the same budget again and again comes once."""
        seen: set[tuple[str, float]] = set()
        found = []
        for entry in self.compressed:
            tokens = entry.tokens
            if entry.accuracy() is None or tokens is None or (entry.name, round(tokens, 2)) in seen:
                continue
            seen.add((entry.name, round(tokens, 2)))
            found.append(entry)
        return found

    def remarks(self) -> list[str]:
        """What is to be said about entries that ran as they were asked to, each sentence once."""
        found: dict[str, list[Entry]] = {}
        for keep in self.keeps:
            for entry in self.reached(keep):
                if entry.note:
                    found.setdefault(entry.note, []).append(entry)
        said = []
        for note, own in found.items():
            whole = {entry.keep for entry in own if all(other in own for other in self.reached(entry.keep or 0.0))}
            parts = [f"everything at {budget(keep)}" for keep in self.keeps if keep in whole]
            parts += [f"{entry.name} at {budget(entry.keep)}" for entry in own if entry.keep not in whole]
            said.append(f"{', '.join(parts)}: {note}")
        return said

    def need(self, task: str) -> Entry | None:
        """The entry with the fewest tokens that keeps ``ENOUGH`` of a task's plain accuracy."""
        good = [e for e in self.drawn() if (e.retention(task) or 0.0) >= ENOUGH and e.tokens is not None]
        return min(good, key=lambda e: (e.tokens, -(e.accuracy(task) or 0.0)), default=None)

    def by_need(self) -> list[str]:
        """Tasks, those that are kept with the fewest tokens first."""
        need = {task: self.need(task) for task in self.task_names}
        return sorted(
            self.task_names, key=lambda task: (entry.tokens or 0.0) if (entry := need[task]) is not None else math.inf
        )


def read(folder: Path) -> Run:
    """Read ``results.json``.

    Raises
    ------
    VtokError
        It is missing, no JSON, or of another schema.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise VtokError(f"{path} cannot be read ({error.strerror}); run vtok eval with --out {folder} first") from None
    except ValueError as error:
        raise VtokError(f"{path} is no JSON ({error}); run vtok eval again, it goes on from samples.jsonl") from None
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != 1:
        raise VtokError(f"{path} has schema {schema!r}; this version of vtok reads schema 1, so run vtok eval again")
    return Run(results)


def lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of ``samples.jsonl``; nothing where it is missing. A line that was cut off by a kill is left out."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                found = json.loads(line)
            except ValueError:
                continue
            if isinstance(found, dict):
                yield found
