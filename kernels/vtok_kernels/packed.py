"""Attention over packed, ragged batches: several sequences in one, none sees another."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .backend import operator, register


@operator
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Softmax attention inside each segment of a packed sequence.

    Parameters
    ----------
    q, k, v : (N, H, d) packed projections.
    lengths : segment lengths, adding up to N.
    scale : factor on q.k.
    bias : (N,) added to the logits of each key (log sizes of merged tokens: ToMe's proportional attention).

    Returns
    -------
    (N, H, d)
    """
    _check(q, lengths)
    parts = [t.transpose(0, 1).split(list(lengths), dim=1) for t in (q, k, v)]
    biases = (
        [None] * len(lengths) if bias is None else [b[None, None, None] for b in bias.to(q.dtype).split(list(lengths))]
    )
    out = [
        F.scaled_dot_product_attention(a[None], b[None], c[None], attn_mask=own, scale=scale)[0]
        for a, b, c, own in zip(*parts, biases, strict=True)
    ]
    return torch.cat(out, dim=1).transpose(0, 1)


def _check(q: Tensor, lengths: Sequence[int]) -> None:
    if sum(lengths) != q.shape[0]:
        raise ValueError(
            f"The segment lengths add up to {sum(lengths)} and the sequence has {q.shape[0]} tokens: "
            "pass the length of every segment."
        )


def xformers_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], *, scale: float, bias: Tensor | None = None
) -> Tensor:
    """``packed_attention`` in one xformers call with a block-diagonal mask.

    The kernel takes no key bias beside that mask, so the bias travels in one more block of channels of q and k: exact,
    and 8 channels wide for alignment.
    """
    _check(q, lengths)
    ops = importlib.import_module("xformers.ops")
    width = v.shape[-1]
    if bias is not None:
        extra = q.new_zeros(*q.shape[:2], 8)
        extra_q, extra_k = extra.clone(), extra.clone()
        extra_q[..., 0] = 1.0 / scale
        extra_k[..., 0] = bias.to(k.dtype)[:, None]
        q, k, v = torch.cat((q, extra_q), -1), torch.cat((k, extra_k), -1), torch.cat((v, extra), -1)
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(list(lengths))
    out = ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask, scale=scale)[0]
    return out[..., :width]


def load_xformers() -> None:
    """Put xformers in charge of packed attention on CUDA devices.

    Raises
    ------
    ImportError
        xformers is missing or does not load beside this torch; the message says what to do. Everything works without.
    """
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:
        raise ImportError(
            f"xformers does not load here ({error}); install a build for torch {torch.__version__} with "
            "pip install vtok[xformers], or leave it out: vtok runs the same attention with torch's own kernels."
        ) from error
    register("packed_attention", "xformers", devices=("cuda",))(xformers_attention)
