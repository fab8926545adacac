"""What ToMe and MCTF share: which blocks merge, and the key metric."""

from __future__ import annotations

from torch import Tensor

from vtok.view import Shape, TowerView


def fusion_layers(shape: Shape, first: int = 0, everywhere: bool = False) -> tuple[int, ...]:
    """Blocks that merge, from ``first`` on. At most half of the tokens can go in one block, so six of them reach 1/64;
    spread over the first three quarters of the tower, where saving still pays (MCTF's fast setting: 3, 6, 9 of 12)."""
    blocks = range(first, shape.tower_depth)
    if everywhere or len(blocks) <= 6:
        return tuple(blocks)
    step = 0.75 * len(blocks) / 6
    return tuple(blocks[int((i + 1) * step) - 1] for i in range(6))


def keys_metric(view: TowerView) -> Tensor:
    """(G, prefix + n, d) keys averaged over heads, and over the patches of a cell."""
    assert view.k is not None
    keys = view.k.float().mean(1)
    return keys.unflatten(1, (-1, view.unit)).mean(2) if view.unit > 1 else keys
