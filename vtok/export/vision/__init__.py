"""The compressed vision side as a module of static shapes: pixels in, kept visual tokens out.

    from vtok.export.vision import vision_graph

    model = vtok.compress(model, "divprune", keep=64)
    graph = vision_graph(model, processor_output_of_one_picture)
    features, kept = graph(pixel_values)

``features`` (B, k, D) are what the language model is given instead of the picture's placeholders, in order; ``kept``
(B, k) int64 are their original token indices in the picture, ascending. ``pixel_values``, by family (``graph.plan``
is a ``FixedPlan`` and says the shape without B in ``pixel_shape``):

- ``llava``: (B, 3, H, W);
- ``llava_next``: (B, tiles, 3, H, W), thumbnail first, all pictures of the example's ``image_sizes``;
- ``qwen2_5_vl``, ``qwen2_vl``: (B, N, patch_dim), all pictures of the example's ``image_grid_thw``.

B is open, everything else is fixed by the example. The module runs as it is, through ``torch.export.export`` (not
strict) and from there through ``torch.onnx.export``; it switches the operators to their portable forms itself. It
shares the model's weights and needs neither its hooks nor ``vtok.restore``. Trace it with at least two pictures, so
that the batch is not taken for a constant. Random draws are those of the first picture of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from vtok.api import session_of
from vtok.export.fixed import FAMILIES, Budget, FixedPlan, only_picture
from vtok.export.vision.dense import DenseGraph
from vtok.export.vision.graph import VisionGraph
from vtok.export.vision.packed import PackedGraph
from vtok.export.vision.tiles import TiledGraph

__all__ = ["FAMILIES", "FixedPlan", "VisionGraph", "vision_graph"]


@torch.no_grad()
def vision_graph(model: nn.Module, example: Mapping[str, Any], *, fixed: bool = False) -> VisionGraph:
    """The vision side of a compressed model for pictures of one layout.

    Parameters
    ----------
    model : nn.Module
        Under ``vtok.compress``.
    example : mapping
        What the model's processor makes of one picture: ``pixel_values`` and, where the family has them,
        ``image_sizes`` or ``image_grid_thw``. Other entries are not looked at.
    fixed : bool
        Leave stages inside the decoder out (second stages of todre and flowcut); ``plan.left_out`` says so.

    Returns
    -------
    VisionGraph
        In eval mode, on the model's device.

    Raises
    ------
    VtokError
        The family or the method cannot be exported, or the example is not one picture.
    """
    session = session_of(model)
    budget = Budget(session, fixed)
    medium = only_picture(session, example)
    kinds: dict[str, Any] = {
        "llava": DenseGraph,
        "llava_next": TiledGraph,
        "qwen2_vl": PackedGraph,
        "qwen2_5_vl": PackedGraph,
    }
    return kinds[session.adapter.family](budget, medium, example).eval()
