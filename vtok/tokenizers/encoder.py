"""The encoder: patches and registers in one transformer, registers causal among themselves (FlexTok section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vtok.tokenizers import anchors
from vtok.tokenizers.blocks import Block, Norm, grid_points, initialise, sincos2d
from vtok.tokenizers.config import TokenizerConfig


class Encoder(nn.Module):
    """Signal (B, C, S, S) -> registers (B, k, width).

    Patches see all patches and no register; register i sees all patches and the registers up to i. A run with k
    registers therefore equals the first k of a longer run. Unordered, all see all (TiTok).
    """

    positions: Tensor
    places: Tensor
    pooling: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        grid, width, slots = config.grid, config.width, config.tokens + config.padding
        self.patch = nn.Linear(config.channels * config.patch**2, width)
        self.registers = nn.Parameter(torch.empty(slots, width))
        self.blocks = nn.ModuleList(Block(width, config.head_dim) for _ in range(config.depth))
        self.norm = Norm(width)
        self.register_buffer("positions", sincos2d(grid_points(grid, grid), width))
        if config.anchors:
            boxes = slot_boxes(config)
            self.register_buffer("places", sincos2d(anchors.centres(boxes) * grid - 0.5, width), persistent=False)
            self.register_buffer("pooling", anchors.pooling(boxes, grid, grid), persistent=False)
        initialise(self)
        nn.init.trunc_normal_(self.registers, std=0.02)
        with torch.no_grad():  # ReTok: padding starts as copies of the last register
            self.registers[config.tokens :] = self.registers[config.tokens - 1]

    def forward(self, signal: Tensor, slots: int) -> Tensor:
        """Normalised registers (B, slots, width).

        Args:
            signal: (B, C, S, S).
            slots: registers that run, up to tokens + padding.
        """
        patches = self.patch(patchify(signal.to(self.patch.weight.dtype), self.config.patch))
        registers = self.registers[:slots].expand(len(signal), -1, -1)
        if self.config.anchors:
            registers = registers + self.pooling[:slots] @ patches + self.places[:slots]
        x = torch.cat([patches + self.positions, registers], 1)
        mask = self._mask(patches.shape[1], slots, x.device) if self.config.ordered else None
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x[:, patches.shape[1] :])

    @staticmethod
    def _mask(patches: int, slots: int, device: torch.device) -> Tensor:
        row = torch.arange(patches + slots, device=device)
        return (row[None] < patches) | (row[None] <= row[:, None])


def slot_boxes(config: TokenizerConfig) -> Tensor:
    """(tokens + padding, 4) boxes of the registers; padding stands where the last token does."""
    boxes = anchors.boxes(config.tokens, config.scheme)
    return torch.cat([boxes, boxes[-1:].expand(config.padding, -1)])


def patchify(x: Tensor, side: int) -> Tensor:
    """(B, N, side * side * C) patches of x (B, C, H, W) in raster order; inside a patch rows, columns, channels."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // side, side, w // side, side)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, side * side * c)


def unpatchify(x: Tensor, side: int, grid: int) -> Tensor:
    """(B, C, H, W) from square grids of patches (B, grid * grid, side * side * C)."""
    x = x.unflatten(1, (grid, grid)).unflatten(-1, (side, side, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
