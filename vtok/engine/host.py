"""Between host and device: small lists go over without a wait, sizes come back with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, device: Any) -> Tensor:
    """A small tensor on ``device``. The copy is queued, so the host does not wait for the device's earlier work (a
    plain ``torch.tensor(values, device=...)`` does)."""
    return torch.tensor(values).to(device, non_blocking=True)


def host_sizes(mask: Tensor) -> list[int]:
    """Row sums on the host: the one synchronisation that a data-dependent length needs."""
    return mask.sum(1).tolist()
