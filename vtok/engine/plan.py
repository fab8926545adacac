"""A plan: a chain of methods on one model, as stages and as tokens that each of them leaves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from vtok.budget import Counts, Profile, check_keep, solve
from vtok.errors import VtokError
from vtok.method import Method
from vtok.protocol import Adapter
from vtok.view import Shape, Stage


class Plan:
    """What acts where, and how many tokens it leaves.

    Args:
        adapter: the model's family.
        methods: the chain, in order of sites.
        keep: budget, or ``None`` where every method carries its own counts.
        positions: ``"keep"`` or ``"reindex"``.
    """

    def __init__(self, adapter: Adapter, methods: Sequence[Method], keep: int | float, positions: str) -> None:
        self.adapter = adapter
        self.methods = tuple(methods)
        self.keep = keep
        self.positions = positions
        self.shape = shape_of(adapter)
        self.stages = [stage for method in self.methods for stage in stages_of(method, self.shape)]
        self.decoder_stages = sorted((s for s in self.stages if s.site == "decoder"), key=lambda s: s.layer or 0)
        self.input_stages = [stage for stage in self.stages if stage.site == "input"]
        shares = accumulate((stage.share for stage in self.decoder_stages), min)  # no later cut brings tokens back
        self.profile = Profile(
            tuple(stage.layer or 0 for stage in self.decoder_stages),
            tuple(shares),
            min((stage.floor for stage in self.decoder_stages), default=1),
        )
        self.name = "+".join(method.name or type(method).__name__ for method in self.methods)

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.adapter.text.layers

    @property
    def depth(self) -> int:
        return self.shape.depth

    def counts(self, tokens: int) -> Counts:
        """The budget of an image of ``tokens`` tokens, split over the chain."""
        has_entry = any(method.site != "decoder" for method in self.methods)
        return solve(tokens, self.keep, max(self.depth, 1), self.profile, has_entry, self.methods[-1].name)

    def check_budget(self) -> None:
        """Refuse now what every prefill would refuse: a share no schedule reaches, or a count on pictures of one size.

        Raises:
            VtokError: names the smallest budget that can be reached.
        """
        fixed = self.adapter.tile_length("image") if self.adapter.family == "llava" else None
        if self.decoder_stages and (fixed is not None or isinstance(self.keep, float)):
            self.counts(fixed or 576)

    def entry_counts(self, tokens: int, entry: int) -> list[int]:
        """Tokens after each method before the decoder (tower methods first), narrowing in equal ratios."""
        before = [method for method in self.methods if method.site != "decoder"]
        if not before:
            return []
        ratio = entry / tokens
        return [max(entry, round(tokens * ratio ** ((i + 1) / len(before)))) for i in range(len(before))]

    @property
    def tower_methods(self) -> int:
        """How many methods of the chain act inside the vision tower of this family."""
        sites = [{stage.site for stage in stages_of(method, self.shape)} for method in self.methods]
        return sum("encoder" in own for own in sites)

    def tower_count(self, tokens: int) -> int:
        """Tokens of one image that the tower's methods must leave."""
        counts = self.entry_counts(tokens, self.counts(tokens).entry)
        inside = self.tower_methods
        return counts[inside - 1] if inside else tokens


def shape_of(adapter: Adapter) -> Shape:
    """What methods may know of the model behind an adapter."""
    tower = adapter.tower
    layers = adapter.text.layers if adapter.text is not None else ()
    return Shape(
        depth=len(layers),
        tower_depth=tower.feature_layer + 1,
        has_cls=tower.has_cls,
        packed=tower.packed,
        tiled=bool(getattr(adapter, "tiled", False)),
        family=adapter.family,
        full_layers=None if tower.full_layers is None else tuple(sorted(tower.full_layers)),
    )


def stages_of(method: Method, shape: Shape) -> Sequence[Stage]:
    """A method's stages on a model of this shape.

    Raises:
        VtokError: options that put a stage where the model has no layer, or that keep less than nothing.
    """
    stages = method.stages(shape)
    name = method.name or type(method).__name__
    for stage in stages:
        depth, first = (shape.depth, 1) if stage.site == "decoder" else (shape.tower_depth, 0)
        if stage.layer is not None and not first <= stage.layer < depth:
            raise VtokError(
                f"{name} would act at {stage.site} layer {stage.layer}, but this model's layers there go from "
                f"{first} to {depth - 1}; give it other layers"
            )
        if not 0 <= stage.share <= 1:
            raise VtokError(
                f"{name} would leave {stage.share:g} of the tokens, which is no share; give it one in [0, 1]"
            )
    return stages


def automatic(keep: Any, methods: Sequence[Method]) -> tuple[Any, tuple[Method, ...]]:
    """What ``keep="auto"`` means to a chain: the most tokens, and the methods as they then act. Any other budget is
    left alone.

    Raises:
        VtokError: no method of the chain decides how many tokens a picture needs.
    """
    if keep != "auto":
        return keep, tuple(methods)
    answers = [method.automatic() for method in methods]
    deciding = [answer for answer in answers if answer is not None]
    if not deciding:
        names = "+".join(method.name or type(method).__name__ for method in methods)
        raise VtokError(
            f'keep="auto" lets the method decide how many tokens a picture needs, which {names} cannot; give a number, '
            'or take "flextok" with trained weights'
        )
    chain = [method if answer is None else answer[0] for method, answer in zip(methods, answers, strict=True)]
    return deciding[0][1], tuple(chain)


def parse_keep(keep: int | float | None, methods: Sequence[Method]) -> int | float:
    """The budget that was asked for, checked."""
    if keep is None:
        name = methods[-1].name or "the method"
        raise VtokError(f"{name} needs a budget: pass keep=64 (visual tokens per image) or keep=0.25 (share of them)")
    return check_keep(keep)
