"""The speed ceiling of a method: the same cuts at the same places, made at random and for free.

No method can be faster than dropping the same number of tokens before the same layers without looking at them. The
share of that ceiling says how much of a method's possible speed its own scoring and merging leave.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.engine.towers import merge_goal
from vtok.method import Method, get
from vtok.view import Fusion, Selection, Shape, Stage

Log = dict[int, list[list[int]]]
"""Stage -> for each of its calls in one prefill, how many tokens of each span were left."""


def watched(method: Method, log: Log) -> Method:
    """The method itself, noting in ``log`` how many tokens each of its cuts leaves."""

    def stages(shape: Shape) -> tuple[Stage, ...]:
        return tuple(
            stage if stage.select is None else dataclasses.replace(stage, select=_noting(stage.select, log, i))
            for i, stage in enumerate(method.stages(shape))
        )

    return _with_stages(method, stages)


def same_cuts(method: Method, shape: Shape, log: Log) -> Method:
    """Random cuts before the same layers that leave as many tokens as ``log`` says, from one prefill of the method.

    Nothing is recorded, scored or observed. A merge in the middle of a block becomes a merge into random partners; one
    in front of a block becomes a cut there.
    """
    own = method.stages(shape)
    fusions = [stage for stage in own if stage.fuse is not None]
    compat = bool(getattr(method, "compat", False))
    built = []
    for i, stage in enumerate(own):
        bare = dataclasses.replace(stage, reads=frozenset(), observe=None, observed=())
        if stage.fuse is None:
            built.append(dataclasses.replace(bare, select=_replay(log.get(i, []))))
        elif stage.fuse.where == "middle":
            fuse = Fusion(_random_partners({}), "middle", proportional=False)
            built.append(dataclasses.replace(bare, fuse=fuse))
        else:
            later = sum(1 for other in fusions if (other.layer or 0) >= (stage.layer or 0))
            built.append(dataclasses.replace(bare, fuse=None, select=_thin(later, compat)))
    return _with_stages(method, lambda shape: tuple(built))


def at_input() -> Method:
    """Random pruning between tower and decoder, down to the budget."""
    draws: dict[tuple, Tensor] = {}

    def select(view: Any, count: int) -> Tensor:
        return _draw(draws, view, [count] * view.features.shape[0])

    return _with_stages(get("random"), lambda shape: (Stage("input", select=select),))


def _with_stages(method: Method, stages: Callable[[Shape], Sequence[Stage]]) -> Method:
    """A copy whose stages are others; site, newline rule and compat stay, as the engine reads them from the method."""
    clone = copy.copy(method)
    object.__setattr__(clone, "stages", stages)
    return clone


def _noting(select: Callable[[Any, int], Any], log: Log, stage: int) -> Callable[[Any, int], Any]:
    calls = log.setdefault(stage, [])

    def noted(view: Any, count: int) -> Any:
        answer = select(view, count)
        indices = answer.indices if isinstance(answer, Selection) else answer
        rows, width = indices.shape
        calls.append(indices.sum(1).tolist() if indices.dtype == torch.bool else [width] * rows)
        return answer

    return noted


def _replay(calls: list[list[int]]) -> Callable[[Any, int], Tensor]:
    """Answer call after call with the noted sizes, prefill after prefill."""
    draws: dict[tuple, Tensor] = {}
    turn = 0

    def select(view: Any, count: int) -> Tensor:
        nonlocal turn
        sizes = calls[turn % len(calls)]
        turn += 1
        return _draw(draws, view, sizes)

    return select


def _thin(later: int, compat: bool) -> Callable[[Any, int], Tensor]:
    draws: dict[tuple, Tensor] = {}

    def select(view: Any, target: int) -> Tensor:
        cells = view.tokens.shape[1]
        return _draw(draws, view, [merge_goal(cells, target, later, compat)] * view.tokens.shape[0])

    return select


def _draw(draws: dict[tuple, Tensor], view: Any, sizes: Sequence[int]) -> Tensor:
    """Random tokens of every span: indices, or a mask where the spans are left with different numbers.

    Drawn once and kept on the device: after the warm-up a selection costs nothing.
    """
    total, device = view.tokens.shape[1], view.features.device
    key = (total, tuple(sizes), device)
    if key not in draws:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randperm(total, generator=generator)[:size].sort().values for size in sizes]
        if len(set(sizes)) == 1:
            draws[key] = torch.stack(rows).to(device)
        else:
            masks = torch.zeros(len(rows), total, dtype=torch.bool)
            for mask, row in zip(masks, rows, strict=True):
                mask[row] = True
            draws[key] = masks.to(device)
    return draws[key]


def _random_partners(plans: dict[tuple, kernels.MergePlan]) -> Callable[[Any, int], kernels.MergePlan]:
    """A merge plan without matching: ``r`` random cells pour into random others, prefix tokens stay."""

    def match(view: Any, r: int) -> kernels.MergePlan:
        groups, cells = view.tokens.shape
        device = view.features.device
        key = (groups, cells, r, device)
        if key not in plans:
            prefix = view.prefix
            generator = torch.Generator().manual_seed(0)
            stays = torch.randperm(cells, generator=generator)[: cells - r].sort().values + prefix
            stays = torch.cat((torch.arange(prefix), stays))
            dst = torch.randint(prefix, len(stays), (prefix + cells,), generator=generator)
            dst[stays] = torch.arange(len(stays))
            on_device = [x.to(device).expand(groups, -1) for x in (dst, stays)]
            plans[key] = kernels.MergePlan(on_device[0], len(stays), on_device[1])
        return plans[key]

    return match
