"""What a device can do at most, measured on it, and a clock for single calls."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vtok.bench.measure import clock, machine
from vtok.bench.options import DTYPES

FLUSH = 256 * 2**20
"""Bytes written between two timed calls on a GPU: five times the second-level cache of an H100."""
GRAIN = 2e-3
"""Seconds that a measurement on a CPU lasts at least: shorter calls are repeated inside it."""


class CallClock:
    """Milliseconds of one call.

    On a GPU by events around it, behind a write that empties the cache and keeps the device busy while the call is
    being launched: what is told is the device's time, or the host's where the host is slower. On a CPU by ``kind``,
    with warm caches.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        self.device, self.kind = device, kind
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def ms(self, call: Callable[[], Any], times: int = 1) -> float:
        """Of ``call``; on a CPU the mean over ``times`` calls."""
        if self.flush is not None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)
        begin = clock(self.device, self.kind)
        for _ in range(times):
            call()
        return 1000 * (clock(self.device, self.kind) - begin) / times

    def times(self, estimate: float) -> int:
        """How often to repeat a call of ``estimate`` milliseconds inside one measurement."""
        return 1 if self.flush is not None else max(1, math.ceil(1000 * GRAIN / max(estimate, 1e-4)))


@dataclass(frozen=True)
class Ceilings:
    """The best that a device was seen to do.

    Attributes
    ----------
    bandwidth : float
        Bytes per second of a large copy, read and written ones.
    rate : dict of str to float
        Operations per second of a large matrix product, by dtype.
    launch_ms : float
        Milliseconds of the smallest call, an addition of 64 numbers: the floor under every operator.
    """

    bandwidth: float
    rate: dict[str, float]
    launch_ms: float

    def limit_ms(self, moved: float, operations: float, dtype: str) -> float:
        """Milliseconds that so many bytes and operations take at least."""
        return 1000 * max(moved / self.bandwidth, operations / self.rate[dtype])

    def bound(self, moved: float, operations: float, dtype: str) -> str:
        """Which of the two it is."""
        return "bandwidth" if moved / self.bandwidth >= operations / self.rate[dtype] else "arithmetic"


def ceilings(watch: CallClock, dtypes: tuple[str, ...], *, quick: bool = False) -> Ceilings:
    """Measure them: a second or two; ``quick`` takes a few milliseconds and means little."""
    on_gpu = watch.device.type == "cuda"
    size = 2**18 if quick else 2**30 if on_gpu else 2**27
    bandwidth = _copy_rate(watch, size)
    rate = {}
    n = 64 if quick else 8192 if on_gpu else 1024
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=watch.device).to(DTYPES[dtype]) for _ in range(2))
        rate[dtype] = 2 * n**3 / _best(watch, partial(torch.mm, a, b))
    few = torch.ones(64, device=watch.device)
    launch = statistics.median(watch.ms(lambda: few + 1, 1 if on_gpu else 1000) for _ in range(20))
    return Ceilings(bandwidth, rate, launch)


def _copy_rate(watch: CallClock, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    return 2 * size / _best(watch, lambda: target.copy_(source))


def _best(watch: CallClock, call: Callable[[], Any], most: int = 30, seconds: float = 1.0) -> float:
    """Seconds of the fastest of many calls."""
    for _ in range(2):
        call()
    end, found = time.monotonic() + seconds, [watch.ms(call)]
    while len(found) < most and time.monotonic() < end:
        found.append(watch.ms(call))
    return min(found) / 1000


def setting_of(device: torch.device, kind: str) -> dict[str, Any]:
    """What a file of results says of the machine."""
    found: dict[str, Any] = {**machine(device), "clock": kind}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def slug(name: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|cpu|@.*", "", name.lower())).strip("-") or "device"
