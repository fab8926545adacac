"""How to speak to the vision transformer blocks of transformers, timm, open_clip and the Qwen towers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H * d) to (B, H, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(B, H, N, d) to (B, N, H * d)."""
    return x.transpose(1, 2).flatten(2)


class ClipBlocks:
    """CLIP and SigLIP layers of transformers."""

    def attention(self, block: Any) -> Any:
        return block.self_attn

    def norm1(self, block: Any) -> Any:
        return block.layer_norm1

    def heads(self, block: Any) -> int:
        return self.attention(block).num_heads

    def taps(self, block: Any) -> Sequence[nn.Module]:
        module = self.attention(block)
        return (module.q_proj, module.k_proj, module.v_proj)

    def split(self, block: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(x, self.heads(block)) for x in outputs)
        return q, k, v

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.norm1(block)(x)
        return self.split(block, [tap(x) for tap in self.taps(block)])

    def values(self, block: Any, x: Tensor) -> Tensor:
        return split_heads(self.taps(block)[2](self.norm1(block)(x)), self.heads(block))

    def attend(self, block: Any, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        return block.self_attn(hidden_states=block.layer_norm1(x), attention_mask=bias)[0]

    def output(self, block: Any, heads: Tensor) -> Tensor:
        return block.self_attn.out_proj(join_heads(heads))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.mlp(block.layer_norm2(x))

    def scale(self, block: Any) -> float:
        return float(self.attention(block).scale)

    def with_mask(self, x: Tensor, mask: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        """The block's arguments with other tokens and, where given, another mask."""
        if mask is None:
            return (x, *args[1:]), kwargs
        if len(args) > 1:
            return (x, mask, *args[2:]), kwargs
        return (x,), {**kwargs, "attention_mask": mask}


class Dinov2Blocks(ClipBlocks):
    """DINOv2 layers of transformers: layer scale and stochastic depth around both branches."""

    def attention(self, block: Any) -> Any:
        return block.attention

    def norm1(self, block: Any) -> Any:
        return block.norm1

    def heads(self, block: Any) -> int:
        return block.attention.num_attention_heads

    def attend(self, block: Any, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        out = block.attention(block.norm1(x), attention_mask=bias)[0]
        return block.drop_path(block.layer_scale1(out))

    def output(self, block: Any, heads: Tensor) -> Tensor:
        return block.drop_path(block.layer_scale1(block.attention.o_proj(join_heads(heads))))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))

    def scale(self, block: Any) -> float:
        return float(block.attention.scaling)


class TimmBlocks:
    """``Block`` of timm's vision transformer: fused qkv, optional head norms, layer scale, stochastic depth."""

    def taps(self, block: Any) -> Sequence[nn.Module]:
        return (block.attn.qkv,)

    def split(self, block: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        fused = outputs[0].unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = (fused[:, :, i].transpose(1, 2) for i in range(3))
        return block.attn.q_norm(q), block.attn.k_norm(k), v

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(block, [block.attn.qkv(block.norm1(x))])

    def values(self, block: Any, x: Tensor) -> Tensor:
        return self.project(block, x)[2]  # the projection is one module, which may be quantised

    def attend(self, block: Any, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        return block.drop_path1(block.ls1(block.attn(block.norm1(x), attn_mask=bias)))

    def output(self, block: Any, heads: Tensor) -> Tensor:
        out = block.attn.proj_drop(block.attn.proj(block.attn.norm(join_heads(heads))))
        return block.drop_path1(block.ls1(out))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def scale(self, block: Any) -> float:
        return float(block.attn.scale)

    def with_mask(self, x: Tensor, mask: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        return (x, *args[1:]), kwargs if mask is None else {**kwargs, "attn_mask": mask}


class OpenClipBlocks:
    """``ResidualAttentionBlock`` of open_clip: ``nn.MultiheadAttention``, whose projections no hook can see."""

    def taps(self, block: Any) -> Sequence[nn.Module]:
        return ()

    def split(self, block: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(x, block.attn.num_heads) for x in outputs)
        return q, k, v

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fused = F.linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)
        return self.split(block, fused.chunk(3, dim=-1))

    def values(self, block: Any, x: Tensor) -> Tensor:
        weight, bias = (part.chunk(3)[2] for part in (block.attn.in_proj_weight, block.attn.in_proj_bias))
        return split_heads(F.linear(block.ln_1(x), weight, bias), block.attn.num_heads)

    def attend(self, block: Any, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        # MultiheadAttention wants a (B * H, N, N) mask; SDPA takes the (B, 1, 1, N) key bias as it is
        return self.output(block, F.scaled_dot_product_attention(*self.project(block, x), attn_mask=bias))

    def output(self, block: Any, heads: Tensor) -> Tensor:
        return block.ls_1(block.attn.out_proj(join_heads(heads)))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.ls_2(block.mlp(block.ln_2(x)))

    def scale(self, block: Any) -> float:
        return float(block.attn.head_dim) ** -0.5

    def with_mask(self, x: Tensor, mask: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if mask is not None:
            # one (B * H, N, N) view of the key bias; MultiheadAttention copies it
            count = x.shape[1]
            mask = mask.expand(-1, self.heads_of, count, -1).flatten(0, 1)
            if len(args) > 3:  # with gradient checkpointing on, the tower gives it by position
                return (x, *args[1:3], mask, *args[4:]), kwargs
            kwargs = {**kwargs, "attn_mask": mask}
        return (x, *args[1:]), kwargs

    def __init__(self, heads: int) -> None:
        self.heads_of = heads


class QwenBlocks:
    """Packed blocks of the Qwen towers: (seq, D), fused qkv, 2-D rotary embedding, ``cu_seqlens``."""

    def taps(self, block: Any) -> Sequence[nn.Module]:
        return (block.attn.qkv,)

    def split(self, block: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(seq, 3 * D) to q, k, v (seq, H, d), before the rotary embedding."""
        fused = outputs[0].unflatten(-1, (3, block.attn.num_heads, -1))
        return fused[:, 0], fused[:, 1], fused[:, 2]

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(block, [block.attn.qkv(block.norm1(x))])

    def attend(self, block: Any, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        return block.attn(block.norm1(x), **kwargs)

    def output(self, block: Any, heads: Tensor) -> Tensor:
        """(seq, H, d) through the output projection."""
        return block.attn.proj(heads.flatten(1))

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.mlp(block.norm2(x))

    def scale(self, block: Any) -> float:
        return float(block.attn.scaling)
