"""OrderedResampler: k ordered visual tokens of a picture, and what was learnt about it.

After FlexTok (arXiv 2502.13967): registers that are causal among themselves, so that the first k of K tokens are what
a run with k gives. Unlike FlexTok's, a register is anchored: it starts as the average over its box of the picture, or
as one of its tokens (``vtok.resampler.starts``), and the output is that plus a correction whose last matrix starts at
zero. Untrained it is multi-scale average pooling (arXiv 2405.17430) or a diverse subset, trained it is that and more.
Cross-attention has keys made of content and position; with keys of position alone (arXiv 2405.19315) it would be one
fixed pooling for all pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import VtokError
from vtok.resampler.agreement import AgreementHead, enough
from vtok.resampler.config import ResamplerConfig
from vtok.resampler.saliency import SaliencyHead, weights
from vtok.resampler.starts import PICKED, SALIENT, Starts, averaged, cells, farthest, levels
from vtok.tokenizers import anchors
from vtok.tokenizers.blocks import Block, initialise, sincos2d


@dataclass(frozen=True)
class Read:
    """What a resampler makes of B pictures of one grid.

    Attributes:
        tokens: (B, k, D) in order.
        registers: (B, k, width) what the blocks hold behind the last of them.
        starts: what the tokens started as, and where they stand.
    """

    tokens: Tensor
    registers: Tensor
    starts: Starts


class OrderedResampler(nn.Module):
    """Visual tokens of a picture to fewer, in an order from coarse to fine.

    Args:
        config: its sizes.

    Attributes:
        boxes: (K, 4) anchors, ``None`` where tokens are picked.
        mean, spread: (D,) of the visual tokens' channels, by ``measure``.
    """

    boxes: Tensor | None
    level: Tensor
    mean: Tensor
    spread: Tensor

    def __init__(self, config: ResamplerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        boxes = None if config.scheme in PICKED else anchors.boxes(config.tokens, config.scheme)
        self.register_buffer("boxes", boxes, persistent=False)
        level = levels(config.tokens, config.scheme)
        self.register_buffer("level", level, persistent=False)
        # a few of a tower's channels may be a hundred times the others, and a norm would see nothing else
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("spread", torch.ones(config.dim))
        self.norm_in = nn.LayerNorm(config.dim)
        self.enter = nn.Linear(config.dim, width, bias=False)
        self.levels = nn.Embedding(int(level.max()) + 1, width)
        self.registers = nn.Parameter(torch.empty(config.tokens, width))
        self.blocks = nn.ModuleList([Block(width, config.head_dim, width) for _ in range(config.blocks)])
        self.norm_out = nn.LayerNorm(width)
        self.leave = nn.Linear(width, config.dim, bias=False)
        initialise(self)
        nn.init.normal_(self.levels.weight, std=0.02)
        nn.init.trunc_normal_(self.registers, std=0.02)
        nn.init.zeros_(self.leave.weight)
        if config.scheme == SALIENT:
            self.saliency = SaliencyHead(config.dim)
        if config.halting:
            self.halting = AgreementHead(width)

    def forward(self, x: Tensor, grid: tuple[int, int], k: int | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, k, D) tokens of x (B, N, D), in their order; at most N where the scheme picks tokens.

        Args:
            x: visual tokens in raster order.
            grid: (rows, columns) of them.
            k: how many; K where ``None``.
            mask: (B, N) bool, False on cells that show nothing.

        Raises:
            VtokError: k that is not in 1..K, or tokens that do not fill the grid or have other channels.
        """
        return self.read(x, grid, k, mask).tokens

    def read(self, x: Tensor, grid: tuple[int, int], k: int | None = None, mask: Tensor | None = None) -> Read:
        """Tokens as ``forward`` gives them, with their places and what the registers hold."""
        k = self._checked(x, grid, k)
        first = self.starts(x, grid, k, mask)
        k = first.tokens.shape[1]
        where = sincos2d(cells(*grid, x.device), self.config.width).to(x.dtype)
        middles = sincos2d(first.middles, self.config.width).to(x.dtype)
        context = self._entered(x) + where
        h = self._entered(first.tokens) + middles + self.levels(self.level[:k]) + self.registers[:k]
        seen = None if mask is None else mask[:, None, None, :]
        for block in self.blocks:
            h = _through(block, h, context, seen)
        h = self.norm_out(h)
        return Read(first.tokens + self.spread * self.leave(h), h, first)

    def _entered(self, x: Tensor) -> Tensor:
        return self.enter(self.norm_in(self.standard(x)))

    def standard(self, x: Tensor) -> Tensor:
        """Every channel less its mean, by its spread."""
        return (x - self.mean) / self.spread

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Take each channel's mean and spread from visual tokens (..., D), before training."""
        flat = x.float().flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.spread.copy_(flat.std(0).clamp_min(1e-3 * float(flat.std(0).mean()) + 1e-12))

    def starts(self, x: Tensor, grid: tuple[int, int], k: int, mask: Tensor | None = None) -> Starts:
        """The first k tokens without what was learnt: what an untrained resampler gives."""
        if self.boxes is None:
            return farthest(x, grid, k, mask, self._weights(x, mask))
        return averaged(x, grid, self.boxes[:k], mask)

    @torch.no_grad()
    def _weights(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """What the picks weigh: they have no gradient."""
        if self.config.scheme != SALIENT:
            return None
        with torch.autocast(x.device.type, enabled=False):  # rounded, they would pick others
            return weights(self.saliency(self.standard(x.to(self.spread.dtype))), mask)

    def enough(self, registers: Tensor, quality: float) -> Tensor:
        """(B,) how many tokens pictures need whose registers (B, k, width) ``read`` gave: at most k.

        Args:
            registers: what ``read`` gave.
            quality: probability, in (0, 1), that the model says what it says with all of the picture's tokens.
        """
        if not self.config.halting:
            raise VtokError("this resampler has no halting head; distil it with --halting, or choose k yourself")
        return enough(self.halting(registers), quality)

    def _checked(self, x: Tensor, grid: tuple[int, int], k: int | None) -> int:
        most = self.config.tokens
        if k is None:
            k = most
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
            raise VtokError(f"k={k!r} tokens are not to be had: this resampler gives 1 to {most} of a picture")
        if x.ndim != 3 or x.shape[1] != grid[0] * grid[1]:
            raise VtokError(
                f"visual tokens of shape {tuple(x.shape)} do not fill a grid of {grid[0]} x {grid[1]}; give (B, rows * "
                "columns, D) in raster order"
            )
        if x.shape[2] != self.config.dim:
            raise VtokError(
                f"this resampler is for visual tokens of {self.config.dim} channels, and these have {x.shape[2]}: its "
                "weights belong to another model"
            )
        return k


def _through(block: Any, h: Tensor, context: Tensor, seen: Tensor | None) -> Tensor:
    """A block whose cross-attention leaves masked cells out; ``seen`` (B, 1, 1, N) or ``None``."""
    h = h + block.attention(block.norm_attention(h), causal=True)
    h = h + block.cross(block.norm_cross(h), block.norm_context(context), mask=seen)
    return h + block.mlp(block.norm_mlp(h))
