"""What every vision graph does behind its tower: the stages between tower and language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.errors import VtokError
from vtok.export.fixed import Budget, FixedPlan, data_dependent
from vtok.protocol import Medium
from vtok.view import Selection, Stage, TowerView, View


@dataclass
class Tokens:
    """Visual tokens of a batch of pictures as they stand.

    Attributes:
        features: (B, n, D).
        index: (B, n) original token in the picture, ascending.
        saliency: (B, length) of all original tokens, or ``None``.
        alike: ``index`` is the same for all pictures.
    """

    features: Tensor
    index: Tensor
    saliency: Tensor | None = None
    alike: bool = True


class Draws(nn.Module):
    """Random numbers that a method asks for: drawn once, then constants of the graph."""

    def of(self, view: View, seed: int) -> Tensor:
        """(n,) numbers of ``view.random(seed)`` for the first picture of a prompt."""
        name = f"seed_{seed}_{'input' if view.layer is None else view.layer}".replace("-", "minus_")
        if not hasattr(self, name):
            total = max(sum(part.length for part in view.parts), view.size)
            everything = torch.arange(total)[None]
            whole = View(everything[..., None], everything, view.parts, places=(0,), layer=view.layer)
            self.register_buffer(name, whole.random(seed)[0].to(view.tokens.device))
        return getattr(self, name)


@dataclass
class FixedView(View):
    """A view of pictures that are each the first of a prompt; the batch size is open."""

    draws: Any = None

    def random(self, seed: int) -> Tensor:
        own = self.draws.of(self, seed)
        return own.expand(self.tokens.shape[0], -1).gather(1, self.tokens.clamp_max(own.shape[0] - 1))


@dataclass
class FixedTowerView(TowerView):
    """As ``FixedView``, inside or right behind the tower."""

    draws: Any = None
    random = FixedView.random


class VisionGraph(nn.Module):
    """Pixels to kept visual tokens. Subclasses say what their tower does.

    Attributes:
        plan: what is fixed.
    """

    plan: FixedPlan

    def __init__(self, budget: Budget, medium: Medium, example: Mapping[str, Any]) -> None:
        super().__init__()
        self.budget, self.medium = budget, medium
        self.adapter, self.spec = budget.adapter, budget.adapter.tower
        self.draws = Draws()
        self.found: dict[Hashable, tuple[Tensor, Callable[[Tensor], Tensor] | None]] = {}
        learnt = [getattr(method, "resampler", None) for method in budget.methods]
        self.learnt = nn.ModuleList([module for module in learnt if isinstance(module, nn.Module)])
        self.chosen = list(zip(budget.input_stages, budget.input_counts(medium.length), strict=False))
        self.reads_saliency = self.spec.has_cls and any("saliency" in stage.reads for stage, _ in self.chosen)

    def fix(self, pixels: Tensor, layout: Mapping[str, tuple[int, ...]]) -> None:
        """Run once, which makes every constant, and write the plan down."""
        features, kept = self(pixels)
        self.plan = FixedPlan(
            family=self.adapter.family,
            method=self.budget.name,
            keep=self.budget.keep,
            tokens_in=self.medium.length,
            kept=kept.shape[1],
            width=features.shape[2],
            positions=self.budget.positions,
            layout=layout,
            pixel_shape=tuple(pixels.shape[1:]),
            left_out=self.budget.left_out,
        )

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels, by family, to features (B, k, D) and kept (B, k) int64."""
        with kernels.portable():
            tokens = self.encode(pixel_values)
            for stage, count in self.chosen:
                tokens = self._choose(stage, count, tokens)
        return tokens.features, tokens.index

    @abstractmethod
    def encode(self, pixel_values: Tensor) -> Tokens:
        """What the tower, its stages and the projector leave."""

    def _choose(self, stage: Stage, count: int, tokens: Tokens) -> Tokens:
        """A stage between tower and language model."""
        size = tokens.index.shape[1]
        if count >= self.medium.length or count >= size:
            return tokens
        assert stage.select is not None
        view = FixedView(
            features=tokens.features,
            tokens=tokens.index,
            parts=self.medium.parts,
            layer=stage.layer,
            base=self.medium.base,
            saliency=None if tokens.saliency is None else tokens.saliency.gather(1, tokens.index),
            draws=self.draws,
        )
        indices, features, alike = self.ask(stage, view, count, tokens.alike, "input")
        return Tokens(features, tokens.index.gather(1, indices), tokens.saliency, alike)

    def ask(self, stage: Stage, view: View, count: int, alike: bool, key: Hashable) -> tuple[Tensor, Tensor, bool]:
        """A stage's answer: positions (G, count) ascending, tokens (G, count, D) at them, and whether the positions are
        the same for all pictures.

        Args:
            stage: whose ``select`` is asked.
            view: tokens as they stand.
            count: how many shall stay.
            alike: the view's tokens are the same for all pictures.
            key: tells calls of one stage apart.

        Raises:
            VtokError: how many tokens it keeps depends on the picture.
        """
        place, unit = (id(stage), key), getattr(view, "unit", 1)
        if alike and place not in self.found:
            owner = self.budget.owner(stage)
            fixed = owner.fixed(view, count) if stage.select == owner.select else None
            if fixed is not None:
                self.found[place] = fixed
        if place in self.found:
            own, pour = self.found[place]
            indices = own.expand(view.tokens.shape[0], -1)
            features = gather_cells(view.features, indices, unit) if pour is None else pour(view.features)
            return indices, features.to(view.features.dtype), True
        assert stage.select is not None
        chosen = checked(stage.select(view, count), self.budget.name)
        made = chosen.features
        if made is None:
            made = gather_cells(view.features, chosen.indices, unit)
        return chosen.indices, made.to(view.features.dtype), False


def gather_cells(x: Tensor, index: Tensor, unit: int = 1) -> Tensor:
    """(B, n * unit, D) rows of the cells at index (B, k): (B, k * unit, D)."""
    if unit == 1:
        return kernels.gather_tokens(x, index)
    return kernels.gather_tokens(x.unflatten(1, (-1, unit)), index).flatten(1, 2)


def checked(answer: Tensor | Selection, name: str) -> Selection:
    """A method's answer as a selection of a fixed length.

    Raises:
        VtokError: how many tokens it keeps depends on the picture.
    """
    if isinstance(answer, Selection):
        if answer.counts is not None or answer.front:
            raise VtokError(
                f"{name} lays out its tokens picture by picture, which a graph of fixed shapes cannot hold; leave "
                "compat= and auto= out, or export to hf"
            )
        return answer
    if answer.dtype == torch.bool:
        raise data_dependent(name)
    return Selection(answer)
