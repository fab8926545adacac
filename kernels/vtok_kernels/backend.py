"""Registry of operator implementations: a fused version replaces one operator and no caller changes."""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
Device = torch.device | str | None


class _Implementation(NamedTuple):
    function: Callable
    devices: tuple[str, ...] | None
    priority: int

    def supports(self, device: Device) -> bool:
        return device is None or self.devices is None or torch.device(device).type in self.devices


FORCED = ("reference", "triton", "cuda")
"""Values of the environment variable VTOK_KERNELS."""

_OPERATORS: dict[str, dict[str, _Implementation]] = {}
_TRACED: dict[str, Callable] = {}
_PORTABLE: dict[str, Callable] = {}
_requested: ContextVar[str | None] = ContextVar("vtok_kernels_backend", default=None)
_exporting: ContextVar[bool] = ContextVar("vtok_kernels_portable", default=False)


def register(name: str, backend: str, *, devices: tuple[str, ...] | None = None, priority: int = 1) -> Callable:
    """Decorator: implements operator `name` on `devices` (None: all). Highest priority serves; "reference" has 0."""

    def keep(function: Callable) -> Callable:
        _OPERATORS.setdefault(name, {})[backend] = _Implementation(function, devices, priority)
        return function

    return keep


def available(device: Device = None) -> dict[str, tuple[str, ...]]:
    """Operator -> its backends on `device` (None: on any), best first."""
    ranked = {name: sorted(kinds.items(), key=lambda kind: -kind[1].priority) for name, kinds in _OPERATORS.items()}
    return {name: tuple(b for b, i in kinds if i.supports(device)) for name, kinds in ranked.items()}


def _kinds(name: str) -> dict[str, _Implementation]:
    if name not in _OPERATORS:
        raise ValueError(f"There is no operator {name!r}: choose one of {', '.join(sorted(_OPERATORS))}.")
    return _OPERATORS[name]


def _forced() -> str | None:
    """VTOK_KERNELS, checked."""
    backend = os.environ.get("VTOK_KERNELS") or None
    if backend not in (None, *FORCED):
        raise ValueError(f"VTOK_KERNELS is {backend!r}: set it to one of {', '.join(FORCED)}, or unset it.")
    return backend


def get(name: str, device: Device = None) -> Callable:
    """Implementation of operator `name` for tensors on `device`.

    That of `use` where it has one; else that of VTOK_KERNELS where it has one for the device; else the best.
    """
    kinds, backend, forced = _kinds(name), _requested.get(), _forced()
    if backend in kinds:
        if not kinds[backend].supports(device):
            raise ValueError(
                f"{backend!r} of {name!r} runs on {kinds[backend].devices}: move the tensors from {device}."
            )
    elif forced in kinds and kinds[forced].supports(device):
        backend = forced
    else:
        backend = max(kinds, key=lambda b: (kinds[b].supports(device), kinds[b].priority))
        if not kinds[backend].supports(device):
            raise ValueError(f"Operator {name!r} runs on {kinds[backend].devices}: move the tensors from {device}.")
    return kinds[backend].function


def reference(name: str) -> Callable:
    """The plain-torch implementation of operator `name`, for the cases that a fused version leaves to it."""
    return _kinds(name)["reference"].function


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the context, `backend` serves every operator that it implements (see `available`), in this thread."""
    known = sorted({b for kinds in _OPERATORS.values() for b in kinds})
    if backend not in known:
        raise ValueError(f"There is no backend {backend!r}: choose one of {', '.join(known)}.")
    token = _requested.set(backend)
    try:
        yield
    finally:
        _requested.reset(token)


@contextmanager
def portable() -> Iterator[None]:
    """Within the context, operators are plain torch that an exported graph can hold, in this thread: no loop over the
    batch (whose size is open), no custom operator. Same results up to rounding (see `vtok_kernels._portable`)."""
    token = _exporting.set(True)
    try:
        yield
    finally:
        _exporting.reset(token)


def portable_form(name: str) -> Callable:
    """Decorator: the form of operator `name` that `portable` takes where its reference cannot be exported."""

    def keep(function: Callable) -> Callable:
        _PORTABLE[name] = function
        return function

    return keep


def trace(name: str, function: Callable) -> None:
    """While torch.compile or torch.export look on, `function` stands for operator `name` (see `ops`)."""
    _TRACED[name] = function


@torch.compiler.assume_constant_result
def _plain_asked() -> bool:
    """Whether plain torch is to be traced. Read when a graph is made, not guarded afterwards."""
    return (_requested.get() or _forced()) == "reference"


@torch.compiler.assume_constant_result
def portable_asked() -> bool:
    """Whether a graph is being exported. Not guarded either."""
    return _exporting.get()


def operator(reference: Callable[P, R]) -> Callable[P, R]:
    """Register `reference` under its name and return the public function, which dispatches on its first argument."""
    name, first = reference.__name__, next(iter(inspect.signature(reference).parameters))

    @functools.wraps(reference)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        if portable_asked():
            return _PORTABLE.get(name, reference)(*args, **kwargs)
        if torch.compiler.is_compiling():
            function = reference if _plain_asked() else _TRACED.get(name, reference)
            return function(*args, **kwargs)
        tensor: object = args[0] if args else kwargs.get(first)
        if isinstance(tensor, list | tuple) and tensor:
            tensor = tensor[0]
        return get(name, getattr(tensor, "device", None))(*args, **kwargs)

    register(name, "reference", priority=0)(reference)
    return dispatch
