"""The engine on vLLM's CLIP and SigLIP towers, whose blocks hold q, k and v in one projection and take no mask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from vtok.engine.dense import DenseTower
from vtok.engine.towers import Tower as Watcher
from vtok.engine.towers import Wrapped
from vtok.errors import VtokError
from vtok.protocol import Tower, find_blocks

BLOCKS = ("CLIPEncoderLayer", "SiglipEncoderLayer")
MASK = "key_bias"


class FusedBlocks:
    """How to speak to one block. vLLM's linear layers return (output, bias)."""

    def taps(self, block: Any) -> Sequence[nn.Module]:
        return (block.self_attn.qkv_proj,)

    def split(self, block: Any, outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        heads = block.self_attn.num_heads_per_partition
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in outputs[0].chunk(3, dim=-1))
        return q, k, v

    def project(self, block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(block, [block.self_attn.qkv_proj(block.layer_norm1(x))[0]])

    def values(self, block: Any, x: Tensor) -> Tensor:
        return self.project(block, x)[2]

    def attend(self, block: Any, x: Tensor, bias: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        if bias is None:
            return block.self_attn(hidden_states=block.layer_norm1(x))[0]
        q, k, v = self.project(block, x)
        return self.output(block, F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=self.scale(block)))

    def output(self, block: Any, heads: Tensor) -> Tensor:
        return block.self_attn.out_proj(heads.transpose(1, 2).flatten(2))[0]

    def feed(self, block: Any, x: Tensor) -> Tensor:
        return block.mlp(block.layer_norm2(x))

    def scale(self, block: Any) -> float:
        return float(block.self_attn.scale)

    def with_mask(self, x: Tensor, mask: Tensor | None, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        if args:
            args = (x, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": x}
        return args, kwargs if mask is None else {**kwargs, MASK: mask}


class FusedTaps:
    """Taps of linear layers that return (output, bias)."""

    def _record(self, module: nn.Module, args: tuple, output: Any) -> None:
        super()._record(module, args, output[0])  # type: ignore[misc]

    def _tap(self, number: int, order: int, module: nn.Module, args: tuple, output: Any) -> None:
        super()._tap(number, order, module, args, output[0])  # type: ignore[misc]


class WatchedTower(FusedTaps, Watcher):
    """A tower whose class token's attention is recorded."""


class CutTower(FusedTaps, DenseTower):
    """A tower whose tokens are cut or merged inside."""

    def install(self) -> None:
        merging = {stage.layer for stage in self.fusions}
        for number, layer in enumerate(self.spec.layers):
            if number not in merging:
                self.session.wrapped.append(Wrapped(layer, "forward", partial(self._masked, number)))
        super().install()

    def _masked(self, number: int, original: Any, hidden_states: Tensor, key_bias: Tensor | None = None) -> Tensor:
        """A block whose keys are biased, which vLLM's own attention cannot do."""
        if key_bias is None:
            return original(hidden_states)
        block, blocks = self.spec.layers[number], self.spec.blocks
        x = hidden_states + blocks.attend(block, hidden_states, key_bias, {})
        return x + blocks.feed(block, x)


def dense_tower(root: nn.Module, feature_layer: int, projector: nn.Module) -> Tower:
    """The tower of a LLaVA of vLLM.

    Args:
        root: ``vision_tower``.
        feature_layer: index of the block whose output is used.
        projector: what takes the features.

    Raises:
        VtokError: blocks that are not known.
    """
    layers = find_blocks(root, BLOCKS)
    if not layers:
        raise VtokError(
            f"vtok does not know {type(root).__name__} of vLLM; it serves LLaVA with a CLIP or SigLIP tower"
        )
    has_cls = type(layers[0]).__name__ == "CLIPEncoderLayer"
    return Tower(
        root=root,
        layers=layers,
        blocks=FusedBlocks(),
        prefix=int(has_cls),
        has_cls=has_cls,
        feature_layer=feature_layer,
        projector=projector,
    )
