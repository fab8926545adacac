"""Transformer parts that encoder, decoders and resampler share (FlexTok, arXiv 2502.13967, appendix on architecture).

Norms come first, have neither gain nor bias and run in fp32; queries and keys are normalised; linear layers of a block
have no bias; feed-forwards are SwiGLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.LayerNorm):
    """LayerNorm over ``width`` channels in fp32, without gain or bias."""

    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys.

    Logits are scaled by 8 / head_dim, muP's rule (arXiv 2203.03466), which is 1 / sqrt(head_dim) at 64.

    Args:
        width: channels.
        head_dim: channels of a head; divides ``width``.
        context_width: channels of what keys and values are read from, if other.
    """

    def __init__(self, width: int, head_dim: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads, self.scale = width // head_dim, 8.0 / head_dim
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context_width or width, width, bias=False)
        self.v = nn.Linear(context_width or width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = Norm(head_dim)

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """(B, N, width) from queries x (B, N, width) and context (B, M, context_width), x where none is given.

        Args:
            x: queries.
            context: keys and values.
            mask: broadcast to (B, heads, N, M): bool, True where attention is allowed, or added to the logits.
            causal: row n sees columns up to n; not with a mask.
        """
        context = x if context is None else context
        q, k, v = (self._split(linear(y)) for linear, y in ((self.q, x), (self.k, context), (self.v, context)))
        q, k = self.norm(q), self.norm(k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
        return self.out(y.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) with two thirds of 4 x width hidden channels (arXiv 2002.05202)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 * 4 * width / 3)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Self-attention, optional cross-attention, SwiGLU: pre-norm, residual.

    Args:
        width: channels.
        head_dim: channels of a head.
        context_width: channels of a context to attend to between the two, ``None`` for no cross-attention.
        kinds: kinds of rows that the condition modulates apart, 0 for a block without condition. With it the block is
            adaLN-zero (arXiv 2212.09748): gates start at 0, so it starts as the identity.
    """

    def __init__(self, width: int, head_dim: int, context_width: int | None = None, kinds: int = 0) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = Norm(width), Norm(width)
        self.attention = Attention(width, head_dim)
        self.mlp = SwiGLU(width)
        self.kinds = kinds
        if context_width is not None:
            self.norm_cross, self.norm_context = Norm(width), Norm(context_width)
            self.cross = Attention(width, head_dim, context_width)
        if kinds:
            self.modulation = nn.Linear(width, kinds * 6 * width)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        condition: Tensor | None = None,
        kind: Tensor | None = None,
    ) -> Tensor:
        """(B, N, width) from x (B, N, width).

        Args:
            x: rows.
            context: (B, M, context_width), for a block with cross-attention.
            mask: of the self-attention, as in ``Attention``.
            causal: of the self-attention.
            condition: (B, width), for a block with kinds.
            kind: (N,) the kind of each row.
        """
        if self.kinds:
            assert condition is not None and kind is not None
            terms = self.modulation(F.silu(condition)).unflatten(-1, (self.kinds, -1))[:, kind]
            gate_a, gate_m, shift_a, scale_a, shift_m, scale_m = terms.chunk(6, -1)
            x = x + gate_a * self.attention(modulated(self.norm_attention(x), shift_a, scale_a), mask=mask)
            return x + gate_m * self.mlp(modulated(self.norm_mlp(x), shift_m, scale_m))
        x = x + self.attention(self.norm_attention(x), mask=mask, causal=causal)
        if context is not None:
            x = x + self.cross(self.norm_cross(x), self.norm_context(context))
        return x + self.mlp(self.norm_mlp(x))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def sincos2d(points: Tensor, width: int, temperature: float = 10000.0) -> Tensor:
    """(..., width) embeddings of points (..., 2) ``y x``: sine and cosine of y, then of x (MoCo v3, arXiv 2104.02057).

    Points count in patches, the first patch's centre at 0.

    Args:
        points: float positions.
        width: a multiple of 4.
        temperature: of the slowest wave.
    """
    rate = temperature ** -(torch.arange(width // 4, dtype=torch.float32, device=points.device) / (width // 4))
    angle = points.float()[..., None] * rate
    y, x = angle.unbind(-2)
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], -1)


def grid_points(rows: int, columns: int) -> Tensor:
    """(rows * columns, 2) positions ``y x`` of a grid's cells in raster order, fp32."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([y, x], -1).flatten(0, 1).float()


def initialise(module: nn.Module) -> None:
    """Xavier weights, zero biases, and nothing but zeros where a condition modulates."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if name.endswith("modulation"):
                nn.init.zeros_(part.weight)
            else:
                nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
