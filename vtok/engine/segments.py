"""Segments: what the layers from some layer on see of each prompt. The one place where tokens are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import vtok_kernels as kernels
from vtok.engine.host import on_device


@dataclass
class Segment:
    """Columns that the layers from ``layer`` on work on. Samples are right-aligned (left padding).

    Attributes:
        layer: first decoder layer that sees this segment.
        index: (B, W) prompt column of each column; padding points at dropped columns.
        mask: (B, W) bool, False on padding; ``None`` when there is none.
        lengths: real columns per sample, on the host.
        columns: per span, (n,) columns of its tokens in this segment.
        tokens: per span, (n,) their indices within the image.
        removed: (B, W) visual tokens dropped before each column so far.
        dropped: visual tokens dropped per sample so far, on the host.
        relative: (B, W) index into the previous segment's columns; ``None`` when nothing moved.
        full: length L of the whole prompt.
    """

    layer: int
    index: Tensor
    mask: Tensor | None
    lengths: list[int]
    columns: list[Tensor]
    tokens: list[Tensor]
    removed: Tensor
    dropped: list[int]
    relative: Tensor | None
    full: int

    @property
    def width(self) -> int:
        return self.index.shape[1]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @classmethod
    def whole(
        cls, real: Tensor | None, batch: int, length: int, columns: Sequence[Tensor], device: torch.device
    ) -> Segment:
        """The untouched prompt. ``real`` (B, L) is False on padding."""
        index = torch.arange(length, device=device).expand(batch, length)
        lengths = [length] * batch if real is None else real.sum(1).tolist()
        if all(size == length for size in lengths):
            real = None
        tokens = [torch.arange(len(column), device=device) for column in columns]
        removed = torch.zeros(batch, length, dtype=torch.long, device=device)
        return cls(0, index, real, lengths, list(columns), tokens, removed, [0] * batch, None, length)

    def narrow(
        self,
        layer: int,
        samples: Sequence[int],
        kept: Sequence[Tensor | None],
        slots: Sequence[Tensor | None] | None = None,
        always: bool = False,
    ) -> Segment:
        """The segment after a cut.

        Args:
            layer: first layer that sees the result.
            samples: batch row of each span.
            kept: per span, (k,) positions within the span's current tokens that stay (``None``: all).
            slots: per span, which of its columns hold the kept tokens, where these are not their own.
            always: right-align even when nothing is dropped.
        """
        device = self.device
        lengths, dropped = list(self.lengths), list(self.dropped)
        touched = [number for number, keep in enumerate(kept) if keep is not None]
        for number in touched:
            chosen = kept[number]
            assert chosen is not None
            gone = len(self.columns[number]) - len(chosen)
            lengths[samples[number]] -= gone
            dropped[samples[number]] += gone
        width = max(lengths)
        if not touched and not (always and self.mask is not None):
            return Segment(
                layer, self.index, self.mask, self.lengths, self.columns, self.tokens,
                self.removed, self.dropped, None, self.full,
            )  # fmt: skip
        real = torch.ones_like(self.index, dtype=torch.bool) if self.mask is None else self.mask
        keep = real.clone()
        columns, tokens = list(self.columns), list(self.tokens)
        for number in touched:
            chosen = kept[number]
            standing = (
                columns[number][chosen] if slots is None or slots[number] is None else columns[number][slots[number]]
            )
            row = keep[samples[number]]
            row[columns[number]] = False
            row[standing] = True
            columns[number], tokens[number] = standing, tokens[number][chosen]
        relative, mask = kernels.left_compact(keep, width)
        rank = keep.cumsum(1)
        starts = on_device([width - size - 1 for size in lengths], device)
        columns = [rank[sample][column] + starts[sample] for sample, column in zip(samples, columns, strict=True)]
        lost = (real & ~keep).cumsum(1)
        index, removed = kernels.compact([self.index, self.removed + lost], relative)
        return Segment(
            layer,
            index,
            None if all(size == width for size in lengths) else mask,
            lengths,
            columns,
            tokens,
            removed,
            dropped,
            relative,
            self.full,
        )

    def prompt(self, draft: int) -> Segment:
        """Without the last ``draft`` columns, which every sample has alike."""
        if not draft:
            return self
        cut = slice(None, self.width - draft)
        return replace(
            self,
            index=self.index[:, cut],
            mask=None if self.mask is None else self.mask[:, cut],
            lengths=[length - draft for length in self.lengths],
            removed=self.removed[:, cut],
            relative=None,
        )

    def take(self, x: Tensor) -> Tensor:
        """(B or 1, previous width, ...) to (B, W, ...): the previous segment's rows of this segment."""
        if self.relative is None:
            return x
        index = self.relative.to(x.device)
        return kernels.gather_tokens(x.expand(index.shape[0], *x.shape[1:]), index)

    def take_all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """`take` of several tensors of one device at once."""
        if self.relative is None or not tensors:
            return list(tensors)
        return kernels.compact(tensors, self.relative.to(tensors[0].device))

    def from_prompt(self, x: Tensor) -> Tensor:
        """(B or 1, L, ...) per-prompt values to (B, W, ...)."""
        index = self.index.to(x.device)
        return kernels.gather_tokens(x.expand(index.shape[0], *x.shape[1:]), index)

    def kept(self) -> Tensor:
        """(B, L) bool: prompt columns that stand in this segment."""
        real = torch.ones_like(self.index, dtype=torch.bool) if self.mask is None else self.mask
        return torch.zeros(self.index.shape[0], self.full, dtype=torch.bool, device=self.device).scatter(
            1, self.index, real
        )

    def spread(self, x: Tensor) -> Tensor:
        """(B, W, D) to (B, L, D): every prompt column gets its own row, a dropped one that of the last survivor before
        it (so that the token after an image is predicted from the last token that was really there)."""
        rank = self.kept().cumsum(1)
        start = on_device([self.width - size - 1 for size in self.lengths], self.device)
        column = (rank + start[:, None]).clamp_min(0).to(x.device)
        return kernels.gather_tokens(x, column)
