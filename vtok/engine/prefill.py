"""One compressed prefill: from located spans to per-layer segments, statistics on the way, and back to full length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_causal_mask

import vtok_kernels as kernels
from vtok.budget import Counts
from vtok.engine import rows
from vtok.engine.cache import cache_of
from vtok.engine.host import on_device
from vtok.engine.segments import Segment
from vtok.engine.spans import Span
from vtok.engine.timing import Timer
from vtok.protocol import Adapter
from vtok.view import DecoderView, Selection, Stage, View


@dataclass
class Cut:
    """What one stage left, for the report: ``tokens[i]`` are the image's indices that stand in span i."""

    site: str
    layer: int | None
    tokens: list[Tensor]


@dataclass
class Prefill:
    """State of one prefill. Travels with the call into every decoder layer, so a recomputed layer finds it again.

    ``draft`` columns at the end are no part of the prompt (speculative decoding): no statistic sees them.
    """

    adapter: Adapter
    spans: list[Span]
    counts: list[Counts]
    input_stages: Sequence[tuple[Stage, list[int]]]
    decoder_stages: Sequence[Stage]
    reindex: bool
    draft: int = 0
    timer: Timer = field(default_factory=Timer)
    segments: list[Segment] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    groups: dict[int, Tensor] = field(default_factory=dict)
    poured: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    captured: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    transition: dict[int, Tensor] = field(default_factory=dict)
    planes: list[Tensor] = field(default_factory=list)
    plane_rows: Tensor | None = None
    position_ids: Tensor | None = None
    rotary: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[int, Any] = field(default_factory=dict)

    # -- before the first layer ---------------------------------------------------------------------------------

    def enter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Gather everything the text model gets. Returns its keyword arguments, changed where tokens were dropped."""
        embeds: Tensor = kwargs["inputs_embeds"]
        batch, length, _ = embeds.shape
        real = padding_of(kwargs.get("attention_mask"), length)
        columns = [span.columns for span in self.spans]
        segment = Segment.whole(real, batch, length, columns, embeds.device)
        samples = [span.sample for span in self.spans]
        self.segments = [segment]
        for span in self.spans:
            span.tail -= self.draft
        embeds = self._select_inputs(embeds, segment, samples)
        segment = self.segments[-1]
        moved = len(self.segments) > 1 and any(item.relative is not None for item in self.segments)
        if self.decoder_stages and segment.mask is not None and not moved:
            # right-align padded prompts, so that the last column is every sample's last prompt token
            segment = segment.narrow(0, samples, [None] * len(samples), always=True)
            self.segments.append(segment)
            embeds, moved = segment.take(embeds), True
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=embeds.device)[None]
        self.position_ids = self._positions(positions, segment)
        if not moved:
            self._deepstack(kwargs, segment, moved=False)
            return kwargs
        kwargs = dict(kwargs)
        kwargs["inputs_embeds"] = embeds
        kwargs["position_ids"] = self.position_ids
        kwargs["attention_mask"] = self._input_mask(kwargs, segment)
        self._deepstack(kwargs, segment, moved=True)
        return kwargs

    def _select_inputs(self, embeds: Tensor, segment: Segment, samples: list[int]) -> Tensor:
        """What the tower dropped, then the input stages in order."""
        slots = [span.encoded.slots for span in self.spans]
        tokens = [span.encoded.tokens for span in self.spans]
        if any(item is not None for item in tokens):
            segment = segment.narrow(0, samples, tokens, slots)
            embeds = segment.take(embeds)
            self.segments.append(segment)
            self.cuts.extend(_tower_cuts(self.spans))
            self.groups.update(
                {
                    number: span.encoded.groups
                    for number, span in enumerate(self.spans)
                    if span.encoded.groups is not None
                }
            )
        for stage, counts in self.input_stages:
            start = self.timer.begin(embeds.device)
            kept, merged = self._choose(stage, embeds, segment, counts)
            for number, features in merged.items():
                embeds = _replace(embeds, self.spans[number].sample, segment.columns[number][kept[number]], features)
            segment = segment.narrow(0, samples, kept)
            embeds = segment.take(embeds)
            self.segments.append(segment)
            self.cuts.append(Cut("input", None, list(segment.tokens)))
            self.timer.end("select", start, embeds.device)
        return embeds

    def _positions(self, positions: Tensor, segment: Segment) -> Tensor:
        """Position ids of the first decoder segment: the survivors' own, or closed up."""
        index = segment.index
        if positions.ndim == 3:
            own = positions.expand(-1, index.shape[0], -1).gather(2, index.expand(positions.shape[0], -1, -1))
        else:
            own = positions.expand(index.shape[0], -1).gather(1, index)
        return own - segment.removed if self.reindex else own

    def _input_mask(self, kwargs: Mapping[str, Any], segment: Segment) -> Tensor | None:
        if segment.mask is not None:
            return segment.mask.long()
        if cache_of(kwargs) is None:
            # without a mask and a cache, gaps in the position ids would be taken for packed sequences
            return torch.ones_like(segment.index)
        return None

    def _deepstack(self, kwargs: dict[str, Any], segment: Segment, moved: bool) -> None:
        """Qwen3-VL adds feature planes after the first decoder layers, at visual positions: gather them with the same
        indices, or take the adding over where a cut falls between them."""
        planes, where = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
        if planes is None or where is None:
            return
        where = where.to(segment.device)
        row = where.flatten().cumsum(0).view_as(where) - 1
        planes = [self.pour(plane, row) for plane in planes]
        real = torch.ones_like(segment.index, dtype=torch.bool) if segment.mask is None else segment.mask
        visual = where.gather(1, segment.index) & real
        if self.decoder_stages and min(stage.layer or 0 for stage in self.decoder_stages) <= len(planes):
            self.planes = list(planes)
            self.plane_rows = torch.where(visual, row.gather(1, segment.index), -1)
            kwargs["deepstack_visual_embeds"] = kwargs["visual_pos_masks"] = None
        elif moved:
            kept = segment.kept()[where]
            kwargs["visual_pos_masks"] = visual
            kwargs["deepstack_visual_embeds"] = [plane[kept.to(plane.device)] for plane in planes]

    def pour(self, plane: Tensor, row: Tensor) -> Tensor:
        """A plane in which a token that is an average of others holds their average. ``row`` (B, L): a column's row of
        the plane."""
        for number, (tokens, kept, weights) in self.poured.items():
            own = row[self.spans[number].sample, self.spans[number].columns].to(plane.device)
            plane = plane.index_put((own[kept],), weights.to(plane) @ plane[own[tokens]])
        return plane

    # -- inside the decoder -------------------------------------------------------------------------------------

    def layer(self, number: int, layers: Sequence[nn.Module], hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Before decoder layer ``number``: cut if a stage is due, then give the layer its own segment's tensors."""
        first = self._first
        if self.planes and 0 < number <= len(self.planes):
            hidden = self._add_plane(number - 1, hidden)
        done = any(segment.layer == number for segment in self.segments[first + 1 :])
        if not done:
            for stage in self.decoder_stages:
                if stage.layer == number:
                    self._cut(stage, layers, hidden, kwargs)
        for position in range(first + 1, len(self.segments)):
            if self.segments[position].layer == number:
                hidden = self.segments[position].take(hidden)
        current = self._segment_of(number)
        if current > first and any(segment.relative is not None for segment in self.segments[first + 1 : current + 1]):
            kwargs["position_embeddings"] = self._rotary(current, kwargs["position_embeddings"], hidden)
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = self._relative_to_first(current, kwargs["position_ids"])
            kwargs["attention_mask"] = self._mask(current, hidden)
        return hidden

    @property
    def _first(self) -> int:
        """Position of the segment that the first decoder layer sees."""
        position = 0
        for number, segment in enumerate(self.segments):
            if segment.layer == 0:
                position = number
        return position

    def _segment_of(self, layer: int) -> int:
        position = self._first
        for number in range(position + 1, len(self.segments)):
            if self.segments[number].layer <= layer:
                position = number
        return position

    def _add_plane(self, plane: int, hidden: Tensor) -> Tensor:
        assert self.plane_rows is not None
        position = self._segment_of(plane)
        at = self._relative_to_first(position, self.plane_rows).to(hidden.device)
        rows_ = self.planes[plane].to(hidden.device, hidden.dtype)[at.clamp_min(0)]
        return hidden + rows_ * (at >= 0).unsqueeze(-1)

    def _relative_to_first(self, position: int, x: Tensor) -> Tensor:
        """(B, W_first, ...) values of the first decoder segment to those of a later one."""
        for segment in self.segments[self._first + 1 : position + 1]:
            x = segment.take(x)
        return x

    def _rotary(self, position: int, given: tuple[Tensor, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
        if position not in self.rotary:
            segment, first = self.segments[position], self.segments[self._first]
            if self.reindex and segment.dropped != first.dropped:
                assert self.position_ids is not None
                own = self._relative_to_first(position, self.position_ids)
                before = self._relative_to_first(position, first.removed)
                ids = own - (segment.removed - before)
                self.rotary[position] = self.adapter.text.rotary_emb(hidden, position_ids=ids)
            else:
                cos, sin = given
                for segment in self.segments[self._first + 1 : position + 1]:
                    cos, sin = segment.take_all((cos, sin))
                self.rotary[position] = (cos, sin)
        return self.rotary[position]

    def _mask(self, position: int, hidden: Tensor) -> Any:
        if position not in self.masks:
            mask = self.segments[position].mask
            padding = None if mask is None else mask.long().to(hidden.device)
            # by place: transformers renames the last one, the cache, in 5.24
            self.masks[position] = create_causal_mask(self.adapter.text.config, hidden, padding, None)
        return self.masks[position]

    @torch.no_grad()  # a recomputed layer does not cut again, and must save no fewer tensors than the first time
    def _cut(self, stage: Stage, layers: Sequence[nn.Module], hidden: Tensor, kwargs: dict[str, Any]) -> None:
        segment = self.segments[-1]
        which = next(i for i, own in enumerate(self.decoder_stages) if own is stage)
        start = self.timer.begin(hidden.device)
        rotary = kwargs["position_embeddings"]
        if len(self.segments) - 1 > self._first:
            rotary = self._rotary(len(self.segments) - 1, rotary, hidden)
        previous: Any = layers[stage.layer - 1] if stage.layer else None
        source = rows.Rows(
            segment=segment.prompt(self.draft),
            spans=self.spans,
            captured={key: self._prompt(x) for key, x in self.captured.pop((stage.layer or 0) - 1, {}).items()},
            transition=self.transition,
            previous=previous.self_attn if previous is not None else None,
            layer=layers[stage.layer or 0],
            hidden=self._prompt(hidden),
            rotary=(self._prompt(rotary[0]), self._prompt(rotary[1])),
            reserved=rows.reserved(self.segments[self._first], self.spans),
        )
        kept, _ = self._choose(stage, hidden, segment, [counts.cuts[which] for counts in self.counts], source)
        after = segment.narrow(stage.layer or 0, [span.sample for span in self.spans], kept)
        self.segments.append(after)
        self.transition = {number: after.take(values) for number, values in self.transition.items()}
        self.cuts.append(Cut("decoder", stage.layer, list(after.tokens)))
        self.timer.end("select", start, hidden.device)

    @property
    def query_rows(self) -> int | None:
        """How many of the last columns can be query rows of a text statistic; ``None``: any column (text lies between
        the images, so ToDRE's visual rows see some)."""
        found = rows.reserved(self.segments[self._first], self.spans)
        return None if found is None else found + self.draft

    def _prompt(self, x: Tensor) -> Tensor:
        """(B, N, ...) without the columns of a draft."""
        return x[:, : x.shape[1] - self.draft]

    def observe_transition(self, layer: int, part: str, before: Tensor, after: Tensor, couple_batch: bool) -> None:
        """Add one sub-module's token transition (TransPrune eq. 2-4) to the running sum."""
        segment = self.segments[self._segment_of(layer)].prompt(self.draft)
        values = rows.transition(self._prompt(before), self._prompt(after), segment.mask, couple_batch)
        values = F.pad(values, (0, self.draft))
        self.transition[0] = self.transition.get(0, torch.zeros_like(values)) + values

    # -- choosing -----------------------------------------------------------------------------------------------

    def _choose(
        self, stage: Stage, x: Tensor, segment: Segment, counts: Sequence[int], source: rows.Rows | None = None
    ) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        """Ask the stage about all spans, those of one size and layout together.

        Returns:
            Kept positions per span (``None``: all stay) and the merged features of spans whose tokens changed.
        """
        assert stage.select is not None
        together: dict[tuple, list[int]] = {}
        for number, span in enumerate(self.spans):
            size = len(segment.columns[number])
            whole = counts[number] >= span.length or (counts[number] >= size and stage.floor > 0)
            if size == 0 or whole:
                continue
            medium = span.encoded.medium
            saliency = span.encoded.saliency is not None
            together.setdefault((size, counts[number], medium.parts, medium.base, saliency), []).append(number)
        kept: list[Tensor | None] = [None] * len(self.spans)
        merged: dict[int, Tensor] = {}
        for (_, count, parts, base, has_saliency), numbers in together.items():
            columns = torch.stack([segment.columns[number] for number in numbers])
            samples = on_device([self.spans[number].sample for number in numbers], columns.device)
            tokens = torch.stack([segment.tokens[number] for number in numbers])
            common: dict[str, Any] = {
                "features": x[samples.to(x.device)[:, None], columns.to(x.device)],
                "tokens": tokens,
                "parts": parts,
                "places": [self.spans[number].place for number in numbers],
                "layer": stage.layer,
                "base": base,
            }
            if has_saliency:
                found = [self.spans[number].encoded.saliency for number in numbers]
                full = torch.stack([own for own in found if own is not None])
                common["saliency"] = full.to(tokens.device).gather(1, tokens)
            view = View(**common) if source is None else DecoderView(**common, spans=numbers, source=source)
            answer = stage.select(view, count)
            self._take(answer, numbers, kept, merged, segment)
        return kept, merged

    def _take(
        self, answer: Tensor | Selection, numbers: list[int], kept: list[Tensor | None], merged: dict[int, Tensor],
        segment: Segment,
    ) -> None:  # fmt: skip
        if isinstance(answer, Selection):
            for row, number in enumerate(numbers):
                count = answer.indices.shape[1] if answer.counts is None else answer.counts[row]
                kept[number] = answer.indices[row, :count]
                if answer.features is not None:
                    merged[number] = answer.features[row, :count]
                if answer.weights is not None:
                    own = segment.tokens[number]
                    self.poured[number] = own, own[answer.indices[row, :count]], answer.weights[row, :count]
                if answer.groups is not None:
                    local = answer.groups[row]
                    own = segment.tokens[number]
                    target = torch.where(local >= 0, own[answer.indices[row]][local.clamp_min(0)], -1)
                    whole = torch.full((self.spans[number].length,), -1, device=own.device)
                    self.groups[number] = whole.scatter(0, own, target)
        elif answer.dtype == torch.bool:
            # the one synchronisation of a data-dependent length
            sizes = answer.sum(1).tolist()
            for row, number in enumerate(numbers):
                kept[number] = kernels.topk(answer[row : row + 1].float(), sizes[row])[0]
        else:
            for row, number in enumerate(numbers):
                kept[number] = answer[row]


def padding_of(mask: Any, length: int) -> Tensor | None:
    """(B, L) bool from whatever mask the text model was given: 2-D, prepared 4-D (its last query sees every real
    token), a dict of these, or none."""
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 2:
        return mask[:, :length].bool()
    last = mask[:, 0, -1, :length]
    return last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2


def _replace(x: Tensor, sample: int, columns: Tensor, features: Tensor) -> Tensor:
    index = (torch.full_like(columns, sample), columns)
    return x.index_put(index, features.to(x.dtype))


def _tower_cuts(spans: Sequence[Span]) -> list[Cut]:
    """The tower's stages, lined up over the spans (a span whose tower had fewer keeps its last)."""
    depth = max(len(span.encoded.stages) for span in spans)
    cuts = []
    for number in range(depth):
        tokens, layer = [], None
        for span in spans:
            stages = span.encoded.stages
            if not stages:
                tokens.append(torch.arange(span.length, device=span.columns.device))
                continue
            layer, kept = stages[min(number, len(stages) - 1)]
            tokens.append(kept.nonzero().flatten())
        cuts.append(Cut("encoder", layer, tokens))
    return cuts
