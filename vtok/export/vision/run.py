"""Tiles that share count and budget, as they go through a dense tower."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels


@dataclass
class Run:
    """Tiles of equal length; R of them are rows of all pictures.

    Attributes:
        x: (R, prefix + n, D) the sequence.
        tokens: (R, n) original patch of each slot.
        prefix: prefix tokens.
        target: patches that must be left when the tower ends.
        projections: q, k, v (R, H, prefix + n, d) of the block that has just run.
        carry: (R, n) the method's running score.
        sizes: (R, n) original patches per slot, once merged.
        standing: (R, n) bool, where dropped patches still hold their slots.
        alike: ``tokens`` is the same for all pictures.
    """

    x: Tensor
    tokens: Tensor
    prefix: int
    target: int
    projections: tuple[Tensor, ...] | None = None
    carry: Tensor | None = None
    sizes: Tensor | None = None
    standing: Tensor | None = None
    alike: bool = True

    @property
    def count(self) -> int:
        """Slots of a tile."""
        return self.tokens.shape[1]

    @property
    def patches(self) -> Tensor:
        """(R, n, D) the sequence without prefix."""
        return self.x[:, self.prefix :]

    def take(self, index: Tensor, alike: bool) -> Run:
        """The patches at index (R, k) stay."""

        def chosen(x: Tensor | None) -> Tensor | None:
            return None if x is None else kernels.gather_tokens(x, index)

        def behind_prefix(x: Tensor) -> Tensor:
            return torch.cat((x[:, : self.prefix], kernels.gather_tokens(x[:, self.prefix :], index)), 1)

        projections = None
        if self.projections is not None:
            projections = tuple(behind_prefix(x.transpose(1, 2)).transpose(1, 2) for x in self.projections)
        return dataclasses.replace(
            self,
            x=behind_prefix(self.x),
            tokens=self.tokens.gather(1, index),
            projections=projections,
            carry=chosen(self.carry),
            sizes=chosen(self.sizes),
            standing=None,
            alike=self.alike and alike,
        )

    def rows(self, tiles: list[int], of: int, target: int) -> Run:
        """Some of every picture's ``of`` tiles."""

        def chosen(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unflatten(0, (-1, of))[:, tiles].flatten(0, 1)

        projections: Any = None if self.projections is None else tuple(chosen(x) for x in self.projections)
        found: dict[str, Any] = {
            name: chosen(getattr(self, name)) for name in ("x", "tokens", "carry", "sizes", "standing")
        }
        return dataclasses.replace(
            self,
            **found,
            projections=projections,
            target=target,
        )

    def key_bias(self, sized: bool) -> Tensor | None:
        """(R, 1, 1, prefix + n) added to attention logits: log sizes, and next to nothing for what has been dropped.

        Not minus infinity: a window or tile of nothing but dropped patches would give NaN.
        """
        bias = None
        if sized and self.sizes is not None:
            bias = self.sizes.float().clamp_min(1e-6).log()
        if self.standing is not None:
            gone = torch.where(self.standing, 0.0, torch.finfo(self.x.dtype).min / 2)
            bias = gone if bias is None else bias + gone
        if bias is None:
            return None
        front = torch.zeros_like(bias[:, :1]).expand(-1, self.prefix)
        return torch.cat((front, bias), 1)[:, None, None].to(self.x.dtype)
