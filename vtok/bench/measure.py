"""Clocks and memory for the bench: whole phases, no synchronisation inside them."""

from __future__ import annotations

import platform
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LogitsProcessor, LogitsProcessorList

from vtok.engine.timing import Timer
from vtok.engine.towers import Wrapped
from vtok.protocol import Adapter


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block and alive at the same time.

    Works on any device, to the byte, and the same on every run. What an operator allocates and frees inside itself is
    not seen.

    Attributes
    ----------
    live, peak : int
        Bytes now, and at most so far.
    """

    def __init__(self, *known: Any) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._storages = {x.untyped_storage()._cdata for x in tree_leaves(known) if isinstance(x, Tensor)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


@torch.no_grad()
def prefill_peak(model: Any, inputs: Mapping[str, Any]) -> int:
    """Bytes that a prefill needs on top of weights and inputs: activations at their peak, the cache included.

    On a GPU this is the allocator's peak; elsewhere a tally of live tensors.
    """
    call = {**inputs, "use_cache": True, "logits_to_keep": 1}
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(**call)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    weights = [*model.parameters(), *model.buffers()]
    with PeakMemory(weights, dict(inputs)) as memory:
        model(**call)
    return memory.peak


class FirstLogits(LogitsProcessor):
    """Notes when the first logits are there: the one synchronisation, between prefill and decoding.

    Attributes
    ----------
    seconds : float or None
        By ``clock``, once they are.
    """

    def __init__(self, device: torch.device, kind: str = "wall") -> None:
        self.device, self.kind = device, kind
        self.seconds: float | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.seconds is None:
            self.seconds = clock(self.device, self.kind)
        return scores


def clock(device: torch.device, kind: str = "wall") -> float:
    """Seconds, after everything on the device is done; ``"cpu"`` counts those that this process had a processor."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if kind == "cpu" else time.perf_counter()


@torch.no_grad()
def timed_generate(
    model: Any, adapter: Adapter, inputs: Mapping[str, Any], new_tokens: int, kind: str = "wall"
) -> dict[str, float]:
    """Greedy generation, as a user calls it, by the clock ``kind``.

    Returns
    -------
    dict
        Milliseconds: ``encode`` (pixels to features, inside the prefill), ``prefill`` (pixels to the first logits), and
        with more than one new token ``decode`` (each further token).
    """
    device = model.device
    mark = FirstLogits(device, kind)
    with _timed_encode(adapter, kind) as encode:
        start = clock(device, kind)
        model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            logits_processor=LogitsProcessorList([mark]),
        )
        end = clock(device, kind)
    assert mark.seconds is not None
    found = {"encode": 1000 * encode(), "prefill": 1000 * (mark.seconds - start)}
    if new_tokens > 1:
        found["decode"] = 1000 * (end - mark.seconds) / (new_tokens - 1)
    return found


@contextmanager
def _timed_encode(adapter: Adapter, kind: str) -> Iterator[Callable[[], float]]:
    """Time ``get_image_features`` and its like, from outside of whatever else is wrapped around them.

    Yields a function that tells the seconds. On a GPU they come from events, so nothing waits inside the prefill.
    """
    base: Any = adapter.base
    assert isinstance(base, nn.Module)
    watch = _Watch(next(base.parameters()).device, kind)
    wrapped = [Wrapped(base, f"get_{modality}_features", watch.around) for modality in adapter.modalities]
    try:
        yield lambda: watch.seconds + watch.timer.seconds().get("encode", 0.0)
    finally:
        for item in reversed(wrapped):
            item.remove()


class _Watch:
    """Adds up the time of calls that do not lie inside each other."""

    def __init__(self, device: torch.device, kind: str) -> None:
        self.device, self.kind = device, kind
        self.timer, self.seconds, self.running = Timer(), 0.0, False

    def around(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        if self.running:  # Qwen3-VL encodes a video through get_image_features
            return original(*args, **kwargs)
        on_gpu = self.device.type == "cuda"
        start: Any = self.timer.begin(self.device) if on_gpu else clock(self.device, self.kind)
        self.running = True
        try:
            return original(*args, **kwargs)
        finally:
            self.running = False
            if on_gpu:
                self.timer.end("encode", start, self.device)
            else:
                self.seconds += clock(self.device, self.kind) - start


def machine(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = _cpu_name()
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text().split("\n") if info.exists() else []
    found = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), "")
    return found or platform.processor() or platform.machine()
