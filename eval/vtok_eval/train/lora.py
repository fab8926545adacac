"""Low-rank adaptation (arXiv 2106.09685): a frozen linear layer and a trained product of two thin matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok_eval.models.delta import DOWN, UP

#: factor on the product; it moves into ``up`` when the change is saved
SCALE = 2.0


class Change(nn.Module):
    """``base + SCALE * x down' up'`` in the input's dtype; ``up`` starts at zero, so that nothing changes at first."""

    active = True

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        place = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=place))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=place))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        thin = F.linear(x, self.down.to(x.dtype)).flatten(0, -2)
        # added as it is multiplied: one pass over the output less
        return torch.addmm(base.flatten(0, -2), thin, (SCALE * self.up).to(x.dtype).T).view_as(base)


class Lora(nn.Module):
    """A linear layer, frozen, with a change beside it.

    Parameters
    ----------
    base : nn.Linear
        In any dtype; the change is kept in fp32.
    rank : int
        Of the change.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base, self.change = base.requires_grad_(False), Change(base, rank)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        return self.change(x, base) if self.change.active else base


def attach(root: nn.Module, pattern: str, rank: int) -> nn.ModuleList:
    """Put ``Lora`` in the place of every linear layer whose name matches; the changes, in the model's order."""
    linear = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    changes = nn.ModuleList()
    for name in linear:
        if re.search(pattern, name):
            parent, _, own = name.rpartition(".")
            owner = root.get_submodule(parent)
            layer = Lora(getattr(owner, own), rank)
            setattr(owner, own, layer)
            changes.append(layer.change)
    return changes


@contextmanager
def without(changes: nn.ModuleList) -> Iterator[None]:
    """The frozen model as it was."""
    own = [change for change in changes if isinstance(change, Change)]
    for change in own:
        change.active = False
    try:
        yield
    finally:
        for change in own:
            change.active = True


def pairs(root: nn.Module) -> Iterator[tuple[str, Change]]:
    """The change of every ``Lora`` with the name of the layer it belongs to."""
    for name, module in root.named_modules():
        if isinstance(module, Lora):
            yield name, module.change


def delta(root: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The trained matrices as ``vtok_eval.models.delta.merge`` takes them."""
    found = {}
    for name, change in pairs(root):
        found[name + DOWN] = change.down.detach().to("cpu", dtype).contiguous()
        found[name + UP] = (SCALE * change.up.detach()).to("cpu", dtype).contiguous()
    return found
