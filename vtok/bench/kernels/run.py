"""Time every implementation of an operator beside plain torch, compiled torch and the textbook, paired in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import vtok_kernels as kernels
from vtok.bench.contest import Spread
from vtok.bench.kernels.case import Bar, Case, Maker
from vtok.bench.kernels.cases import BUILDERS, UNTIMED
from vtok.bench.kernels.device import CallClock, Ceilings
from vtok.bench.measure import PeakMemory
from vtok.errors import VtokError

LEAST, MOST = 5, 50
"""Rounds of a case."""
RATIOS = ("reference", "compiled", "textbook", "yardstick")


@dataclass
class Row:
    """One way to do one case.

    Attributes
    ----------
    operator, size, dtype : str
        The case.
    backend : str
        A backend of ``vtok_kernels`` (``"reference"`` is plain torch), ``"compiled"``, ``"textbook"`` or
        ``"yardstick"``.
    chosen : bool
        This backend serves the operator on this device when nobody asks for one.
    times : list of float
        Milliseconds of every round.
    moved, operations : float
        Bytes and arithmetic that the case needs at least.
    bound : str
        ``"bandwidth"`` or ``"arithmetic"``: what sets the limit.
    limit_ms : float
        What they take at the device's ceilings.
    peak_mb : float, optional
        Memory on top of the inputs, results included.
    agreement : float, optional
        Share of indices that are the reference's; for real numbers, 1 less the largest difference over the largest
        number.
    speedup : dict of str to Spread
        Time of ``reference``, ``compiled``, ``textbook`` and ``yardstick`` over this one's, within a round.
    note : str
        Why there are no times, or what ``yardstick`` is.
    """

    operator: str
    size: str
    dtype: str
    backend: str
    chosen: bool = False
    times: list[float] = field(default_factory=list)
    moved: float = 0.0
    operations: float = 0.0
    bound: str = ""
    limit_ms: float = 0.0
    peak_mb: float | None = None
    agreement: float | None = None
    speedup: dict[str, Spread] = field(default_factory=dict)
    note: str = ""

    @property
    def ms(self) -> Spread | None:
        """Milliseconds over the rounds."""
        return Spread.of(self.times) if self.times else None

    @property
    def share(self) -> float | None:
        """How much of the device's limit it reaches."""
        return self.limit_ms / self.ms.median if self.ms is not None else None


@dataclass
class Outcome:
    """What came of one case: its rows, and the bars that the best of them has to reach."""

    rows: list[Row]
    bars: tuple[Bar, ...] = ()


@dataclass
class Contender:
    row: Row
    call: Callable[[], Any]
    backend: str | None = None
    output: Any = None
    estimate: float = 0.0

    def on(self) -> AbstractContextManager:
        """Operators that an implementation calls in turn are of its backend too, where they have it."""
        return nullcontext() if self.backend is None else kernels.use(self.backend)


def measure(
    request: tuple[str, dict[str, Any]],
    dtype: str,
    watch: CallClock,
    top: Ceilings,
    *,
    seconds: float = 1.0,
    compile: bool = True,
    baselines: bool = True,
) -> Outcome:
    """One case.

    Parameters
    ----------
    request : (str, dict)
        Of ``cases.requests``.
    dtype : str
        ``"fp32"``, ``"bf16"`` or ``"fp16"``.
    watch, top : CallClock, Ceilings
        Of the device.
    seconds : float
        Time for the rounds, at least five of them.
    compile : bool
        With ``torch.compile`` of plain torch.
    baselines : bool
        With the textbook and the yardstick.
    """
    name, numbers = request
    case = BUILDERS[name](Maker(dtype, watch.device), **numbers)
    with torch.set_grad_enabled(case.grad):
        contenders = _line_up(case, watch, top, compile, baselines)
        ready = [contender for contender in contenders if _try(contender, case, watch)]
        _agree(ready)
        cost = sum(contender.estimate for contender in ready)
        rounds = min(MOST, max(LEAST, int(1000 * seconds / max(cost, 1e-3))))
        for turn in range(rounds if ready else 0):
            shift = turn % len(ready)
            for contender in [*ready[shift:], *ready[:shift]]:
                with contender.on():
                    took = watch.ms(contender.call, watch.times(contender.estimate))
                contender.row.times.append(took)
    rows = [contender.row for contender in contenders]
    _compare(rows)
    return Outcome(rows, case.bars)


def _line_up(case: Case, watch: CallClock, top: Ceilings, compile: bool, baselines: bool) -> list[Contender]:
    def row(backend: str, note: str = "") -> Row:
        return Row(
            case.operator, case.title, case.dtype, backend, note=note, moved=case.moved, operations=case.operations,
            bound=top.bound(case.moved, case.operations, case.dtype),
            limit_ms=top.limit_ms(case.moved, case.operations, case.dtype),
        )  # fmt: skip

    chosen, found = kernels.get(case.operator, watch.device), []
    for backend in kernels.available(watch.device)[case.operator]:
        with kernels.use(backend):
            function = kernels.get(case.operator, watch.device)
        contender = Contender(row(backend), partial(case.call, function), backend)
        contender.row.chosen = function is chosen
        found.append(contender)
    if compile:
        found.append(_compiled(case, row("compiled")))
    if baselines and case.textbook is not None:
        found.append(Contender(row("textbook"), case.textbook))
    if baselines and case.yardstick is not None:
        found.append(Contender(row("yardstick", case.yardstick[0]), case.yardstick[1]))
    return found


def _compiled(case: Case, row: Row) -> Contender:
    torch._dynamo.reset()

    def compiled(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False)

    if case.compiled is None:
        with kernels.use("reference"):
            function = compiled(kernels.get(case.operator))
        return Contender(row, lambda: case.call(function), "reference")
    try:
        return Contender(row, case.compiled(compiled))
    except NotImplementedError as error:
        row.note = str(error)
        return Contender(row, _unable)


def _unable() -> None:
    raise NotImplementedError


def _try(contender: Contender, case: Case, watch: CallClock) -> bool:
    """Warm up: compile, note result, memory and a first guess of the time. ``False`` where it fails; its row says why.

    On a CPU memory is a tally of live tensors, which compiled code passes by.
    """
    row = contender.row
    if contender.call is _unable:
        return False
    try:
        with contender.on():
            contender.call()
            if watch.device.type == "cuda":
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                contender.output = contender.call()
                torch.cuda.synchronize()
                row.peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
            elif row.backend != "compiled":
                with PeakMemory(case.inputs) as memory:
                    contender.output = contender.call()
                row.peak_mb = memory.peak / 2**20
            contender.estimate = min(watch.ms(contender.call) for _ in range(2))
    except Exception as error:  # whatever a backend or a compiler stumbles over is a finding, not the end of the run
        row.note = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
        return False
    return True


def _agree(contenders: Sequence[Contender]) -> None:
    """Hold results against the reference's, then let go of them."""
    truth = next((own.output for own in contenders if own.row.backend == "reference"), None)
    for contender in contenders:
        if contender.row.backend not in ("textbook", "yardstick") and contender.output is not None:
            contender.row.agreement = agreement(contender.output, truth)
        if contender.output is not truth:
            contender.output = None
    for contender in contenders:
        contender.output = None


def agreement(found: Any, truth: Any) -> float | None:
    """How far results are the same: see ``Row.agreement``; the worst of several tensors."""
    shares = []
    for own, right in zip(_tensors(found), _tensors(truth), strict=False):
        if own.shape != right.shape:
            return 0.0
        if right.is_floating_point():
            scale = right.abs().amax().double().clamp_min(1e-30) if right.numel() else 1.0
            error = (own.double() - right.double()).abs().amax() / scale if right.numel() else 0.0
            shares.append(1.0 - float(error))
        else:
            shares.append(float((own == right).double().mean()) if right.numel() else 1.0)
    return min(shares) if shares else None


def _tensors(value: Any) -> list[Tensor]:
    """Tensors of a result; of a merge plan, where each token goes."""
    return [x for x in (getattr(leaf, "dst", leaf) for leaf in tree_leaves(value)) if isinstance(x, Tensor)]


def _compare(rows: Sequence[Row]) -> None:
    """Ratios of times, round by round."""
    for row in rows:
        for other in rows:
            if other.backend in RATIOS and other is not row and row.times and other.times:
                row.speedup[other.backend] = Spread.of([b / a for a, b in zip(row.times, other.times, strict=True)])


def _case_of(row: Row) -> tuple[str, str, str]:
    return row.operator, row.size, row.dtype


def operators_of(text: str, device: torch.device) -> tuple[list[str], list[str]]:
    """``--operators``: names with a case, and those that are there without one."""
    there = kernels.available(device)
    wanted = list(there) if text == "all" else [name.strip() for name in text.split(",") if name.strip()]
    for name in wanted:
        if name not in there:
            raise VtokError(f"there is no operator {name!r}; known are {', '.join(sorted(there))}")
    return [name for name in wanted if name in BUILDERS], [
        name for name in wanted if name not in BUILDERS and name not in UNTIMED
    ]


def run(
    requests: Sequence[tuple[str, dict[str, Any]]],
    dtypes: Sequence[str],
    watch: CallClock,
    top: Ceilings,
    *,
    seconds: float = 1.0,
    minutes: float | None = None,
    compile: bool = True,
    baselines: bool = True,
) -> Iterator[Outcome]:
    """Case after case. When ``minutes`` are nearly over, compilation is left out, and then the remaining cases."""
    start = time.monotonic()
    for dtype in dtypes:
        for request in requests:
            used = 0.0 if minutes is None else (time.monotonic() - start) / (60 * minutes)
            if used >= 1:
                size = " ".join(f"{key}{value}" for key, value in request[1].items())
                yield Outcome([Row(request[0], size, dtype, "all", note=f"left out: {minutes:g} minutes are over")])
                continue
            own = compile and used < 0.7
            found = measure(request, dtype, watch, top, seconds=seconds, compile=own, baselines=baselines)
            if compile and not own:
                found.rows.append(Row(*_case_of(found.rows[0]), "compiled", note="left out: time was short"))
            yield found
            gc.collect()
            if watch.device.type == "cuda":
                torch.cuda.empty_cache()
