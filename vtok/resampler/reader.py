"""Reads a picture's visual tokens back out of a prefix: the teacher of the stage of features, thrown away later."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtok.resampler.config import ResamplerConfig
from vtok.resampler.resampler import OrderedResampler, Read
from vtok.resampler.starts import cells
from vtok.tokenizers.blocks import Block, initialise, sincos2d


class FeatureReader(nn.Module):
    """One query a cell attends to the tokens of a prefix and says what stood there.

    Args:
        config: of the resampler that it reads.
        blocks: how many.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, config: ResamplerConfig, blocks: int = 2) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.register_buffer("mean", torch.zeros(config.dim))
        self.register_buffer("spread", torch.ones(config.dim))
        self.enter = nn.Linear(config.dim, width, bias=False)
        self.query = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList([Block(width, config.head_dim, width) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, config.dim)
        initialise(self)
        nn.init.normal_(self.leave.weight, std=0.02)  # starts near every channel's mean

    def forward(self, z: Tensor, middles: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, D) standardised tokens of a grid (rows, columns), from the first k tokens z (B, k, D) and their
        middles (B, k, 2) or (k, 2)."""
        width = self.config.width
        context = self.enter(self.standard(z)) + sincos2d(middles, width).to(z.dtype)
        places = sincos2d(cells(*grid, z.device), width).to(z.dtype)
        h = (places + self.query).expand(z.shape[0], -1, -1)
        for block in self.blocks:
            assert isinstance(block, Block)
            h = h + block.cross(block.norm_cross(h), block.norm_context(context))
            h = h + block.mlp(block.norm_mlp(h))
        return self.leave(self.norm(h))

    def loss(self, read: Read, k: int, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """How much of x (B, N, D) cannot be read from the first k tokens: the loss, and (B,) the explained share.

        The loss is 1 - cosine plus smooth L1 on standardised channels; the share is 1 - squared error over variance
        within the picture, 0 for a reader that only knows the picture's mean.
        """
        target = self.standard(x).float()
        found = self(read.tokens[:, :k], read.starts.middles[..., :k, :], grid).float()
        cosine = 1 - F.cosine_similarity(found, target, dim=-1).mean()
        wrong = (found - target).square().sum((1, 2))
        whole = (target - target.mean(1, keepdim=True)).square().sum((1, 2))
        return cosine + F.smooth_l1_loss(found, target), (1 - wrong / whole.clamp_min(1e-6)).detach()

    def standard(self, x: Tensor) -> Tensor:
        """Every channel less its mean, by its spread: the same for all pictures, so that plain ones stay plain."""
        return (x - self.mean) / self.spread

    @torch.no_grad()
    def measure(self, resampler: OrderedResampler) -> None:
        """Take over a resampler's mean and spread."""
        self.mean.copy_(resampler.mean)
        self.spread.copy_(resampler.spread)
