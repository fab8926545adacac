"""DINOv2 weights for CLIP's and Qwen2.5-VL's towers: what folds exactly, what is cut, what has to be learnt again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: how far the embeddings are pushed along one direction, in units of their own spread. The first norm then divides by
#: a nearly constant number. More would be closer to the identity (the error falls as 1 / PUSH) and would lose the
#: embeddings' low bits in bfloat16 (which grow as PUSH / 512): at 8 both stay below one per cent.
PUSH = 8.0


def clip_from_dinov2(
    weights: Mapping[str, Tensor], layers: int, intermediate: int, side: int, seen: Seen
) -> dict[str, Tensor]:
    """State dict of a ``CLIPVisionModel`` from that of a ``Dinov2Model``.

    The first ``layers`` blocks are taken. Layer scale folds into the projections behind it, the patch bias into the
    position embeddings. Of each feed-forward the most active neurons stay; the mean of the others goes into the bias.
    On photographs the last layer then has a cosine of 0.998 to the teacher's with all neurons, 0.951 with two thirds.

    Parameters
    ----------
    weights : mapping
        Of the ``Dinov2Model``, fp32.
    layers, intermediate : int
        Blocks and feed-forward neurons to keep.
    side : int
        Patches along each side of the student's picture; position embeddings are interpolated to it.
    seen : Seen
        What ``observed`` saw in the teacher.

    Returns
    -------
    dict of str to Tensor
        Keys as in ``CLIPVisionModel``.
    """
    width = weights["embeddings.cls_token"].shape[-1]
    push, direction, left = push_along(seen.embeddings)
    positions = interpolated(weights["embeddings.position_embeddings"], side)[0]
    positions[1:] += weights["embeddings.patch_embeddings.projection.bias"]
    found = {
        "embeddings.class_embedding": weights["embeddings.cls_token"].flatten(),
        "embeddings.patch_embedding.weight": weights["embeddings.patch_embeddings.projection.weight"],
        "embeddings.position_embedding.weight": positions + push * direction,
        "pre_layrnorm.weight": torch.full((width,), push),
        "pre_layrnorm.bias": left - push * direction,
        "post_layernorm.weight": weights["layernorm.weight"],
        "post_layernorm.bias": weights["layernorm.bias"],
    }
    for layer in range(layers):
        old, new = f"encoder.layer.{layer}", f"encoder.layers.{layer}"
        second = weights[f"{old}.mlp.fc2.weight"]
        keep, gone = _neurons(seen.rms[layer], second, intermediate)
        scale1, scale2 = (weights[f"{old}.layer_scale{i}.lambda1"] for i in (1, 2))
        for kind in ("weight", "bias"):
            rows = (slice(None), None) if kind == "weight" else slice(None)
            for name in ("q", "k", "v"):
                found[f"{new}.self_attn.{name}_proj.{kind}"] = weights[f"{old}.attention.{name}_proj.{kind}"]
            out = weights[f"{old}.attention.o_proj.{kind}"]
            found[f"{new}.self_attn.out_proj.{kind}"] = out * scale1[rows]
            found[f"{new}.layer_norm1.{kind}"] = weights[f"{old}.norm1.{kind}"]
            found[f"{new}.layer_norm2.{kind}"] = weights[f"{old}.norm2.{kind}"]
            found[f"{new}.mlp.fc1.{kind}"] = weights[f"{old}.mlp.fc1.{kind}"][keep]
        bias = weights[f"{old}.mlp.fc2.bias"] + second[:, gone] @ seen.mean[layer][gone]
        found[f"{new}.mlp.fc2.weight"], found[f"{new}.mlp.fc2.bias"] = second[:, keep] * scale2[:, None], bias * scale2
    return {name: value.clone().contiguous() for name, value in found.items()}


def qwen_from_dinov2(
    weights: Mapping[str, Tensor], layers: int, intermediate: int, heads: int, seen: Seen
) -> dict[str, Tensor]:
    """Weights of a ``Qwen2_5_VisionTransformerPretrainedModel`` from those of a ``Dinov2Model``, without the merger.

    A layer norm is an RMS norm of a residual stream without mean: every projection that writes to the stream is
    centred, and a norm's bias goes into what reads it. The gated feed-forward has an open gate (GELU times one). Two
    things have no counterpart and must be learnt: position embeddings (here positions turn queries and keys), and full
    attention where there are windows. The turning does least harm if the pairs of channels that attention relies on
    most turn slowest, so channels are ordered by that.

    Parameters
    ----------
    weights : mapping
        Of the ``Dinov2Model``, fp32.
    layers, intermediate, heads : int
        Blocks and feed-forward neurons to keep; attention heads.
    seen : Seen
        What ``observed`` saw in the teacher.

    Returns
    -------
    dict of str to Tensor
    """
    patch = weights["embeddings.patch_embeddings.projection.weight"]
    found = {"patch_embed.proj.weight": torch.stack([_centred(patch)] * 2, 2) / 2}
    for layer in range(layers):
        old, new = f"encoder.layer.{layer}", f"blocks.{layer}"
        get = lambda name, old=old: weights[f"{old}.{name}"]  # noqa: E731
        for norm in ("norm1", "norm2"):
            found[f"{new}.{norm}.weight"] = get(f"{norm}.weight")
        parts = {}
        order = slow_last(get("attention.q_proj.weight"), get("attention.k_proj.weight"), heads)
        for name in ("q", "k", "v"):
            weight, bias = get(f"attention.{name}_proj.weight"), get(f"attention.{name}_proj.bias")
            bias = bias + weight @ get("norm1.bias")
            parts[name] = (weight, bias) if name == "v" else (weight[order], bias[order])
        found[f"{new}.attn.qkv.weight"] = torch.cat([parts[name][0] for name in "qkv"])
        found[f"{new}.attn.qkv.bias"] = torch.cat([parts[name][1] for name in "qkv"])
        scale1, scale2 = get("layer_scale1.lambda1"), get("layer_scale2.lambda1")
        found[f"{new}.attn.proj.weight"] = _centred(get("attention.o_proj.weight") * scale1[:, None])
        found[f"{new}.attn.proj.bias"] = _centred(get("attention.o_proj.bias") * scale1)
        second = get("mlp.fc2.weight")
        keep, gone = _neurons(seen.rms[layer], second, intermediate)
        first = get("mlp.fc1.weight")
        found[f"{new}.mlp.gate_proj.weight"] = first[keep]
        found[f"{new}.mlp.gate_proj.bias"] = (get("mlp.fc1.bias") + first @ get("norm2.bias"))[keep]
        found[f"{new}.mlp.up_proj.weight"] = torch.zeros(intermediate, first.shape[1])
        found[f"{new}.mlp.up_proj.bias"] = torch.ones(intermediate)
        bias = get("mlp.fc2.bias") + second[:, gone] @ seen.mean[layer][gone]
        found[f"{new}.mlp.down_proj.weight"] = _centred(second[:, keep] * scale2[:, None])
        found[f"{new}.mlp.down_proj.bias"] = _centred(bias * scale2)
    return {name: value.clone().contiguous() for name, value in found.items()}


def slow_last(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Order of the channels of all heads: those that matter least to attention go where rotation is fastest.

    Rotary embeddings pair channel i with i + d / 2 and turn the first pairs of each half (rows, columns) fastest.
    """
    width = query.shape[0] // heads
    half, quarter = width // 2, width // 4
    # pair p turns with frequency p of the rows for p < quarter, p - quarter of the columns behind that
    by_speed = sorted(range(half), key=lambda pair: pair % quarter)
    slots = [channel for pair in by_speed for channel in (pair, pair + half)]
    order = torch.empty(heads, width, dtype=torch.long)
    for head in range(heads):
        rows = slice(head * width, (head + 1) * width)
        weight = query[rows].norm(dim=1) * key[rows].norm(dim=1)
        order[head, slots] = weight.argsort() + head * width
    return order.flatten()


def _neurons(rms: Tensor, second: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """(indices that stay, mask of those that go) of feed-forward neurons, by what they add to the stream."""
    kept = (rms * second.norm(dim=0)).topk(keep).indices.sort().values
    gone = torch.ones_like(rms, dtype=torch.bool)
    gone[kept] = False
    return kept, gone


def _centred(weight: Tensor) -> Tensor:
    """What writes to the stream, less the mean over the stream's channels."""
    return weight - weight.mean(0, keepdim=True)


def push_along(embeddings: Tensor) -> tuple[float, Tensor, Tensor]:
    """(length, direction, rest): along what, and how far, embeddings (n, D) are pushed before the first norm.

    LN(x + C u) with weight C and bias -C u gives x less its mean and its part along u, to first order in |x| / C. The
    mean is invisible to every later norm; u is the direction of least variance, orthogonal to the mean's, with unit
    mean square. ``rest`` is what that leaves out on average, for the bias.
    """
    width = embeddings.shape[-1]
    whole = embeddings.double()
    whole = whole - whole.mean(-1, keepdim=True)
    centred = whole - whole.mean(0)
    ones = torch.ones(width, dtype=torch.double) / math.sqrt(width)
    # the ones direction has no variance left: lift it, so that it is not the least
    covariance = centred.T @ centred / len(centred) + centred.var() * width * torch.outer(ones, ones)
    direction = torch.linalg.eigh(covariance).eigenvectors[:, 0] * math.sqrt(width)
    push = PUSH * float(embeddings.square().mean().sqrt())
    normed = torch.nn.functional.layer_norm(whole + push * direction, (width,)) * push - push * direction
    return push, direction.to(embeddings.dtype), (whole - normed).mean(0).to(embeddings.dtype)


def interpolated(positions: Tensor, side: int) -> Tensor:
    """(1, 1 + n * n, D) position embeddings with class token, resized to ``side`` x ``side`` patches."""
    old = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat((positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)), 1)


@dataclass
class Seen:
    """What passed through a ``Dinov2Model``.

    Attributes
    ----------
    embeddings : Tensor
        (n, D) what entered the first block.
    rms, mean : Tensor
        (layers, m) of each feed-forward neuron behind its activation.
    """

    embeddings: Tensor
    rms: Tensor
    mean: Tensor


@torch.no_grad()
def observed(model: Any, pixels: Tensor, layers: int) -> Seen:
    """Run a ``Dinov2Model`` on (B, 3, H, W) pixels and note what ``clip_from_dinov2`` needs."""
    first: list[Tensor] = []
    neurons: list[Tensor] = []
    blocks = list(model.encoder.layer)[:layers]
    hooks = [blocks[0].register_forward_pre_hook(lambda _, args: first.append(args[0].flatten(0, 1)))]
    hooks += [block.mlp.fc2.register_forward_pre_hook(lambda _, args: neurons.append(args[0])) for block in blocks]
    model(pixels)
    for hook in hooks:
        hook.remove()
    rms = torch.stack([own.square().mean((0, 1)).sqrt() for own in neurons])
    return Seen(torch.cat(first), rms, torch.stack([own.mean((0, 1)) for own in neurons]))
