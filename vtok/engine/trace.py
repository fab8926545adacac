"""A plain prefill recorded layer by layer, and replays of its deep layers on fewer columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

import vtok_kernels as kernels
from vtok.protocol import Adapter, Part


@dataclass
class Trace:
    """One plain prefill, as every asked layer saw it, and the columns that variants of it consist of.

    ``hidden[i]`` (1, L, D) and ``rotary[i]`` enter layer i; ``planes`` (1, L, D) are added after the first layers.
    """

    adapter: Adapter
    head: Any
    answer: int
    full: float
    hidden: dict[int, Tensor]
    rotary: dict[int, tuple[Tensor, Tensor]]
    planes: list[Tensor]
    real: Tensor
    visual: Tensor
    cells: list[Tensor]
    tokens: tuple[Tensor, ...]
    images: tuple[int, ...]
    grids: tuple[tuple[int, int], ...]

    def with_only(self, cell: Tensor | None) -> Tensor:
        """Columns of the text and of one unit."""
        keep = self.real & ~self.visual
        if cell is not None:
            keep[cell] = True
        return keep.nonzero().flatten()

    def lacking(self, cell: Tensor) -> Tensor:
        """Columns of everything but one unit."""
        keep = self.real.clone()
        keep[cell] = False
        return keep.nonzero().flatten()

    def probabilities(
        self, layer: int, variants: Sequence[Tensor], batch_size: int, advance: Callable[[int], None]
    ) -> Tensor:
        """(variants,) probability of the answer when the layers from ``layer`` on see these columns only.

        Variants of one length run together, so none needs padding.
        """
        together: dict[int, list[int]] = {}
        for number, columns in enumerate(variants):
            together.setdefault(len(columns), []).append(number)
        found = torch.zeros(len(variants))
        for numbers in together.values():
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                found[batch] = self._replay(layer, torch.stack([variants[number] for number in batch]))
                advance(len(batch))
        return found

    def _replay(self, first: int, index: Tensor) -> Tensor:
        text: Any = self.adapter.text
        hidden = _gather(self.hidden[first], index)
        rotary = tuple(_gather(part, index) for part in self.rotary[first])
        mask = create_causal_mask(text.config, hidden, None, None)
        for number in range(first, len(text.layers)):
            hidden = text.layers[number](hidden, attention_mask=mask, position_embeddings=rotary)
            if number < len(self.planes):
                hidden = hidden + _gather(self.planes[number], index).to(hidden.device)
        logits = self.head(text.norm(hidden[:, -1:]))[:, 0]
        return logits.float().softmax(-1)[:, self.answer].cpu()


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """(1, L, D) to (B, W, D)."""
    return kernels.gather_tokens(x.expand(index.shape[0], *x.shape[1:]), index.to(x.device))


def windows(parts: Sequence[Part], unit: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Token indices of every ``unit`` x ``unit`` window of an image's rectangles, and the windows' grid per rectangle.

    Windows at the right and lower edge are smaller where the sides do not divide; newline tokens belong to none.
    """
    cells, grids, start = [], [], 0
    for part in parts:
        row = part.width + (part.newlines if part.per_row else 0)
        grid = start + torch.arange(part.height)[:, None] * row + torch.arange(part.width)
        bands = grid.split(unit, dim=0)
        cells += [window.flatten() for band in bands for window in band.split(unit, dim=1)]
        grids.append((len(bands), -(-part.width // unit)))
        start += part.length
    return cells, grids


@dataclass
class Record:
    hidden: dict[int, Tensor] = field(default_factory=dict)
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    planes: list[Tensor] = field(default_factory=list)

    def layer(self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden[number] = args[0] if args else kwargs["hidden_states"]
        self.rotary[number] = kwargs["position_embeddings"]

    def text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Qwen3-VL's DeepStack planes, laid out over the prompt."""
        where: Any = kwargs.get("visual_pos_masks")
        for plane in kwargs.get("deepstack_visual_embeds") or ():
            dense = plane.new_zeros(*where.shape, plane.shape[-1])
            self.planes.append(dense.index_put(where.to(plane.device).nonzero(as_tuple=True), plane))


@contextmanager
def recorded(adapter: Adapter, asked: Sequence[int]) -> Iterator[Record]:
    """Record what enters the asked layers, for a block."""
    text: Any = adapter.text
    record = Record()
    handles = [text.register_forward_pre_hook(record.text, with_kwargs=True)]
    for number in set(asked):
        handles.append(text.layers[number].register_forward_pre_hook(partial(record.layer, number), with_kwargs=True))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
