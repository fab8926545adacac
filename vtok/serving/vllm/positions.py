"""Multimodal rotary positions of prompts whose pictures have lost tokens.

Survivors keep the row and column they had. Which tokens survive is known once the tower has run, so vLLM takes their
positions from the embeddings: further channels carry them (its pruning interface, made for videos). Positions of text
follow from the grids alone and are right from the start; so a prompt may be prefilled in chunks, or find its first
pictures in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: numbers of one row: its rank among the survivors, then time, row and column. bfloat16 holds integers up to 256, so
#: each takes two channels
NUMBERS = 4
CHANNELS = 2 * NUMBERS
BASE = 128


class Run(NamedTuple):
    """Placeholders of one picture or video in a prompt: first column, how many, and how many positions it takes."""

    offset: int
    length: int
    extent: int


def grid_positions(frames: int, rows: int, columns: int, step: float = 1.0) -> Tensor:
    """(3, frames * rows * columns) time, row and column of every token; ``step``: positions between two frames."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(rows), torch.arange(columns), indexing="ij")
    positions = torch.stack([axis.flatten() for axis in axes])
    if step != 1.0:
        positions[0] = (positions[0] * step).long()
    return positions


def prompt_positions(length: int, runs: Sequence[Run]) -> tuple[Tensor, int]:
    """Positions (3, length) of a prompt, and what the number of a further token adds to the prompt's length.

    Survivors stand at their picture's first position until ``place`` moves them.
    """
    positions = torch.zeros(3, length, dtype=torch.long)
    column, start = 0, 0
    for run in runs:
        text = run.offset - column
        positions[:, column : run.offset] = torch.arange(start, start + text)
        start += text
        positions[:, run.offset : run.offset + run.length] = start
        column, start = run.offset + run.length, start + run.extent
    positions[:, column:] = torch.arange(start, start + length - column)
    return positions, start - column


def pack(features: Tensor, positions: Tensor) -> Tensor:
    """(k, D + CHANNELS) embeddings with the positions (3, k) of survivors beside them."""
    rank = torch.arange(len(features), device=features.device)[None]
    numbers = torch.cat((rank, positions.to(features.device))).T
    digits = torch.stack((numbers // BASE, numbers % BASE), -1).flatten(1)
    return torch.cat((features, digits.to(features.dtype)), 1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (k, D), ranks (k,) and positions (3, k) of what ``pack`` put together, or of some rows of it."""
    digits = packed[:, -CHANNELS:].round().long().unflatten(1, (NUMBERS, 2))
    numbers = digits[..., 0] * BASE + digits[..., 1]
    return packed[:, :-CHANNELS], numbers[:, 0], numbers[:, 1:].T


def place(
    media_columns: Tensor, packed: Sequence[Tensor], positions: Tensor, computed: int
) -> tuple[list[Tensor], Tensor, int]:
    """Move the survivors of one chunk of a prompt to their own positions.

    Args:
        media_columns: columns of the prompt that are placeholders, ascending.
        packed: rows of every picture that the chunk touches, in order; each row as from ``pack``.
        positions: (3, length) of the whole prompt, as from ``prompt_positions``.
        computed: columns before the chunk.

    Returns:
        The embeddings alone, the positions, and what the number of a further token adds to the prompt's length.
    """
    positions = positions.clone()
    features = []
    column = int((media_columns < computed).sum())
    for rows in packed:
        own, ranks, relative = unpack(rows)
        features.append(own)
        where = media_columns[column : column + len(rows)]
        column += len(rows)
        if len(rows):
            # text stands before every picture of a chat template, and every frame of a video: the vision start token
            before = where - ranks - 1
            start = torch.where(before >= 0, positions[0, before.clamp_min(0)] + 1, 0)
            positions[:, where] = relative.to(positions) + start
    return features, positions, int(positions.max()) + 1 - positions.shape[1]
