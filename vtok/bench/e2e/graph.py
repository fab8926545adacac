"""A decoding step as a CUDA graph: what a token costs when no launch is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class _Caught(BaseException):
    """Leaves ``generate`` with the arguments of its second forward in hand; no ``except Exception`` on the way."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__("caught")
        self.arguments = arguments


@torch.no_grad()
def decode_call(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the first decoding step of ``generate``, the cache as the prefill left it.

    ``model(**decode_call(model, inputs))`` is that step. A compressed model's session serves it as it serves
    ``generate``.
    """
    calls = 0

    def catch(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise _Caught(kwargs)

    handle = model.register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
    try:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, num_beams=1, use_cache=True)
    except _Caught as caught:
        return caught.arguments
    finally:
        handle.remove()
    raise RuntimeError("generate made no second forward")


@torch.no_grad()
def graphed_decode(model: Any, inputs: Mapping[str, Any], repeats: int = 10) -> list[float]:
    """Milliseconds of a decoding step replayed as a CUDA graph.

    The graph holds one step at one length of the cache, whose new entries lie in the graph's own memory: every replay
    does the same work. A first step outside of it loads what the capture may not.
    """
    side = torch.cuda.Stream()
    warm = decode_call(model, inputs)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        model(**warm)
    torch.cuda.current_stream().wait_stream(side)
    del warm
    arguments = decode_call(model, inputs)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        model(**arguments)
    graph.replay()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    graph.reset()
    return found
