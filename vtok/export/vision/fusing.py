"""Merging inside the blocks of a dense tower, at lengths that are known beforehand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.engine.towers import merge_goal, received
from vtok.export.vision.run import Run
from vtok.view import Stage


def block(graph: Any, stage: Stage, number: int, run: Run) -> Run:
    """Block ``number`` with its merge, on tiles of a ``DenseGraph``."""
    spec, fuse = graph.spec, stage.fuse
    layer, blocks = spec.layers[number], spec.blocks
    assert fuse is not None
    if fuse.where == "middle":
        run.x = run.x + graph.attend(number, run)
        run, *_ = _merge(graph, stage, number, run, None)
        run.x = run.x + blocks.feed(layer, run.x)
        return run
    bias = run.key_bias(graph.sized)
    run.projections = q, k, _ = blocks.project(layer, run.x)
    mass = received(q, k, blocks.scale(layer), None if bias is None else bias[:, 0, 0])
    run, plan, weights = _merge(graph, stage, number, run, mass)
    if fuse.reuse_attention:
        values = blocks.values(layer, run.x)
        heads = kernels.reuse_attention(plan, q, k, values, scale=blocks.scale(layer), weights=weights, bias=bias)
        run.x = run.x + blocks.output(layer, heads)
    else:
        run.x = run.x + graph.attend(number, run)
    run.x = run.x + blocks.feed(layer, run.x)
    return run


def _merge(
    graph: Any, stage: Stage, number: int, run: Run, mass: Tensor | None
) -> tuple[Run, kernels.MergePlan, Tensor]:
    """The run after one merge, its plan and the weights of its means."""
    fuse, prefix = stage.fuse, run.prefix
    assert fuse is not None
    later = sum((other.layer or 0) >= number for other in graph.inside.fusions)
    if run.sizes is None:
        run.sizes = torch.ones_like(run.tokens, dtype=torch.float32)
    view = graph.view(number, run, prefix=True)
    # matching looks at the tokens with their prefix, and at attention where the merge comes before it
    view.received, view.scale = mass, graph.spec.blocks.scale(graph.spec.layers[number])
    goal = merge_goal(run.count, run.target, later, graph.inside.compat)
    plan = fuse.match(view, max(0, run.count - goal))
    if later == 1 and plan.n_out - prefix > run.target:
        raise graph.inside.unreachable(run.target, graph.adapter.tile_length("image"))
    sizes = torch.cat((torch.ones_like(run.sizes[:, :1]).expand(-1, prefix), run.sizes), 1)
    weights = sizes if fuse.weights is None else fuse.weights(view)
    (merged,), (summed,) = plan.pour([run.x], [sizes], weights.to(run.x.dtype))
    keeper = plan.representative[:, prefix:] - prefix
    after = Run(merged, run.tokens.gather(1, keeper), prefix, run.target, sizes=summed[:, prefix:], alike=False)
    return after, plan, weights
