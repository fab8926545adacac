"""How a public operator becomes a custom one, and what the parts share: shapes of outputs, rows at indices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._common import score_dtype
from ..backend import get

Operator = Callable[..., Any]


def first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, list | tuple):
        return next((found for part in value if (found := first_tensor(part)) is not None), None)
    return value if isinstance(value, Tensor) else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _own(outputs: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Contiguous outputs that share memory neither with inputs nor among each other: a custom operator's promise."""
    taken = {x.untyped_storage().data_ptr() for x in inputs} - {0}
    owned = []
    for x in outputs:
        x = x.contiguous()
        if x.untyped_storage().data_ptr() in taken:
            x = x.clone()
        taken.add(x.untyped_storage().data_ptr())
        owned.append(x)
    return owned


def define(name: str, schema: str, fake: Operator, run: Operator | None = None) -> Operator:
    """`vtok::name`: `run` (default: the operator of that name) on real tensors, `fake` for shapes and dtypes alone."""

    def call(*args: Any) -> Any:
        first = first_tensor(args)
        function = run or get(name, None if first is None else first.device)
        found = function(*args)
        owned = _own(_tensors(found), _tensors(args))
        return owned[0] if isinstance(found, Tensor) else (owned if isinstance(found, list) else tuple(owned))

    defined = torch.library.custom_op(f"vtok::{name}", call, mutates_args=(), schema=schema)
    defined.register_fake(fake)
    return defined


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def without_gradient(op: Operator) -> Operator:
    """`op` of detached tensors: no_grad would stay on if the operator raised inside a graph."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*map(detached, args), **{name: detached(value) for name, value in kwargs.items()})

    return call


def score_like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=score_dtype(x))


def index_like(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.long)


def along(index: Tensor, x: Tensor) -> Tensor:
    """index (B, K) -> (B, K, ...), expanded over the trailing axes of x."""
    return index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])


def pick_rows(x: Tensor, index: Tensor, on: Tensor) -> Tensor:
    """Rows of x (B, N, ...) at index (B, K) where `on`, else zero."""
    rows = x.gather(1, along(torch.where(on, index, 0), x))
    return torch.where(on.reshape(*on.shape, *[1] * (x.dim() - 2)), rows, 0)
