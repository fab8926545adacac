"""Spans: which placeholders of which sample belong to which image, and what the tower left of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vtok.engine.host import on_device
from vtok.errors import VtokError
from vtok.protocol import Adapter, Medium


@dataclass
class Encoded:
    """One medium after the vision side.

    Attributes:
        medium: its layout.
        tokens: (count,) indices of the tokens that stand, in order of their slots; ``None`` = all.
        slots: (count,) placeholders that hold them; ``None`` = at their own places.
        count: number of tokens that stand.
        stages: (layer, (length,) bool) after every stage of the tower.
        saliency: (length,) class-token attention, where a method asked for it.
        groups: (length,) index of the token each token was poured into, -1 where dropped; ``None`` = no merging.
    """

    medium: Medium
    count: int
    tokens: Tensor | None = None
    slots: Tensor | None = None
    stages: list[tuple[int | None, Tensor]] = field(default_factory=list)
    saliency: Tensor | None = None
    groups: Tensor | None = None


@dataclass
class Encoding:
    """What one ``get_image_features`` call gave: rides on its output, so ``generate`` and ``forward`` both find it."""

    modality: str
    media: list[Encoded]


@dataclass
class Span:
    """The visual tokens of one image or video of one sample.

    Attributes:
        sample: batch row.
        place: place of the image among the images of its prompt.
        encoded: what the tower left of it.
        columns: (length,) prompt columns of its placeholders (they may lie in several runs).
        tail: real tokens after its last placeholder.
        text_before: text stands between it and an earlier image of the same prompt, or between its own frames.
    """

    sample: int
    place: int
    encoded: Encoded
    columns: Tensor
    tail: int = 0
    text_before: bool = False

    @property
    def length(self) -> int:
        return self.encoded.medium.length


def locate(ids: Tensor, adapter: Adapter, encodings: Mapping[str, Encoding], real: Tensor | None = None) -> list[Span]:
    """Spans of a batch of prompts, in order of sample and place.

    One copy of ``ids`` to the host: the only synchronisation that a prefill with fixed budgets needs.

    Args:
        ids: (B, L) token ids.
        adapter: knows the placeholder ids.
        encodings: what the tower gave, by modality.
        real: (B, L) bool, False on padding.

    Raises:
        VtokError: placeholders and features do not line up.
    """
    host = ids.cpu()
    rows: list[list[tuple[int, Encoded, list[int]]]] = [[] for _ in range(host.shape[0])]
    for modality, encoding in encodings.items():
        where = host == adapter.placeholder(modality)
        _fill(rows, where, encoding.media, modality)
    for modality in adapter.modalities:
        if modality not in encodings and bool((host == adapter.placeholder(modality)).any()):
            raise VtokError(
                f"the prompt holds {modality} placeholders but no {modality} features came with it; this happens in a "
                "chunked or continued prefill, which a compressed model cannot serve: prefill the whole prompt at once"
            )
    real = None if real is None else real.cpu()
    spans = []
    for sample, found in enumerate(rows):
        found.sort(key=lambda item: item[0])
        end = 0
        for place, (_, encoded, columns) in enumerate(found):
            after = slice(columns[-1] + 1, None)
            tail = host.shape[1] - columns[-1] - 1 if real is None else int(real[sample, after].sum())
            # text stands between this image and one before it, or (Qwen3-VL's time stamps) between a video's frames
            text_before = (place > 0 and columns[0] > end) or columns[-1] - columns[0] >= len(columns)
            spans.append(Span(sample, place, encoded, on_device(columns, ids.device), tail, text_before))
            end = columns[-1] + 1
    return spans


def _fill(
    rows: list[list[tuple[int, Encoded, list[int]]]], where: Tensor, media: Sequence[Encoded], modality: str
) -> None:
    """Hand the media out to the rows in order. ``generate`` with several beams or return sequences repeats every
    sample's row, so a row may use the media of the row before once more."""
    counts = where.sum(1).tolist()
    total = sum(encoded.medium.length for encoded in media)
    copies = sum(counts) // total if total and sum(counts) % total == 0 else 0
    if not copies or where.shape[0] % copies:
        raise VtokError(
            f"{sum(counts)} {modality} placeholders do not line up with {total} {modality} features; "
            "process text and pictures together with the model's own processor"
        )
    used = 0
    for first in range(0, where.shape[0], copies):
        start = used
        for row in range(first, first + copies):
            used, taken = start, 0
            columns = where[row].nonzero().flatten().tolist()
            while taken < counts[row]:
                encoded = media[used] if used < len(media) else None
                if encoded is None or taken + encoded.medium.length > counts[row]:
                    raise VtokError(
                        f"sample {row} holds {counts[row]} {modality} placeholders, which no whole number of its "
                        f"{modality}s fills; process text and pictures together with the model's own processor"
                    )
                run = columns[taken : taken + encoded.medium.length]
                rows[row].append((run[0], encoded, run))
                taken, used = taken + encoded.medium.length, used + 1
