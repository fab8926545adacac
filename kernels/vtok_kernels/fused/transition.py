"""Token transitions in Triton: one pass over both tensors, where plain torch makes seven."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import reference, register
from ._launch import devices, next_power, priority


@triton.jit
def _transition_kernel(
    x, y, mask, magnitude, direction, n, width,
    x_b, x_n, x_d, y_b, y_n, y_d, mask_b, mask_n, MASKED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    batch, place = token // n, token % n
    x += batch * x_b + place * x_n
    y += batch * y_b + place * y_n
    xx = tl.zeros((BLOCK_D,), tl.float32)
    yy = tl.zeros((BLOCK_D,), tl.float32)
    xy = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(0, width, BLOCK_D):
        d = at + tl.arange(0, BLOCK_D)
        before = tl.load(x + d * x_d, mask=d < width, other=0.0).to(tl.float32)
        after = tl.load(y + d * y_d, mask=d < width, other=0.0).to(tl.float32)
        xx += before * before
        yy += after * after
        xy += before * after
    norm_x, norm_y = tl.sqrt_rn(tl.sum(xx, 0)), tl.sqrt_rn(tl.sum(yy, 0))
    cosine = tl.sum(xy, 0) / tl.maximum(norm_x * norm_y, 1e-8)
    turned = tl.exp(1.0 - cosine)
    if MASKED:
        on = tl.load(mask + batch * mask_b + place * mask_n)
        turned = tl.where(on != 0, turned, 0.0)
    tl.store(magnitude + token, norm_y / tl.maximum(norm_x, 1e-12))
    tl.store(direction + token, turned)


@register("transition", "triton", devices=devices(), priority=priority())
@torch.no_grad()
def transition(x: Tensor, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`vtok_kernels.transition` in one launch that reads x and y once."""
    known = {x.dtype, y.dtype} <= {torch.float32, torch.float16, torch.bfloat16}
    fits = mask is None or (mask.dtype == torch.bool and mask.shape == x.shape[:2])
    if not known or not fits or x.dim() != 3 or x.shape != y.shape or x.numel() == 0:
        return reference("transition")(x, y, mask)
    batch, n, width = x.shape
    magnitude, direction = (torch.empty(batch, n, dtype=torch.float32, device=x.device) for _ in range(2))
    on = x[:, :, 0] if mask is None else mask
    # 4,096 channels are one block of 8 loads of 16 bytes a thread; wider rows loop.
    block = min(next_power(width), 4096)
    _transition_kernel[(batch * n,)](
        x, y, on, magnitude, direction, n, width, *x.stride(), *y.stride(), *on.stride(),
        MASKED=mask is not None, BLOCK_D=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return magnitude, direction
