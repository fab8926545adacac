"""Attention statistics of one decoder cut, recomputed exactly by row from captured projections. No L x L map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vtok_kernels as kernels
from vtok.engine.host import on_device
from vtok.engine.segments import Segment
from vtok.engine.spans import Span
from vtok.view import DecoderView


@dataclass
class Rows:
    """Row computer for the spans of one stage; results are shared by all groups of spans.

    Attributes:
        segment: columns as they stand when the stage acts.
        captured: raw outputs of the previous layer's ``q`` (last rows), ``k`` and ``v`` projections.
        transition: accumulated token transitions, (B, W).
        previous: attention module of the layer that has just run (``None`` before layer 0).
        layer: the decoder layer about to run.
        hidden: (B, W, D) what enters it.
        rotary: (cos, sin) of the segment's columns.
        reserved: number of last columns that ``q`` holds (``None``: all).
    """

    segment: Segment
    spans: Sequence[Span]
    captured: dict[str, Tensor]
    transition: dict[int, Tensor]
    previous: nn.Module | None
    layer: nn.Module
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    reserved: int | None
    _received: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def attention(self, view: DecoderView, rows: str, of: str) -> Tensor:
        if (rows, of) not in self._received:
            q, k, scale = self._queries_and_keys(of, 1 if rows == "last" else None)
            received = kernels.received_attention(
                q,
                k,
                scale=scale,
                key_mask=self._real(),
                query_mask=self._query_mask(rows, q.shape[2]),
                query_positions=self._query_positions(q.shape[2]),
            )
            self._received[rows, of] = received
        return self._pick(view, self._received[rows, of])

    def transition_of(self, view: DecoderView) -> Tensor:
        return self._pick(view, self.transition[0])

    def projections(self, view: DecoderView) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, _ = self._queries_and_keys("previous", 1)
        v = heads(self.captured["v"], q.shape[-1])
        samples, columns = self._where(view)
        own_k, own_v = (x.transpose(1, 2)[samples, columns].transpose(1, 2) for x in (k, v))
        return q[samples[:, 0], :, -1], own_k, v[samples[:, 0], :, -1], own_v

    def mass(self, view: DecoderView) -> tuple[Tensor, Tensor]:
        real = self._real()
        visual = self.visual()
        index = torch.arange(self.segment.width, device=visual.device).expand_as(visual)
        first = torch.where(visual, index, self.segment.width).amin(1, keepdim=True)
        text = ~visual & (index > first) & (real if real is not None else True)
        q, k, scale = self._queries_and_keys("previous", None)
        rows_ = q.shape[2]
        positions = self._query_positions(rows_)
        kwargs: dict[str, Any] = {"scale": scale, "key_mask": real, "query_positions": positions}
        to_visual = kernels.received_attention(q, k, query_mask=text[:, -rows_:], **kwargs)
        to_visual = (to_visual * visual).sum(1)
        if self.reserved is None:
            to_text = kernels.received_attention(q, k, query_mask=visual[:, -rows_:], **kwargs)
            to_text = (to_text * text).sum(1)
        else:
            to_text = torch.zeros_like(to_visual)  # causal, and no text stands between images: nothing to see
        samples = on_device([self.spans[number].sample for number in view.spans], visual.device)
        return to_visual[samples], to_text[samples]

    def visual(self) -> Tensor:
        """(B, W) bool: visual columns."""
        visual = torch.zeros(self.segment.index.shape, dtype=torch.bool, device=self.segment.device)
        for span, columns in zip(self.spans, self.segment.columns, strict=True):
            visual[span.sample, columns] = True
        return visual

    def _pick(self, view: DecoderView, per_column: Tensor) -> Tensor:
        samples, columns = self._where(view)
        return per_column[samples, columns]

    def _where(self, view: DecoderView) -> tuple[Tensor, Tensor]:
        columns = torch.stack([self.segment.columns[number] for number in view.spans]).to(self.hidden.device)
        samples = on_device([self.spans[number].sample for number in view.spans], columns.device)
        return samples[:, None].expand_as(columns), columns

    def _real(self) -> Tensor | None:
        return None if self.segment.mask is None else self.segment.mask.to(self.hidden.device)

    def _query_mask(self, rows: str, count: int) -> Tensor | None:
        if rows == "last":
            return None
        tails = on_device(tail_lengths(self.segment, self.spans), self.hidden.device)
        return torch.arange(count, 0, -1, device=self.hidden.device)[None] <= tails[:, None]

    def _query_positions(self, count: int) -> Tensor:
        width = self.segment.width
        return torch.arange(width - count, width, device=self.hidden.device).expand(self.hidden.shape[0], count)

    def _queries_and_keys(self, of: str, last: int | None) -> tuple[Tensor, Tensor, float]:
        """Post-rotary q (B, H, R, d) of the last rows and k (B, Hkv, W, d)."""
        module: Any = self.layer.self_attn if of == "next" else self.previous
        count = last or self.reserved or self.segment.width
        if of == "next":
            layer: Any = self.layer
            x = layer.input_layernorm(self.hidden)
            q, k = module.q_proj(x[:, -count:]), module.k_proj(x)
        else:
            q, k = self.captured["q"][:, -count:], self.captured["k"]
        width = module.head_dim
        q, k = heads(q, width), heads(k, width)
        if hasattr(module, "q_norm"):  # Qwen3 normalises every head before the rotary embedding
            q, k = (norm(x.transpose(1, 2)).transpose(1, 2) for norm, x in ((module.q_norm, q), (module.k_norm, k)))
        cos, sin = (part.to(q.device) for part in self.rotary)
        q = rotate(q, cos[:, -q.shape[2] :], sin[:, -q.shape[2] :])
        return q, rotate(k, cos, sin), float(module.scaling)


def heads(x: Tensor, width: int) -> Tensor:
    """(B, N, H * d) to (B, H, N, d)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, H, N, d) by (B or 1, N, d_rot); channels past d_rot pass through."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned


def tail_lengths(segment: Segment, spans: Sequence[Span]) -> list[int]:
    """Text tokens after the last image of each sample, on the host (1 for a sample without images)."""
    tails = [1] * len(segment.lengths)
    for span in spans:
        tails[span.sample] = max(1, span.tail)
    return tails


def reserved(segment: Segment, spans: Sequence[Span]) -> int | None:
    """Last columns that text statistics may ask about, or ``None`` when text stands between images."""
    if any(span.text_before for span in spans):
        return None
    return max(tail_lengths(segment, spans), default=1)


def transition(before: Tensor, after: Tensor, mask: Tensor | None, couple_batch: bool) -> Tensor:
    """Token transition of one sub-module, (B, W): relative magnitude times direction change.

    TransPrune (arXiv 2507.20630) section 3.2 with the released code's direction term: exp(1 - cos) over the sum of
    it. The sum runs over a sample's real tokens; with ``couple_batch`` over the whole batch, as released.
    """
    counted = None if mask is None or couple_batch else mask.to(after.device)
    magnitude, direction = kernels.transition(before, after, counted)
    total = direction.sum() if couple_batch else direction.sum(1, keepdim=True)
    return magnitude * direction / total
