"""Speed and memory of every method against the plain model and against free random pruning, paired in one process.

All contenders run once in every repetition, in an order that rotates, so a machine that slows down slows all of them.
Ratios are taken within a repetition; what is printed is their median.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vtok.api import adapter_of, compressed, report
from vtok.bench import ceiling
from vtok.bench.measure import prefill_peak, timed_generate
from vtok.budget import check_keep, smallest, solve
from vtok.engine.plan import shape_of
from vtok.engine.session import Session
from vtok.errors import VtokError
from vtok.method import Method, resolve
from vtok.progress import progress as progress_bar
from vtok.protocol import Adapter

PHASES = ("encode", "select", "prefill", "decode")


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a few measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Row:
    """One contender.

    Attributes
    ----------
    name : str
        ``"plain"``, the method's name, or what a ceiling is made of.
    role : str
        ``"plain"``, ``"method"``, ``"ceiling"`` (random pruning), or ``"refused"`` (see ``note``).
    keep : int or float, optional
        The budget it ran with: the one asked for, or the smallest it reaches.
    tokens_in, tokens_kept, average_tokens : float
        Visual tokens per image: at the input, after the last cut, averaged over the decoder layers.
    layer_tokens : list of float
        Visual tokens per image that each decoder layer saw.
    mac_ratio : float
        Multiply-accumulates of the decoder's prefill on visual tokens, relative to the plain model.
    times : dict of str to list of float
        Milliseconds of every repetition: ``encode`` (pixels to features), ``select`` (what methods at the input and
        decoder sites take), ``prefill`` (pixels to the first logits, these two included), ``decode`` (a further token).
    peak_mb : float
        Memory of the prefill on top of weights and inputs.
    same_cuts, at_input : str
        Names of the method's ceilings: random pruning with the same cuts, and in front of the decoder with the same
        average.
    speedup : Spread, optional
        Prefill of the plain model over this one's.
    share, share_at_input : Spread, optional
        Prefill of the ceiling over this one's: 1 is as fast as random pruning.
    """

    name: str
    role: str
    keep: int | float | None = None
    tokens_in: float = 0.0
    tokens_kept: float = 0.0
    average_tokens: float = 0.0
    layer_tokens: list[float] = field(default_factory=list)
    stage_tokens: list[tuple[str, int | None, int]] = field(default_factory=list)
    mac_ratio: float = 1.0
    times: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: float = 0.0
    same_cuts: str = ""
    at_input: str = ""
    speedup: Spread | None = None
    share: Spread | None = None
    share_at_input: Spread | None = None
    note: str = ""

    def ms(self, phase: str) -> Spread | None:
        """Milliseconds of a phase over the repetitions."""
        return Spread.of(self.times[phase]) if self.times.get(phase) else None

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: raw times and what was drawn from them."""
        medians = {phase: dataclasses.asdict(own) for phase in PHASES if (own := self.ms(phase))}
        return {**dataclasses.asdict(self), "ms": medians}


@dataclass
class Contender:
    """A row and how to switch the model to it."""

    row: Row
    chain: tuple[Method, ...] = ()

    def on(self, model: nn.Module) -> AbstractContextManager:
        if not self.chain:
            return nullcontext()
        return compressed(model, list(self.chain), keep=self.row.keep)


def run(
    model: Any,
    inputs: Mapping[str, Any],
    methods: Sequence[str | Method | Sequence[str | Method]],
    keep: int | float,
    *,
    repeats: int = 5,
    warmup: int = 1,
    new_tokens: int = 8,
    device: str | torch.device | None = None,
    clock: str = "wall",
    progress: bool = True,
) -> list[Row]:
    """Time methods side by side.

    Every method comes with two ceilings: random pruning with its own cuts (the same sites, layers and counts) and, at
    the same average, random pruning in front of the decoder. For methods at the input site the two are one.

    Parameters
    ----------
    model : nn.Module
        A vision-language model, not compressed.
    inputs : mapping
        What the model's forward takes.
    methods : sequence
        Names, methods, or lists of them that act together.
    keep : int or float
        The budget. A method that cannot reach it runs with the smallest it can; its row says so.
    repeats, warmup : int
        Timed and untimed rounds over all contenders.
    new_tokens : int
        Tokens to generate; more than one gives the time of a decoding step.
    device : optional
        Where to; the model's own device by default.
    clock : {"wall", "cpu"}
        ``"cpu"`` counts processor seconds of this process, over all its threads: for a machine that others use, with
        one thread. ``select`` is by the wall in any case.
    progress : bool
        Show a bar when it takes longer than two seconds.

    Returns
    -------
    list of Row
        Plain, the methods as given, their ceilings, and what was refused.
    """
    if repeats < 1 or new_tokens < 1 or warmup < 0:
        raise VtokError(f"repeats={repeats} and new_tokens={new_tokens} must be at least 1, warmup={warmup} at least 0")
    adapter = adapter_of(model)
    if adapter.text is None:
        raise VtokError(f"{type(model).__name__} has no language model; the bench times vision-language models")
    if device is not None:
        model.to(device)
    if clock not in ("wall", "cpu") or (clock == "cpu" and model.device.type != "cpu"):
        raise VtokError(f'clock={clock!r} is no clock for {model.device}; take "wall", or "cpu" on a CPU')
    inputs = {key: value.to(model.device) if hasattr(value, "to") else value for key, value in inputs.items()}
    with progress_bar("counts and memory", len(methods), progress) as advance:
        contenders, refused = line_up(model, adapter, inputs, methods, check_keep(keep), advance)
    steps = (warmup + repeats) * len(contenders)
    with progress_bar("bench", steps, progress) as advance:
        for turn in range(-warmup, repeats):
            for row, times in timed_round(model, adapter, inputs, contenders, turn, new_tokens, clock, advance):
                for phase, own in times.items() if turn >= 0 else ():
                    row.times.setdefault(phase, []).append(own)
    rows = [contender.row for contender in contenders]
    compare(rows)
    return rows + refused


def line_up(
    model: Any,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    methods: Sequence[Any],
    keep: int | float,
    advance: Callable[[int], None],
) -> tuple[list[Contender], list[Row]]:
    """Who runs, and who refuses: an untimed prefill of each gives its counts and its memory."""
    plain = Contender(Row("plain", "plain", peak_mb=prefill_peak(model, inputs) / 2**20))
    with compressed(model, "random", keep=1.0):
        model(**inputs, use_cache=False, logits_to_keep=1)
        whole = report(model)
    _describe(plain.row, whole)
    sizes = [sum(part.length for part in parts) for sample in whole.parts for parts in sample]
    if not sizes:
        raise VtokError("there is no picture in these inputs, so nothing to prune; give pixels with the prompt")
    contenders, refused, shape = [plain], [], shape_of(adapter)
    ceilings: dict[str, Contender] = {}
    for method in methods:
        advance(1)
        name = title(method)
        try:
            chain = tuple(own.prepare(model) for own in resolve(method, {}))
            for reason in filter(None, (own.refuse(shape) for own in chain)):
                raise VtokError(f"{name} cannot serve {adapter.family}: {reason}")
            budget = reachable(model, adapter, chain, keep, sizes)
            row = Row(name, "method", keep=budget)
            contender = enter(row, chain, model, adapter, inputs, sizes, ceilings)
        except VtokError as error:
            refused.append(Row(name, "refused", note=str(error)))
            continue
        if budget != keep:
            row.note = f"{name} reaches no average below {budget:g} on this model; that is its budget here"
        contenders.append(contender)
    return contenders + list(ceilings.values()), refused


def enter(
    row: Row,
    chain: tuple[Method, ...],
    model: Any,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    sizes: Sequence[int],
    ceilings: dict[str, Contender],
    memory: bool = True,
) -> Contender:
    """A contender from one untimed prefill, and whichever of its two ceilings ``ceilings`` lacks, from one of theirs.

    ``sizes`` are the visual tokens of every image. Without ``memory`` the prefills do not look at it.

    Raises
    ------
    VtokError
        The method cannot serve these inputs at ``row.keep``.
    """
    shape = shape_of(adapter)
    logs: list[ceiling.Log] = [{} for _ in chain]
    watched = [ceiling.watched(own, log) for own, log in zip(chain, logs, strict=True)]
    _measure(row, model, inputs, watched, memory)
    average = _average(row, sizes)
    row.at_input = row.same_cuts = f"random, input, {average:g}"
    wanted: dict[str, tuple[tuple[Method, ...], int | float]] = {row.at_input: ((ceiling.at_input(),), average)}
    if any(stage.site != "input" for own in chain for stage in own.stages(shape)):
        row.same_cuts = f"random, cuts of {row.name}"
        same = [ceiling.same_cuts(own, shape, log) for own, log in zip(chain, logs, strict=True)]
        wanted[row.same_cuts] = (tuple(same), row.keep or 1.0)
    for name, (own_chain, own_keep) in wanted.items():
        if name not in ceilings:
            ceilings[name] = Contender(Row(name, "ceiling", keep=own_keep), own_chain)
            _measure(ceilings[name].row, model, inputs, own_chain, memory)
    return Contender(row, chain)


def timed_round(
    model: Any,
    adapter: Adapter,
    inputs: Mapping[str, Any],
    contenders: Sequence[Contender],
    turn: int,
    new_tokens: int,
    clock: str,
    advance: Callable[[int], None],
) -> list[tuple[Row, dict[str, float]]]:
    """Milliseconds by phase of every contender: each runs once, starting with number ``turn``."""
    shift, found = turn % len(contenders), []
    for contender in [*contenders[shift:], *contenders[:shift]]:
        with contender.on(model):
            times = timed_generate(model, adapter, inputs, new_tokens, clock)
            if contender.chain:
                times["select"] = 1000 * report(model).seconds.get("select", 0.0)
        found.append((contender.row, times))
        advance(1)
    return found


def title(method: Any) -> str:
    """What a method, a name or a list of them is called in a table."""
    if isinstance(method, str):
        return method
    if isinstance(method, Method):
        options = ", ".join(f"{key}={value}" for key, value in method.options().items() if key != "samples")
        return (method.name or type(method).__name__) + (f"({options})" if options else "")
    return "+".join(title(part) for part in method)


def reachable(
    model: nn.Module, adapter: Adapter, chain: Sequence[Method], keep: int | float, sizes: Sequence[int]
) -> int | float:
    """The budget, or the smallest one above it that a late-cutting method reaches on images of these sizes."""
    session = Session(model, adapter, chain, keep, "keep")
    if any(method.site != "decoder" for method in chain):
        return keep

    def fits(budget: int | float) -> bool:
        try:
            for tokens in sizes:
                solve(tokens, budget, session.depth, session.profile, has_entry=False)
        except VtokError:
            return False
        return True

    if fits(keep):
        return keep
    least = max(smallest(tokens, session.depth, session.profile) for tokens in sizes)
    return next((budget for budget in range(least, max(sizes)) if fits(budget)), 1.0)


def _average(row: Row, sizes: Sequence[int]) -> int | float:
    """The average that a method reached, as a budget: tokens, or a share where the images differ in size."""
    if len(set(sizes)) == 1:
        return max(1, round(row.average_tokens))
    return round(row.average_tokens / row.tokens_in, 4)


@torch.no_grad()
def _measure(row: Row, model: Any, inputs: Mapping[str, Any], chain: Sequence[Method], memory: bool) -> None:
    with compressed(model, list(chain), keep=row.keep):
        if memory:
            row.peak_mb = prefill_peak(model, inputs) / 2**20
        else:
            model(**inputs, use_cache=True, logits_to_keep=1)
        _describe(row, report(model))


def _describe(row: Row, found: Any) -> None:
    row.tokens_in, row.tokens_kept, row.average_tokens = found.tokens_in, found.tokens_kept, found.average_tokens
    row.layer_tokens, row.mac_ratio = found.layer_tokens, found.mac_ratio
    row.stage_tokens = [
        (stage.site, stage.layer, sum(len(kept) for sample in stage.kept for kept in sample)) for stage in found.stages
    ]


def compare(rows: Sequence[Row]) -> None:
    """Ratios of prefill times, repetition by repetition."""
    by_name = {row.name: row.times["prefill"] for row in rows if row.role != "method"}

    def ratio(row: Row, of: str) -> Spread:
        return Spread.of([a / b for a, b in zip(by_name[of], row.times["prefill"], strict=True)])

    for row in rows:
        if row.role != "plain":
            row.speedup = ratio(row, "plain")
        if row.role == "method":
            row.share, row.share_at_input = ratio(row, row.same_cuts), ratio(row, row.at_input)
