"""How a sub-layer moves tokens: TransPrune's transitions."""

import torch
from torch import Tensor

from ._common import check_shape, check_tokens, no_grad, score_dtype
from .backend import operator


@operator
@no_grad
def transition(x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Magnitude and direction of the update of each token (TransPrune, arXiv 2507.20630, section 3.2).

    Parameters
    ----------
    x, y : (B, N, D)
        What goes into a sub-layer and what comes out of it.
    mask : (B, N) bool, optional
        Tokens that count. Default: all.

    Returns
    -------
    magnitude : (B, N)
        ``|y| / |x|``.
    direction : (B, N)
        ``exp(1 - cos(x, y))``, before its division by a sum; 0 where the mask is False.

        Both fp32 (float64 for float64 input). No gradient.

    Raises
    ------
    ValueError
        If the shapes do not fit or the mask is not bool.
    """
    check_tokens("x", x, 3, "(B, N, D)")
    check_shape("y", y, tuple(x.shape))
    if mask is not None:
        check_shape("mask", mask, tuple(x.shape[:2]))
        if mask.dtype != torch.bool:
            raise ValueError(f"mask is {mask.dtype}, but a bool mask is needed: True = counts.")
    x, y = x.to(score_dtype(x)), y.to(score_dtype(x))
    norm_x, norm_y = x.norm(dim=-1), y.norm(dim=-1)
    cosine = (x * y).sum(-1) / (norm_x * norm_y).clamp_min(1e-8)
    direction = torch.exp(1.0 - cosine)
    if mask is not None:
        direction = direction * mask
    return norm_y / norm_x.clamp_min(1e-12), direction
