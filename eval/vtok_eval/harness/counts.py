"""Visual tokens of every sample, from the report of a batch: what was kept, and what each decoder layer saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vtok.api import SESSION, report
from vtok.protocol import Adapter
from vtok.report import Report, macs
from vtok_eval.harness import bits


@dataclass(frozen=True)
class Seen:
    """One sample.

    Attributes
    ----------
    tokens : list of int
        Visual tokens of each image before anything is dropped.
    kept : list of str
        What stands of each image at the end, as ``bits.pack`` writes it.
    layers : list of list
        ``[number of layers, tokens per image]`` runs through the decoder, mean over the sample's images.
    mac_ratio : float
        Multiply-accumulates of the decoder's prefill on visual tokens, relative to all tokens.
    """

    tokens: list[int]
    kept: list[str]
    layers: list[list[float]]
    mac_ratio: float

    @property
    def average(self) -> float:
        """Visual tokens per image, averaged over the decoder layers."""
        depth = sum(run[0] for run in self.layers)
        return sum(count * tokens for count, tokens in self.layers) / depth if depth else 0.0


def of_last(model: Any, adapter: Adapter, inputs: Mapping[str, Any], images: Sequence[int]) -> list[Seen]:
    """Every sample of the batch that ran last, compressed or not; ``images`` counts those of each sample."""
    if SESSION not in model.__dict__:
        return of_plain(adapter, inputs, images)
    return of_report(report(model), adapter.text.config, len(adapter.text.layers))


def of_report(found: Report, config: Any, depth: int) -> list[Seen]:
    """Every sample of a compressed batch; ``config`` is the text model's."""
    return [_of_sample(found, row, config, depth) for row in range(len(found.kept))]


def _of_sample(found: Report, row: int, config: Any, depth: int) -> Seen:
    tokens = [sum(part.length for part in parts) for parts in found.parts[row]]
    profiles = []
    for image, size in enumerate(tokens):
        now, profile = size, []
        cuts: dict[int, int] = {}
        for stage in found.stages:
            left = len(stage.kept[row][image])
            if stage.site == "decoder" and stage.layer is not None:
                cuts[stage.layer] = left
            else:
                now = left
        for layer in range(depth):
            now = cuts.get(layer, now)
            profile.append(now)
        profiles.append(profile)
    kept = [bits.pack(own.tolist(), size) for own, size in zip(found.kept[row], tokens, strict=True)]
    return _seen(tokens, kept, profiles, config, depth)


def of_plain(adapter: Adapter, inputs: Mapping[str, Any], images: Sequence[int]) -> list[Seen]:
    """Every sample of a batch in which nothing is dropped; ``images`` counts those of each sample."""
    media = list(adapter.media("image", inputs)) if any(images) else []
    config = adapter.text.config
    depth, start, found = len(adapter.text.layers), 0, []
    for number in images:
        tokens = [medium.length for medium in media[start : start + number]]
        kept = [bits.pack(range(size), size) for size in tokens]
        found.append(_seen(tokens, kept, [[size] * depth for size in tokens], config, depth))
        start += number
    return found


def _seen(tokens: list[int], kept: list[str], profiles: list[list[int]], config: Any, depth: int) -> Seen:
    if not tokens:
        return Seen([], [], [[depth, 0.0]], 1.0)
    means = [sum(column) / len(tokens) for column in zip(*profiles, strict=True)]
    full = sum(depth * macs(size, config) for size in tokens)
    now = sum(macs(left, config) for profile in profiles for left in profile)
    return Seen(tokens, kept, runs(means), now / full)


def runs(values: Sequence[float]) -> list[list[float]]:
    """``[9, 9, 4]`` as ``[[2, 9], [1, 4]]``."""
    found: list[list[float]] = []
    for value in values:
        if found and found[-1][1] == value:
            found[-1][0] += 1
        else:
            found.append([1, value])
    return found


def spread(found: Sequence[Sequence[float]]) -> list[float]:
    """The inverse of ``runs``."""
    return [tokens for count, tokens in found for _ in range(int(count))]
