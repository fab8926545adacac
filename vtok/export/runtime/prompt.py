"""Prompts for the exported decoder: pictures' placeholders give way to the tokens that are kept of them.

All arrays are NumPy's: the runtimes need no torch for this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vtok.errors import VtokError
from vtok.export.runtime.settings import Settings


@dataclass
class Prompt:
    """A batch as the decoder takes it, samples aligned to the right.

    Attributes
    ----------
    ids : ndarray
        (B, W) int64; a placeholder's id where a visual token stands, padding's before a sample's first column.
    mask : ndarray
        (B, W) int64, 0 on padding.
    visual : ndarray
        (B, W) bool: where visual tokens stand, in the order of pictures and of their kept tokens.
    positions : ndarray
        (B, W) int64, or (3, B, W).
    following : ndarray
        (B,) int64: position of the first new token.
    kept : list of list of ndarray
        Of every sample and picture, original indices of the kept tokens, ascending.
    """

    ids: np.ndarray
    mask: np.ndarray
    visual: np.ndarray
    positions: np.ndarray
    following: np.ndarray
    kept: list[list[np.ndarray]]


def build(settings: Settings, ids: np.ndarray, mask: np.ndarray, kept: np.ndarray) -> Prompt:
    """The compressed prompt of a batch.

    Parameters
    ----------
    settings : Settings
        Of the folder.
    ids, mask : ndarray
        (B, L) prompts as the model's processor gives them, and 0 where there is padding, on either side.
    kept : ndarray
        (pictures, k) int64, in the order of the prompts: indices within a picture's placeholders, ascending.

    Raises
    ------
    VtokError
        The placeholders are not those of the pictures.
    """
    real = mask.astype(bool)
    placeholder = (ids == settings.image_token) & real
    owned = _pictures(settings, placeholder, len(kept))
    positions, following = _positions(settings, real, placeholder)
    stays = real & ~placeholder
    by_sample: list[list[np.ndarray]] = []
    taken = 0
    for sample, count in enumerate(owned):
        columns = np.flatnonzero(placeholder[sample]).reshape(count, settings.plan.tokens_in)
        own = kept[taken : taken + count]
        stays[sample, np.take_along_axis(columns, own, 1)] = True
        by_sample.append(list(own))
        taken += count
    lengths = stays.sum(1)
    width = int(lengths.max())
    # a stable sort puts what stays behind what goes, in its order
    index = np.argsort(stays, axis=1, kind="stable")[:, -width:]
    real = np.arange(width)[None] >= width - lengths[:, None]
    visual = np.take_along_axis(placeholder, index, 1) & real
    positions = np.take_along_axis(positions, np.broadcast_to(index, (*positions.shape[:-1], width)), -1)
    if settings.plan.positions == "reindex":
        positions, following = np.maximum(real.cumsum(1) - 1, 0), lengths
    return Prompt(
        ids=np.where(real, np.take_along_axis(ids, index, 1), settings.padding).astype(np.int64),
        mask=real.astype(np.int64),
        visual=visual,
        positions=np.ascontiguousarray(positions, dtype=np.int64),
        following=following.astype(np.int64),
        kept=by_sample,
    )


def _pictures(settings: Settings, placeholder: np.ndarray, pictures: int) -> list[int]:
    """Pictures of each sample."""
    size = settings.plan.tokens_in
    counts = placeholder.sum(1)
    if (counts % size).any() or counts.sum() != pictures * size:
        raise VtokError(
            f"the prompts hold {counts.tolist()} placeholders and {pictures} pictures came with them, but a picture of "
            f"this export has {size}; let the folder's processor write the prompts, and give it pictures of the "
            "layout that the export was made for"
        )
    return (counts // size).tolist()


def _positions(settings: Settings, real: np.ndarray, placeholder: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Position ids of the uncompressed prompt, and the position behind it."""
    if not settings.multimodal:
        return np.maximum(real.cumsum(1) - 1, 0), real.sum(1)
    _, height, width = (int(side) for side in settings.plan.layout["grid_thw"])
    rows, columns = height // settings.merge, width // settings.merge
    # a picture's own ids (time, row, column) begin where the text before it ends, and the text behind it goes on after
    # the larger side (Qwen2-VL, arXiv 2409.12191, section 2.1)
    cell = np.stack([np.zeros(rows * columns, int), *np.divmod(np.arange(rows * columns), columns)])
    positions = np.zeros((3, *real.shape), np.int64)
    following = np.zeros(len(real), np.int64)
    for sample in range(len(real)):
        where = np.flatnonzero(real[sample])
        start, place = 0, 0
        while place < len(where):
            if placeholder[sample, where[place]]:
                positions[:, sample, where[place : place + cell.shape[1]]] = cell + start
                place, start = place + cell.shape[1], start + max(rows, columns)
            else:
                positions[:, sample, where[place]] = start
                place, start = place + 1, start + 1
        following[sample] = start
    return positions, following
