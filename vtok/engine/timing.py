"""Phase times without a synchronisation: CUDA events on a GPU, the clock elsewhere; read only when asked."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timer:
    """Adds up the seconds of named phases."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, object, object]] = []

    @contextmanager
    def phase(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time a block under ``name``."""
        start = _mark(device)
        try:
            yield
        finally:
            self._marks.append((name, start, _mark(device)))

    def begin(self, device: torch.device | None = None) -> object:
        """A mark to be handed to ``end``."""
        return _mark(device)

    def end(self, name: str, start: object, device: torch.device | None = None) -> None:
        self._marks.append((name, start, _mark(device)))

    def seconds(self) -> dict[str, float]:
        """Seconds by phase."""
        total: dict[str, float] = {}
        for name, start, end in self._marks:
            total[name] = total.get(name, 0.0) + _between(start, end)
        return total


def _mark(device: torch.device | None) -> object:
    if device is not None and device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.perf_counter()


def _between(start: object, end: object) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1000.0
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    return 0.0
