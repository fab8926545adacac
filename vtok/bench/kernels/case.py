"""One operator at one size: how to call it, what it must move and compute, and what it is measured against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vtok.bench.options import DTYPES

Call = Callable[[], Any]


@dataclass(frozen=True)
class Bar:
    """A figure that a case has to reach.

    Attributes
    ----------
    measure : str
        ``"ms"``, ``"share"`` (of the device's limit), ``"speedup"`` (over the textbook) or ``"yardstick"`` (time over
        the yardstick's).
    limit : float
        At most for ``ms`` and ``yardstick``, at least for the others.
    device : str
        Where it holds: part of the device's name (``"H100"``), ``"cuda"`` or ``"cpu"``.
    """

    measure: str
    limit: float
    device: str = "cuda"

    @property
    def at_most(self) -> bool:
        """Smaller is better."""
        return self.measure in ("ms", "yardstick")


@dataclass(frozen=True)
class Case:
    """An operator on inputs that are made.

    Attributes
    ----------
    operator : str
        Its name in ``vtok_kernels.available()``.
    size : mapping
        What the table shows of the inputs.
    call : callable
        Runs an implementation of the operator on the inputs.
    inputs : sequence of Tensor
        All that ``call`` reads; memory is counted on top.
    moved, operations : float
        Bytes (every input once, every output once) and arithmetic that no implementation can do without.
    dtype : str
        Of the inputs: the matrix rate that the operations are held against.
    textbook : callable, optional
        The same as one writes it from the paper.
    compiled : callable, optional
        Given ``torch.compile``, returns the call to time; by default the plain-torch operator is compiled whole.
    yardstick : (str, callable), optional
        A name and a call: the time that bars of ``"yardstick"`` are multiples of.
    bars : tuple of Bar
        What the best implementation has to reach.
    grad : bool
        Gradients are on.
    """

    operator: str
    size: Mapping[str, Any]
    call: Callable[[Callable], Any]
    inputs: tuple[Tensor, ...]
    moved: float
    operations: float
    dtype: str
    textbook: Call | None = None
    compiled: Callable[[Callable], Call] | None = None
    yardstick: tuple[str, Call] | None = None
    bars: tuple[Bar, ...] = field(default=())
    grad: bool = False

    @property
    def title(self) -> str:
        """The size in a word: ``B8 N2880 D4096 k320``."""
        return " ".join(f"{key}{value}" if len(key) < 4 else f"{key}={value}" for key, value in self.size.items())


class Maker:
    """Seeded inputs of one dtype on one device."""

    def __init__(self, dtype: str, device: torch.device) -> None:
        self.name, self.dtype, self.device = dtype, DTYPES[dtype], device
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.generator, device=self.device).to(self.dtype)

    def positive(self, *shape: int) -> Tensor:
        """fp32 numbers from 0.5 to 1.5, as scores are."""
        return torch.rand(*shape, generator=self.generator, device=self.device) + 0.5

    def picks(self, batch: int, n: int, k: int) -> Tensor:
        """k of n indices for every sample, ascending."""
        draws = torch.rand(batch, n, generator=self.generator, device=self.device)
        return draws.argsort(1)[:, :k].sort(1).values

    def slots(self, batch: int, n: int, n_out: int) -> Tensor:
        """A slot of n_out for each of n tokens; none is empty."""
        own = torch.arange(n_out, device=self.device).expand(batch, n_out)
        rest = torch.randint(n_out, (batch, n - n_out), generator=self.generator, device=self.device)
        order = torch.rand(batch, n, generator=self.generator, device=self.device).argsort(1)
        return torch.cat((own, rest), 1).gather(1, order)


def bytes_of(*values: Any) -> int:
    """Bytes of all tensors in some values."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(values) if isinstance(x, Tensor))
