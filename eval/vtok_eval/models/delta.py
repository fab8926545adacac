"""What training changed, small enough to ship: low-rank updates of linear layers, and the weights that are new."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vtok.errors import VtokError

DOWN, UP = ".lora_down", ".lora_up"


@torch.no_grad()
def merge(model: nn.Module, delta: Mapping[str, Tensor]) -> nn.Module:
    """Put a delta into a model: ``W + up @ down`` for the pairs, the tensor itself for anything else.

    Parameters
    ----------
    model : nn.Module
        Changed in place, in the dtype of each weight; sums are taken in fp32.
    delta : mapping
        ``{module}.lora_down`` (rank, in) with ``{module}.lora_up`` (out, rank), scale included, and whole parameters by
        their names.

    Returns
    -------
    nn.Module
        ``model``.

    Raises
    ------
    VtokError
        A name that the model lacks, half a pair, or a shape that does not fit.
    """
    weights = dict(model.named_parameters())
    for name, value in delta.items():
        if name.endswith(UP):
            continue
        target = f"{name.removesuffix(DOWN)}.weight" if name.endswith(DOWN) else name
        change = value.float()
        if name.endswith(DOWN):
            up = delta.get(name.removesuffix(DOWN) + UP)
            if up is None or up.shape[-1] != value.shape[0]:
                raise VtokError(f"the delta has no fitting {name.removesuffix(DOWN)}{UP}; its file is damaged")
            change = up.float() @ change
        found = weights.get(target)
        if found is None or found.shape != change.shape:
            raise VtokError(
                f"the delta changes {target} {tuple(change.shape)}, and the model has "
                f"{'no such weight' if found is None else tuple(found.shape)}; delta and base do not belong together"
            )
        found.copy_(found.float() + change if name.endswith(DOWN) else change)
    return model
