"""Methods that only look: what a resampler is given, what it holds, and what a model's answer hangs on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.methods.flextok import FlexTok, layouts
from vtok.resampler.learn import Picture
from vtok.resampler.starts import Starts
from vtok.view import Selection, View


@dataclass(frozen=True)
class Capture(FlexTok):
    """Writes down what a resampler would be given, and leaves next to nothing of it for the language model."""

    seen: list[Picture] = field(default_factory=list, compare=False)

    def select(self, view: View, count: int) -> Selection:
        for rows, grids in layouts(view):
            for where, grid in grids:
                self.seen.extend((x.detach().float(), grid) for x in view.features[rows][:, where])
        return super().select(view, count)


@dataclass(frozen=True)
class Watch(FlexTok):
    """Writes down what the last register of each picture holds."""

    last: list[Tensor] = field(default_factory=list, compare=False)

    def _read(self, x: Tensor, grid: tuple[int, int], count: int) -> tuple[Tensor, Starts, Tensor | None]:
        found = super()._read(x, grid, count)
        assert found[2] is not None
        self.last.append(found[2][:, -1].detach())
        return found


@dataclass(frozen=True)
class Probe(FlexTok):
    """Keeps tokens at random, as they are, and can be asked for their gradients."""

    seen: list[tuple[View, Tensor, Tensor]] = field(default_factory=list, compare=False)

    def select(self, view: View, count: int) -> Selection:
        kept = torch.rand(view.features.shape[:2], device=view.features.device).argsort(1)[:, :count].sort(1).values
        tokens = kernels.gather_tokens(view.features, kept).detach().requires_grad_()
        self.seen.append((view, kept, tokens))
        return Selection(kept, tokens)

    def pictures(self, said: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(n, D) tokens of each picture in fp32, and of the same shape the gradients of ``said``, a number; NaN where
        tokens were not kept."""
        found: tuple[list[Tensor], list[Tensor]] = [], []
        gradients: Sequence[Tensor] = torch.autograd.grad(said, [tokens for _, _, tokens in self.seen])
        for (view, kept, _), gradient in zip(self.seen, gradients, strict=True):
            features = view.features.detach().float()
            whole = torch.full_like(features, torch.nan)
            whole.scatter_(1, kept[..., None].expand_as(gradient), gradient.float())
            for rows, grids in layouts(view):
                for where, _ in grids:
                    found[0].extend(features[rows][:, where])
                    found[1].extend(whole[rows][:, where])
        return found
