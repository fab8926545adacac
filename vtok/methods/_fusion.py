"""What ToMe and MCTF share: which blocks merge, and the key metric."""

from __future__ import annotations

from torch import Tensor

from vtok.view import Shape, TowerView


def fusion_layers(shape: Shape, everywhere: bool = False) -> tuple[int, ...]:
    """Blocks that merge. At most half of the tokens can go in one block, so six of them reach 1/64; spread over the
    first three quarters of the tower, where saving still pays (MCTF's fast setting: blocks 3, 6, 9 of 12)."""
    if everywhere:
        return tuple(range(shape.tower_depth))
    count = min(6, shape.tower_depth)
    return tuple(sorted({round((i + 1) * 0.75 * shape.tower_depth / count) - 1 for i in range(count)} - {-1}))


def keys_metric(view: TowerView) -> Tensor:
    """(G, prefix + n, d) keys averaged over heads, and over the patches of a cell."""
    assert view.k is not None
    keys = view.k.float().mean(1)
    return keys.unflatten(1, (-1, view.unit)).mean(2) if view.unit > 1 else keys
