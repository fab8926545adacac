"""The vision side: who watches a tower, and how what it kept reaches the placeholders."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.engine.spans import Encoded
from vtok.protocol import Medium


class Wrapped:
    """Replaces one attribute of one instance by a call around it, and puts it back.

    Copies with the model: everything it refers to is copied along by ``deepcopy``.
    """

    def __init__(self, owner: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.owner, self.name, self.around = owner, name, around
        self.previous = owner.__dict__.get(name)
        self.original = getattr(owner, name)
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.original, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def remove(self) -> None:
        if self.previous is None:
            self.owner.__dict__.pop(self.name, None)
        else:
            self.owner.__dict__[self.name] = self.previous


class Tower:
    """A tower whose tokens all stay; records the class token's attention where a method asks for it."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.spec: Any = session.adapter.tower
        self.saliency = any("saliency" in stage.reads for stage in session.stages) and self.spec.has_cls
        self.seen: Tensor | None = None
        self.taps: list[Tensor] = []

    def observed(self, last_cut: int) -> Sequence[int]:
        """Blocks that a running score looks at."""
        asked = next((s.observed for s in self.session.stages if s.site == "encoder" and s.observe is not None), ())
        return asked or range(last_cut)

    def install(self) -> None:
        if self.saliency:
            last = len(self.spec.layers) - 1
            for tap in self.spec.blocks.taps(self.spec.layers[last]):
                self.session.hook(tap.register_forward_hook(self._record))

    def _record(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.session.encoding:
            self.taps.append(output.detach())

    def encode(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], original: Any, args: Any, kwargs: Any
    ) -> tuple[Any, list[Encoded]]:
        """Run ``get_image_features``; (its output, what stands of each medium)."""
        self.taps = []
        output = original(*args, **kwargs)
        encoded = [Encoded(medium, medium.length) for medium in media]
        if self.saliency:
            scores = self._cls_attention()
            for item, packed in zip(encoded, self.pack(modality, call, media, scores[..., None], 0.0), strict=True):
                item.saliency = packed[:, 0]
        self.taps = []
        return output, encoded

    def pack(
        self, modality: str, call: Mapping[str, Any], media: Sequence[Medium], values: Tensor, newline: float
    ) -> list[Tensor]:
        """Per-tower-token values in placeholder order."""
        return self.session.adapter.pack(modality, call, media, values, newline)

    def _cls_attention(self) -> Tensor:
        """(tiles, N) attention of the class token at the last block (to itself, too, where the model keeps it)."""
        block = self.spec.layers[-1]
        q, k, _ = self.spec.blocks.split(block, self.taps)
        rows = kernels.attention_rows(q[:, :, :1], k, scale=self.spec.blocks.scale(block))
        return rows[:, 0, 0 if self.spec.keeps_prefix else self.spec.prefix :]


def distribute(total: int, weights: Sequence[int]) -> list[int]:
    """``total`` split over parts in proportion to ``weights``, at least 1 where a weight is positive, never above it.

    Largest remainders get what rounding leaves.
    """
    whole = sum(weights)
    if whole <= total:
        return list(weights)
    exact = [total * weight / whole for weight in weights]
    parts = [min(weight, max(int(value), 1 if weight else 0)) for value, weight in zip(exact, weights, strict=True)]
    order = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in order:
        if sum(parts) >= total:
            break
        if parts[i] < weights[i]:
            parts[i] += 1
    return parts


def merge_goal(count: int, target: int, later: int, even: bool) -> int:
    """Tokens that one of ``later`` remaining merges should leave.

    A constant ratio reaches any target down to ``count / 2**later`` (matching can take at most half at a time); a
    constant number a block (``even``, as ToMe and MCTF were published) runs into that half before small targets.
    """
    if count <= target:
        return count
    goal = count - -(-(count - target) // later) if even else round(count * (target / count) ** (1 / later))
    return max(goal, target, count - count // 2)


def segment_goals(goal: int, lengths: Sequence[int]) -> list[int]:
    """What a merge shall leave of each segment so that ``goal`` are left of all: bipartite matching can take at most
    half of one."""
    share = distribute(goal, lengths)
    return [max(own, length - length // 2) for own, length in zip(share, lengths, strict=True)]


def received(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention that each token receives, blocked; a key bias travels in one more channel of q and k."""
    if bias is not None:
        ones = torch.full_like(q[..., :1], 1.0 / scale)
        q = torch.cat((q, ones), -1)
        k = torch.cat((k, bias[:, None, :, None].to(k.dtype).expand(-1, k.shape[1], -1, -1)), -1)
    return kernels.received_attention(q, k, scale=scale)
