"""Contest after contest, each with as many rounds as its part of the time allows."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vtok.api import adapter_of
from vtok.bench import options
from vtok.bench.contest import Contender, Row, Spread, compare, line_up, timed_round
from vtok.bench.e2e.graph import graphed_decode
from vtok.bench.e2e.plan import Cell
from vtok.budget import check_keep
from vtok.geometry import inputs_of
from vtok.protocol import Adapter

LEAST = 3
"""Rounds of a contest, unless the whole run's time is over: then one."""


@dataclass
class Outcome:
    """One contest: its rows, or why there are none.

    Attributes
    ----------
    cell : Cell
        What ran.
    rows : list of Row
        As of ``vtok.bench.run``.
    graphs : dict of str to list of float
        Milliseconds of a decoding step as a CUDA graph, for the plain model and the methods.
    rounds : int
        Timed ones.
    note : str
        Why it was left out, or what is missing.
    """

    cell: Cell
    rows: list[Row] = field(default_factory=list)
    graphs: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0
    note: str = ""

    @property
    def plain(self) -> Row | None:
        """The plain model's row."""
        return next((row for row in self.rows if row.role == "plain"), None)

    def share_of_plain(self, row: Row, phase: str = "select") -> Spread | None:
        """A phase of a contender over the plain model's prefill of the same round."""
        plain = self.plain
        if plain is None or not row.times.get(phase):
            return None
        return Spread.of([a / b for a, b in zip(row.times[phase], plain.times["prefill"], strict=True)])

    def overhead(self, row: Row) -> Spread | None:
        """All that a method's own scoring, choosing and merging adds to a prefill, wherever it acts: what it takes
        longer than random pruning with the same cuts, over the plain model's prefill of the same round."""
        plain, same = self.plain, next((other for other in self.rows if other.name == row.same_cuts), None)
        if plain is None or same is None or not row.times.get("prefill"):
            return None
        times = zip(row.times["prefill"], same.times["prefill"], plain.times["prefill"], strict=True)
        return Spread.of([(own - random) / whole for own, random, whole in times])

    def as_dict(self) -> dict[str, Any]:
        """Everything, raw times included."""
        rows = []
        for row in self.rows:
            select, overhead = self.share_of_plain(row), self.overhead(row)
            extra = {"select_share": select and select.median, "overhead": overhead and overhead.median}
            rows.append({**row.as_dict(), **extra, "decode_graph": self.graphs.get(row.name)})
        return {"cell": asdict(self.cell), "rounds": self.rounds, "note": self.note, "rows": rows}


def run(
    plan: Sequence[Cell],
    methods: str = "all",
    *,
    device: str = "cpu",
    dtype: str = "fp32",
    minutes: float | None = None,
    repeats: int = 5,
    new_tokens: int = 4,
    prompt_tokens: int = 64,
    clock: str = "wall",
) -> Iterator[Outcome]:
    """The contests of a plan, one outcome each.

    Parameters
    ----------
    plan : sequence of Cell
        Of ``cells``; those of one model stand together, so that it is built once.
    methods : str
        ``"all"``, or names with commas between.
    device, dtype : str
        Where, and of what.
    minutes : float, optional
        For everything. Every contest gets an equal part of what is left; one that starts when nothing is left is left
        out and says so.
    repeats : int
        Rounds of a contest, at most; at least three while there is time, and one where it runs at all.
    new_tokens, prompt_tokens : int
        As for ``vtok bench``.
    clock : {"wall", "cpu"}
        As for ``vtok.bench.run``.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    name, model = "", None
    for number, cell in enumerate(plan):
        if _over(end):
            yield Outcome(cell, note=f"left out: {minutes:g} minutes are over")
            continue
        if cell.model != name:
            model = None
            _free(device)
            name, model = cell.model, options.model_of(cell.model, options.dtype_of(dtype), device)
        picture = options.noise(cell.picture)
        pixels = picture.width * picture.height
        inputs = inputs_of(model, picture, prompt_tokens, batch=cell.batch, pixels=pixels)
        until = None if end is None else time.monotonic() + (end - time.monotonic()) / (len(plan) - number)
        outcome = Outcome(cell)
        try:
            names = options.names_of(methods, model)
            _contest(outcome, model, inputs, names, (until, end), repeats, new_tokens, clock)
        except torch.OutOfMemoryError as error:
            outcome.rows, outcome.note = [], f"out of memory: {str(error).splitlines()[0]}"
        yield outcome
        del inputs
        _free(device)


def _contest(
    outcome: Outcome,
    model: Any,
    inputs: Mapping[str, Any],
    methods: Sequence[Any],
    until: tuple[float | None, float | None],
    repeats: int,
    new_tokens: int,
    clock: str,
) -> None:
    """Rounds until the contest's part of the time is over, and until all of it is: then three rounds, or one."""
    adapter = adapter_of(model)
    contenders, refused = line_up(model, adapter, inputs, methods, check_keep(outcome.cell.keep), _nothing)
    # the line-up has run every prefill once: what is left to warm up is decoding, on one of them
    timed_round(model, adapter, inputs, contenders[:1], 0, new_tokens, clock, _nothing)
    for turn in range(repeats):
        if (turn >= LEAST and _over(until[0])) or (turn >= 1 and _over(until[1])):
            break
        for row, times in timed_round(model, adapter, inputs, contenders, turn, new_tokens, clock, _nothing):
            for phase, own in times.items():
                row.times.setdefault(phase, []).append(own)
        outcome.rounds += 1
    rows = [contender.row for contender in contenders]
    compare(rows)
    outcome.rows = rows + refused
    if outcome.cell.graphs and model.device.type == "cuda" and not _over(until[1]):
        _graphs(outcome, model, adapter, inputs, contenders)


def _graphs(
    outcome: Outcome, model: Any, adapter: Adapter, inputs: Mapping[str, Any], contenders: Sequence[Contender]
) -> None:
    """Decoding as a CUDA graph, of the plain model and the methods; random pruning decodes as its method does."""
    for contender in contenders:
        if contender.row.role == "ceiling":
            continue
        try:
            with contender.on(model):
                outcome.graphs[contender.row.name] = graphed_decode(model, inputs)
        except Exception as error:  # a step that cannot be captured is a finding
            lines = str(error).strip().splitlines()
            outcome.note = f"no graph of {contender.row.name}: {type(error).__name__}: {lines[0] if lines else ''}"
            torch.cuda.synchronize()


def _over(end: float | None) -> bool:
    return end is not None and time.monotonic() >= end


def _nothing(steps: int) -> None:
    """Progress is shown by contests."""


def _free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
