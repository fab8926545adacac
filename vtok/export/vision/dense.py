"""Dense towers of one tile (LLaVA-1.5 with CLIP, SigLIP or DINOv2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.export.fixed import Budget
from vtok.export.vision.graph import Tokens, VisionGraph
from vtok.protocol import Medium


class DenseGraph(VisionGraph):
    """(B, 3, H, W) pixels through a tower of (B, prefix + N, D) tokens."""

    def __init__(self, budget: Budget, medium: Medium, example: Mapping[str, Any]) -> None:
        super().__init__(budget, medium, example)
        self.tower, self.projector = self.spec.root, self.spec.projector
        pixels = example["pixel_values"]
        self.fix(pixels, {"image_size": tuple(pixels.shape[-2:])})

    def encode(self, pixel_values: Tensor) -> Tokens:
        spec, blocks = self.spec, self.spec.blocks
        x = self.embed(pixel_values)
        features, saliency = x, None
        last = len(spec.layers) - 1
        for number, block in enumerate(spec.layers):
            if number == last and self.reads_saliency:
                q, k, _ = blocks.project(block, x)
                rows = kernels.attention_rows(q[:, :, :1], k, scale=blocks.scale(block))
                saliency = rows[:, 0, 0 if spec.keeps_prefix else spec.prefix :]
            if number <= spec.feature_layer:
                x = x + blocks.attend(block, x, None, {})
                x = features = x + blocks.feed(block, x)
            elif self.reads_saliency and number < last:
                x = x + blocks.attend(block, x, None, {})
                x = x + blocks.feed(block, x)
        features = features if spec.keeps_prefix else features[:, spec.prefix :]
        features = self.projector(features)
        index = torch.arange(features.shape[1], device=x.device).expand(features.shape[0], -1)
        return Tokens(features, index, saliency)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, prefix + N, D) what enters the first block."""
        x = self.tower.embeddings(pixel_values)
        before = getattr(self.tower, "pre_layrnorm", None)
        return x if before is None else before(x)
