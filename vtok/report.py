"""What a prefill did: kept tokens, merged groups, counts per layer, costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vtok.engine.prefill import Prefill
from vtok.protocol import Part


@dataclass
class StageReport:
    """One stage: ``kept[sample][image]`` as they stood after it; it acted before ``layer`` of its site."""

    site: str
    layer: int | None
    kept: list[list[Tensor]]

    def __str__(self) -> str:
        where = self.site if self.layer is None else f"{self.site} layer {self.layer}"
        total = sum(len(kept) for sample in self.kept for kept in sample)
        return f"{where}: {total}"


@dataclass
class Report:
    """The last prefill of a compressed model.

    Attributes:
        method: the chain's name. ``keep``: the budget. ``family``: of the model.
        kept: ``kept[sample][image]``: original token indices of that image, ascending, after the last stage.
        groups: ``groups[sample][image]``: merged groups (lists of original indices), ``None`` where nothing merged.
        stages: the same for every stage.
        parts: ``parts[sample][image]``: the rectangles that the indices count through.
        tokens_in, tokens_kept, average_tokens: visual tokens per image: at the input, after the last stage, averaged
            over the decoder layers (mean over the images of the batch).
        layer_tokens: visual tokens per image that each decoder layer saw.
        mac_ratio: multiply-accumulates of the decoder's prefill on visual tokens, relative to the plain model.
        seconds: by phase: encode (vision side), select (methods), prefill (text model, selection inside included).
    """

    method: str
    keep: float
    family: str
    kept: list[list[Tensor]]
    groups: list[list[list[list[int]] | None]]
    stages: list[StageReport]
    parts: list[list[tuple[Part, ...]]]
    tokens_in: float
    tokens_kept: float
    layer_tokens: list[float]
    average_tokens: float
    mac_ratio: float
    seconds: dict[str, float]

    def __str__(self) -> str:
        rows = [
            ("method", self.method),
            ("family", self.family),
            ("budget", f"{self.keep:g}"),
            ("images", str(sum(len(sample) for sample in self.kept))),
            ("visual tokens in", f"{self.tokens_in:g}"),
            ("visual tokens kept", f"{self.tokens_kept:g}"),
            ("average over layers", f"{self.average_tokens:.1f}"),
            ("per layer", _runs(self.layer_tokens)),
            ("MAC ratio", f"{self.mac_ratio:.3f}"),
            *[(f"{phase} (s)", f"{seconds:.4f}") for phase, seconds in self.seconds.items()],
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for JSON."""
        return {
            "method": self.method,
            "keep": self.keep,
            "family": self.family,
            "tokens_in": self.tokens_in,
            "tokens_kept": self.tokens_kept,
            "average_tokens": self.average_tokens,
            "layer_tokens": self.layer_tokens,
            "mac_ratio": self.mac_ratio,
            "seconds": self.seconds,
            "kept": [[kept.tolist() for kept in sample] for sample in self.kept],
            "stages": [
                {"site": s.site, "layer": s.layer, "kept": [[k.tolist() for k in sample] for sample in s.kept]}
                for s in self.stages
            ],
        }


def of_prefill(
    run: Prefill | None, batch: int, method: str, keep: float, family: str, config: Any, depth: int
) -> Report:
    """Build the report of a prefill; ``None``: a text-only one of ``batch`` samples."""
    if run is None:
        empty: list[list[Any]] = [[] for _ in range(batch)]
        return Report(method, keep, family, empty, empty, [], empty, 0, 0, [0.0] * depth, 0.0, 1.0, {})
    spans = run.spans
    by_sample = lambda values: [  # noqa: E731
        [value for span, value in zip(spans, values, strict=True) if span.sample == row] for row in range(batch)
    ]
    last = run.segments[-1]
    first = run.segments[run._first]
    layers = []
    for layer in range(depth):
        segment = run.segments[run._segment_of(layer)]
        layers.append(sum(len(tokens) for tokens in segment.tokens) / len(spans))
    tokens_in = sum(span.length for span in spans) / len(spans)
    sort = lambda tokens: tokens.sort().values.cpu()  # noqa: E731
    stages = [StageReport(cut.site, cut.layer, by_sample([sort(t) for t in cut.tokens])) for cut in run.cuts]
    groups = [_groups(run.groups.get(number), last.tokens[number]) for number in range(len(spans))]
    full, now = 0.0, 0.0
    for number, span in enumerate(spans):
        full += depth * macs(span.length, config)
        now += sum(macs(len(run.segments[run._segment_of(i)].tokens[number]), config) for i in range(depth))
    return Report(
        method=method,
        keep=keep,
        family=family,
        kept=by_sample([sort(tokens) for tokens in last.tokens]),
        groups=by_sample(groups),
        stages=stages,
        parts=by_sample([span.encoded.medium.parts for span in spans]),
        tokens_in=tokens_in,
        tokens_kept=sum(len(tokens) for tokens in last.tokens) / len(spans),
        layer_tokens=layers,
        average_tokens=sum(layers) / depth if depth else sum(len(t) for t in first.tokens) / len(spans),
        mac_ratio=now / full if full else 1.0,
        seconds=run.timer.seconds(),
    )


def of_tower(state: Any, method: str, keep: float, family: str) -> Report:
    """The report of a bare vision transformer: one image a row, indices of patches, no decoder."""
    tiles = len(state.counts)
    split = lambda kept: [[row.nonzero().flatten().cpu()] for row in kept]  # noqa: E731
    kept = split(state.kept())
    stages = [StageReport("encoder", layer, split(mask)) for layer, mask in state.stages]
    groups: list[list[Any]] = [[None]] * tiles
    if state.merged:
        groups = [[_groups(dst, own[0])] for dst, own in zip(state.dst, kept, strict=True)]
    side = round(state.total**0.5)
    part = Part(side, side) if side * side == state.total else Part(1, state.total)
    left = sum(state.counts) / tiles
    return Report(
        method, keep, family, kept, groups, stages, [[(part,)]] * tiles, state.total, left, [], left, 1.0, {}
    )  # fmt: skip


def macs(tokens: int, config: Any) -> float:
    """Multiply-accumulates of one decoder layer on n visual tokens: projections, attention, gated feed-forward.

    With as many key as query heads this is the 4 n d^2 + 2 n^2 d + 3 n d m of the PyramidDrop and TransPrune papers.
    """
    d = config.hidden_size
    width = getattr(config, "head_dim", None) or d // config.num_attention_heads
    queries = config.num_attention_heads * width
    keys = config.num_key_value_heads * width
    projections, feed = 2 * d * queries + 2 * d * keys, 3 * d * config.intermediate_size
    return tokens * (projections + feed) + 2 * tokens**2 * queries


def _groups(dst: Tensor | None, standing: Tensor) -> list[list[int]] | None:
    """Merged groups of the tokens that stand at the end, in their order."""
    if dst is None:
        return None
    members: dict[int, list[int]] = {}
    for token, target in enumerate(dst.tolist()):
        if target >= 0:
            members.setdefault(target, []).append(token)
    return [members.get(token, [token]) for token in standing.sort().values.tolist()]


def _runs(values: list[float]) -> str:
    """``576 x2, 64 x30``."""
    runs: list[tuple[float, int]] = []
    for value in values:
        if runs and runs[-1][0] == value:
            runs[-1] = (value, runs[-1][1] + 1)
        else:
            runs.append((value, 1))
    return ", ".join(f"{value:g} x{count}" for value, count in runs)
