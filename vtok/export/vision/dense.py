"""Dense towers (CLIP, SigLIP, DINOv2): one tile a picture here, several in ``tiles``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import vtok_kernels as kernels
from vtok.engine.dense_output import tile_parts
from vtok.engine.session import make_tower
from vtok.export.fixed import Budget, data_dependent
from vtok.export.vision import fusing
from vtok.export.vision.graph import FixedTowerView, Tokens, VisionGraph
from vtok.export.vision.run import Run
from vtok.protocol import Medium
from vtok.view import Selection, Stage


class DenseGraph(VisionGraph):
    """(B, 3, H, W) pixels through a tower of (B, prefix + N, D) tokens.

    Blocks are run by their parts, so that attention is one call that every exporter knows, whatever the model runs.
    """

    def __init__(self, budget: Budget, medium: Medium, example: Mapping[str, Any]) -> None:
        super().__init__(budget, medium, example)
        self.tower: Any = self.spec.root
        self.projector: Any = self.spec.projector
        goal = budget.tower_count(medium.length)
        # the engine's own, without hooks: it tells cuts, merges and budgets of tiles apart
        self.inside: Any = make_tower(budget) if budget.tower_stages and goal < medium.length else None
        self.sized = self.inside is not None and any(stage.fuse.proportional for stage in self.inside.fusions)
        pixels = example["pixel_values"]
        self.lay_out(example)
        self.fix(pixels, self.layout(pixels, example))

    # -- layout: what a family of tiles does otherwise -----------------------------------------------------------

    def layout(self, pixels: Tensor, example: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """What of the plan fixes a picture's layout."""
        return {"image_size": tuple(pixels.shape[-2:])}

    def lay_out(self, example: Mapping[str, Any]) -> None:
        """Constants of the layout."""
        self.target = self.budget.tower_count(self.medium.length)

    def tiles(self, pixel_values: Tensor) -> Tensor:
        """(R, 3, H, W) all tiles of all pictures."""
        return pixel_values

    def split(self, run: Run) -> list[Run]:
        """Tiles that share count and target, without what unpadding would drop."""
        run.target = self.target
        return [run]

    def gather(self, runs: Sequence[Run], features: Sequence[Tensor], saliency: Tensor | None) -> Tokens:
        """Tokens in the order of their placeholders, from runs (R, k) and their features (R, k, D)."""
        (run,), (own,) = runs, features
        index = run.tokens
        if self.spec.keeps_prefix:
            index = torch.arange(own.shape[1], device=own.device).expand(own.shape[0], -1)
        return Tokens(own, index, saliency, run.alike)

    # -- the tower -----------------------------------------------------------------------------------------------

    def encode(self, pixel_values: Tensor) -> Tokens:
        spec = self.spec
        x = self.embed(self.tiles(pixel_values))
        everything = torch.arange(x.shape[1] - spec.prefix, device=x.device).expand(x.shape[0], -1)
        runs, split = [Run(x, everything, spec.prefix, everything.shape[1])], False
        for number in range(spec.feature_layer + 1):
            if self.inside is not None:
                runs, split = self._before(number, runs, split)
            runs = [self._block(number, run) for run in runs]
        saliency = self._saliency(runs[0]) if self.reads_saliency else None
        if self.inside is not None and not split:
            runs = self.split(runs[0])
        if any(run.standing is not None for run in runs):
            raise data_dependent(self.budget.name)
        if self.inside is None or not self.inside.final:
            features = [run.x if spec.keeps_prefix else run.patches for run in runs]
        else:
            ends = [self._end(run, key) for key, run in enumerate(runs)]
            runs, features = [run for run, _ in ends], [own for _, own in ends]
        return self.gather(runs, [self.projector(own) for own in features], saliency)

    def embed(self, tiles: Tensor) -> Tensor:
        """(R, prefix + N, D) what enters the first block."""
        x = self.tower.embeddings(tiles)
        before = getattr(self.tower, "pre_layrnorm", None)
        return x if before is None else before(x)

    def _block(self, number: int, run: Run) -> Run:
        block, blocks = self.spec.layers[number], self.spec.blocks
        for stage in self.inside.fusions if self.inside is not None else ():
            if stage.layer == number and (run.count > run.target or run.sizes is not None):
                return fusing.block(self, stage, number, run)
        run.x = run.x + self.attend(number, run)
        run.x = run.x + blocks.feed(block, run.x)
        return run

    def attend(self, number: int, run: Run) -> Tensor:
        """The attention branch of block ``number``; leaves the projections with the run."""
        block, blocks = self.spec.layers[number], self.spec.blocks
        run.projections = q, k, v = blocks.project(block, run.x)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=run.key_bias(self.sized), scale=blocks.scale(block))
        return blocks.output(block, heads)

    def _saliency(self, run: Run) -> Tensor:
        """(R, N) attention of the class token at the last block of the tower."""
        spec, last = self.spec, len(self.spec.layers) - 1
        for number in range(spec.feature_layer + 1, last):
            run = self._block(number, Run(run.x, run.tokens, run.prefix, run.target))
        q, k, _ = run.projections or () if last <= spec.feature_layer else spec.blocks.project(spec.layers[last], run.x)
        rows = kernels.attention_rows(q[:, :, :1], k, scale=spec.blocks.scale(spec.layers[last]))
        return rows[:, 0, 0 if spec.keeps_prefix else spec.prefix :]

    # -- stages --------------------------------------------------------------------------------------------------

    def _before(self, number: int, runs: list[Run], split: bool) -> tuple[list[Run], bool]:
        """What the stages do before block ``number``."""
        inside = self.inside
        watched = inside.observe is not None and number <= inside.last_cut
        if watched and number - 1 in inside.observed(inside.last_cut):
            runs = [self._observe(number, run) for run in runs]
        if number == inside.first and not split:
            (whole,) = runs
            runs, split = self.split(whole), True
        for stage in inside.cuts:
            if stage.layer == number:
                runs = [self._cut(stage, number, run, key) for key, run in enumerate(runs)]
        return runs, split

    def _observe(self, number: int, run: Run) -> Run:
        score = self.inside.observe(self.view(number, run))
        run.carry = score if run.standing is None else torch.where(run.standing, score, 0.0)
        return run

    def _cut(self, stage: Stage, number: int, run: Run, key: int) -> Run:
        if run.count <= run.target:
            return run
        assert stage.select is not None
        view = self.view(number, run)
        if run.standing is not None and run.carry is not None:
            view.carry = torch.where(run.standing, run.carry, -torch.inf)
        answer = stage.select(view, run.target)
        if isinstance(answer, Selection):
            answer = answer.indices
        if answer.dtype == torch.bool:
            run.standing = answer if run.standing is None else answer & run.standing
            return run
        return run.take(answer, alike=False)

    def _end(self, run: Run, key: int) -> tuple[Run, Tensor]:
        """Stages on the tower's output: (run whose tokens stand, features (R, k, D))."""
        features = run.patches
        for stage in self.inside.final:
            if run.count > run.target:
                view = self.view(self.spec.feature_layer + 1, run)
                view.features, view.parts = features, tile_parts(self.adapter.tile_length("image"))
                view.prefix_features = run.x[:, : run.prefix]
                indices, features, alike = self.ask(stage, view, run.target, run.alike, key)
                run = run.take(indices, alike)
        return run, features

    def view(self, number: int, run: Run, prefix: bool = False) -> FixedTowerView:
        """What methods see before block ``number``; merges look at the prefix tokens, too."""
        spec = self.spec
        q, k, v = run.projections or (None, None, None)
        return FixedTowerView(
            features=run.x if prefix else run.patches,
            tokens=run.tokens,
            layer=number,
            q=q,
            k=k,
            v=v,
            prefix=spec.prefix,
            has_cls=spec.has_cls,
            scale=spec.blocks.scale(spec.layers[max(number - 1, 0)]),
            carry=run.carry,
            sizes=run.sizes,
            target=run.target,
            standing=run.standing,
            draws=self.draws,
        )
