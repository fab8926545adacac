"""Inside the vision towers: what reaches the placeholders equals the plain tower with dropped tokens masked as keys, or
with tokens merged by a plain loop over one picture (DESIGN.md sections 3 and 5; fusion_tokenizers A2, A3, A5).

The references take from the plain model its own sub-modules, the input of its first block, its rotary tables and its
segment bounds; attention, matching and merging are written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vtok
from vtok.api import adapter_of, session_of

from .conftest import LLAVA, anatomy, settings
from .models import FAMILIES, HAS_VIDEO, IMAGE, QWEN, Batch, build, inputs, single

TWO = [[3, "image", 4], [2, "image:84x56", 3, "image:42x70#b", 2]]
"""Three pictures in two prompts, of different size where the family knows sizes."""
VIDEO = [[2, "video", 3]]


@dataclass(frozen=True)
class ValueNorm(vtok.Method):
    """The simplest encoder method: the largest values stay."""

    site = "encoder"
    layer = 2
    reads = frozenset({"qkv"})

    def score(self, view: Any) -> Tensor:
        return view.per_cell(view.v[:, :, view.prefix :].float().norm(dim=-1).sum(1))


PRUNERS: dict[str, Any] = {"flowcut": "flowcut", "values": ValueNorm()}
MERGERS = ("tome", "mctf")


def encode(model: Any, batch: Batch, kind: str = "image") -> Any:
    """The family's own encoder call for the batch's pictures."""
    names = {"image": ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images"),
             "video": ("pixel_values_videos", "video_grid_thw")}[kind]  # fmt: skip
    call = {name: batch[name] for name in names if name in batch}
    return getattr(model.model, f"get_{kind}_features")(**call, return_dict=True)


def features(output: Any) -> list[Tensor]:
    """One (length, D) per picture."""
    pooled = output.pooler_output
    return [part.flatten(0, -2) for part in pooled]


# What the plain tower does, and what the compressed one kept


@dataclass
class Plain:
    """Inputs of the blocks of a plain tower."""

    tower: Any
    x: Tensor | None = None
    kwargs: list[dict] = field(default_factory=list)


def plain_run(model: Any, batch: Batch, kind: str = "image") -> tuple[Plain, Any]:
    tower = adapter_of(model).tower
    seen = Plain(tower)

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.x = args[0] if seen.x is None else seen.x
        seen.kwargs.append(kwargs)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in tower.layers]
    output = encode(model, batch, kind)
    for handle in handles:
        handle.remove()
    return seen, output


@contextmanager
def states(model: Any) -> Iterator[list[Any]]:
    """The engine's record of every tower run: what stood after every stage, by the tower's own numbering."""
    tower, found = session_of(model).tower, []
    original = tower._encoded

    def spy(*args: Any) -> Any:
        found.append(next(arg for arg in args if hasattr(arg, "stages")))
        return original(*args)

    tower._encoded = spy
    try:
        yield found
    finally:
        del tower._encoded


def gone_at(state: Any, layer: int, like: Tensor) -> Tensor:
    """Tokens that block ``layer`` may not see."""
    gone = torch.zeros_like(like, dtype=torch.bool)
    for before, standing in state.stages:
        if before is not None and before <= layer:
            gone = ~standing
    return gone


# The masked reference


def masked_dense(seen: Plain, state: Any) -> Tensor:
    """(tiles, N, D) features of the feature layer, prefix tokens cut off."""
    x, spec = seen.x, seen.tower
    for number in range(spec.feature_layer + 1):
        block = spec.layers[number]
        gone = gone_at(state, number, state.kept())
        gone = nn.functional.pad(gone, (spec.prefix, 0))[:, None, None]
        q, k, v = dense_projections(block, x)
        logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(gone, -torch.inf)
        x = x + block.self_attn.out_proj(joined(logits.softmax(-1) @ v))
        x = x + block.mlp(block.layer_norm2(x))
    return x[:, spec.prefix :]


def dense_projections(block: Any, x: Tensor) -> list[Tensor]:
    attention = block.self_attn
    normed = block.layer_norm1(x)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [p(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections]


def joined(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def placed(model: Any, batch: Batch, kind: str, x: Tensor, standing: Tensor) -> list[Tensor]:
    """Projected tile features in placeholder order; resampled runs are means over what stands."""
    base = model.model
    rows = base.multi_modal_projector(x) * standing[..., None]
    sizes = batch.get("image_sizes")
    line = torch.zeros(rows.shape[-1] + 1)
    if hasattr(base, "image_newline"):
        line[:-1] = base.image_newline
    rows = torch.cat((rows, standing[..., None].float()), -1)
    if kind == "video":
        frames = batch["pixel_values_videos"].shape[1]
        pooled = base.apply_pooling(rows).unflatten(0, (-1, frames)).flatten(1, 2)
        runs = [torch.cat((run, line[None])) for run in pooled]
    elif sizes is None:
        runs = list(rows)
    else:
        tiles, start, split = [m.tiles for m in adapter_of(model).media(kind, dict(batch))], 0, []
        for own in tiles:
            split.append(rows[own])
            start = own.stop
        assert start == len(rows)
        tiled = "batch_num_images" in batch
        name = "vision_aspect_ratio" if tiled else "vision_feature_select_strategy"
        options = {name: getattr(model.config, name)}
        runs, _ = base.pack_image_features(split, sizes, image_newline=line, **options)
    return [run[:, :-1] / run[:, -1:].where(run[:, -1:] > 0, 1.0) for run in runs]


def segments_of(kwargs: dict) -> Tensor:
    """Which segment each row of a packed sequence belongs to."""
    lengths = kwargs["cu_seqlens"].diff()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (seq, H, d)."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, None] + turned * sin[:, None]


def packed_projections(block: Any, x: Tensor, tables: tuple[Tensor, Tensor]) -> list[Tensor]:
    """(H, seq, d) of q, k (turned) and v, and of k before turning."""
    fused = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
    q, k, v = fused.unbind(1)
    return [t.transpose(0, 1) for t in (rotated(q, *tables), rotated(k, *tables), v, k)]


def masked_packed(model: Any, seen: Plain, state: Any) -> tuple[Tensor, list[Tensor]]:
    """Merged cells in raster order, and the DeepStack planes."""
    visual, x, unit = model.model.visual, seen.x, seen.tower.unit
    planes = []
    for number, block in enumerate(seen.tower.layers):
        kwargs = seen.kwargs[number]
        gone = gone_at(state, number, state.order).repeat_interleave(unit)
        segment = segments_of(kwargs)
        q, k, v, _ = packed_projections(block, x, kwargs["position_embeddings"])
        hidden = (segment[:, None] != segment[None]) | gone[None]
        hidden = hidden & ~hidden.all(1, keepdim=True)  # a dropped row may see nothing: keep it finite
        logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + block.attn.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
        if number in getattr(visual, "deepstack_visual_indexes", ()):
            planes.append(visual.deepstack_merger_list[len(planes)](x))
    merged = visual.merger(x)
    return torch.empty_like(merged).index_copy(0, state.order, merged), planes


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_towers_equal_masked_ones(tiny: Any, family: str, name: str, kind: str) -> None:
    if kind == "video" and family not in HAS_VIDEO:
        pytest.skip("no video")
    model = tiny(family, vision_layers=6)
    batch = inputs(family, model, TWO if kind == "image" else VIDEO)
    seen, plain = plain_run(model, batch, kind)
    vtok.compress(model, PRUNERS[name], keep=0.4)
    with states(model) as found:
        output = encode(model, batch, kind)
    encoded = session_of(model).adapter.media(kind, dict(batch))
    model(**batch)
    report = vtok.report(model)
    kept = [tokens for sample in last_of_the_tower(report) for tokens in sample]
    planes: list[Tensor] = []
    if family in QWEN:
        reference, planes = masked_packed(model, seen, found[0])
        expected = list(reference.split([medium.length for medium in encoded]))
    else:
        x = masked_dense(seen, found[0])
        expected = placed(model, batch, kind, x, found[0].kept())
    assert len(kept) == len(expected) == len(features(output))
    start = 0
    for tokens, own, reference in zip(kept, features(output), expected, strict=True):
        assert 0 < len(tokens) < len(own) == len(reference)
        torch.testing.assert_close(own[tokens], reference[tokens], atol=1e-5, rtol=1e-5)
        for plane, parts in zip(planes, getattr(output, "deepstack_features", None) or (), strict=True):
            compressed = torch.cat(parts)
            torch.testing.assert_close(compressed[start + tokens], plane[start + tokens], atol=1e-5, rtol=1e-5)
        start += len(own)
    # and the tower was really pruned: plain features are something else
    assert (features(output)[0][kept[0]] - features(plain)[0][kept[0]]).abs().max() > 1e-3


def last_of_the_tower(report: Any) -> list[list[Tensor]]:
    return [stage for stage in report.stages if stage.site == "encoder"][-1].kept


# Merging: a plain loop over the tokens of one picture


@dataclass
class Tokens:
    """One tile, frame or window that merges by itself.

    ``x`` (n, slots, D): a dense token has one slot, a cell as many as it has patches. ``members`` are original tokens,
    ``keeper`` says at whose place a token stands, ``place`` (n, slots, 2) is the mean row and column.
    """

    x: Tensor
    sizes: list[int]
    members: list[list[int]]
    keeper: list[int]
    place: Tensor | None = None

    @classmethod
    def start(cls, x: Tensor, numbers: Sequence[int], place: Tensor | None = None) -> Tokens:
        return cls(x, [1] * len(x), [[number] for number in numbers], list(numbers), place)

    def merge(self, target: Sequence[int], weights: Tensor) -> list[int]:
        """Pour token i into ``target[i]`` with these weights; says which tokens are left."""
        left = [i for i in range(len(target)) if target[i] == i]
        parts = [[i for i in range(len(target)) if target[i] == slot] for slot in left]
        self.x = torch.stack([(weights[own, None, None] * self.x[own]).sum(0) / weights[own].sum() for own in parts])
        if self.place is not None:
            size = torch.tensor(self.sizes).float()
            places = [(size[own, None, None] * self.place[own]).sum(0) / size[own].sum() for own in parts]
            self.place = torch.stack(places)
        self.sizes = [sum(self.sizes[i] for i in own) for own in parts]
        self.members = [sorted(member for i in own for member in self.members[i]) for own in parts]
        self.keeper = [self.keeper[i] for i in left]
        return left


def one_way(score: Callable[[int, int], float], n: int, r: int, fixed: int) -> list[int]:
    """ToMe: the r tokens at even places with the best partner at an odd place pour into it."""
    target = list(range(n))
    best = []
    for a in range(0, n, 2):
        if a >= fixed:
            b = max((b for b in range(1, n, 2) if b >= fixed), key=lambda b: score(a, b))
            best.append((score(a, b), a, b))
    for _, a, b in sorted(best, reverse=True)[:r]:
        target[a] = b
    return target


def two_ways(score: Callable[[int, int], float], n: int, r: int, fixed: int) -> list[int]:
    """MCTF: half forward, then, by the same scores, the rest from odd places to what is left of the even ones."""
    target = one_way(score, n, r // 2, fixed)
    left = [a for a in range(0, n, 2) if target[a] == a and a >= fixed]
    best = []
    for b in range(1, n, 2):
        if b >= fixed:
            a = max(left, key=lambda a: score(a, b))
            best.append((score(a, b), b, a))
    for _, b, a in sorted(best, reverse=True)[: r - r // 2]:
        target[b] = a
    return [target[slot] for slot in target]  # a chain has two steps at most


def duplicated(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Tensor:
    """Attention in which every token stands as often as it has members: (H, n, d)."""
    times = torch.tensor(sizes)
    k, v = (t.repeat_interleave(times, 1) for t in (k, v))
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def mass(q: Tensor, k: Tensor, sizes: Sequence[int]) -> Tensor:
    """(H, n, n) attention on tokens (not on their copies)."""
    copies = torch.tensor(sizes)
    rows = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).exp() * copies
    return rows / rows.sum(-1, keepdim=True)


def criteria(x: Tensor, received: Tensor, sizes: Sequence[int]) -> Callable[[int, int], float]:
    """MCTF's product of similarity, rarity of attention and smallness, temperatures 1, 20, 40."""
    rare = 1 / received
    small = 1 / torch.tensor(sizes).float()
    rare, small = (rare / rare.max()).tolist(), (small / small.max()).tolist()
    similar = (nn.functional.cosine_similarity(x[:, None], x[None], dim=-1) + 1) / 2

    def score(i: int, j: int) -> float:
        return float(similar[i, j]) * (rare[i] * rare[j]) ** (1 / 20) * (small[i] * small[j]) ** (1 / 40)

    return score


def similarity(metric: Tensor) -> Callable[[int, int], float]:
    cosine = nn.functional.cosine_similarity(metric[:, None], metric[None], dim=-1)
    return lambda i, j: float(cosine[i, j])


def unpadded(model: Any, batch: Batch, tiles: int, patches: int) -> Tensor:
    """(tiles, N) bool: patches that LLaVA-NeXT's packing leaves in the picture."""
    everything = torch.ones(tiles, patches, dtype=torch.bool)
    if "image_sizes" not in batch or "batch_num_images" in batch:
        return everything
    numbers = torch.arange(tiles * patches).double().view(tiles, patches, 1)
    runs, _ = model.model.pack_image_features(
        [numbers], batch["image_sizes"], vision_feature_select_strategy="default", image_newline=torch.tensor([-1.0])
    )
    shown = runs[0].flatten().long()
    return torch.zeros(tiles * patches, dtype=torch.bool).index_fill(0, shown[shown >= 0], True).view(tiles, -1)


def merged_dense(
    seen: Plain, state: Any, tile: int, method: str, shown: Tensor, reuse: bool = True, proportional: bool = True
) -> Tokens:
    spec = seen.tower
    prefix = spec.prefix
    goals = {layer: int(standing[tile].sum()) + prefix for layer, standing in state.stages}
    tokens = Tokens.start(seen.x[tile, :, None], range(-prefix, seen.x.shape[1] - prefix))
    for number in range(spec.feature_layer + 1):
        block = spec.layers[number]
        if number == min(goals):  # what unpadding cuts off anyway takes no part in any merge
            own = [i for i, keeper in enumerate(tokens.keeper) if keeper < 0 or shown[tile, keeper]]
            tokens = Tokens.start(tokens.x[own], [tokens.keeper[i] for i in own])
        x = tokens.x[:, 0]
        q, k, v = (t[0] for t in dense_projections(block, x[None]))
        r = len(x) - goals.get(number, len(x))
        if method == "mctf" and number in goals:
            attention = mass(q, k, tokens.sizes)
            received = attention.mean((0, 1))
            sizes = torch.tensor(tokens.sizes).float()
            target = two_ways(criteria(x, received, tokens.sizes), len(x), r, prefix)
            pool = received * sizes / sizes.max()
            left = tokens.merge(target, pool)
            # the map is fused, too: columns summed, rows averaged with the same weights
            gather = torch.zeros(len(left), len(target))
            gather[[left.index(slot) for slot in target], range(len(target))] = 1.0
            share = gather * pool / (gather * pool).sum(1, keepdim=True)
            fused = share @ attention @ gather.T
            x = tokens.x[:, 0]
            q, k, v = (t[0] for t in dense_projections(block, x[None]))
            heads = fused @ v if reuse else duplicated(q, k, v, tokens.sizes)
        else:
            heads = duplicated(q, k, v, tokens.sizes if proportional else [1] * len(x))
        tokens.x = (x + block.self_attn.out_proj(joined(heads[None])[0]))[:, None]
        if method == "tome" and number in goals:
            target = one_way(similarity(k.mean(0)), len(x), r, prefix)
            tokens.merge(target, torch.tensor(tokens.sizes).float())
        tokens.x = tokens.x + block.mlp(block.layer_norm2(tokens.x))
    return tokens


def merged_packed(model: Any, seen: Plain, state: Any, method: str) -> tuple[list[Tokens], Tensor, list[dict]]:
    """Cells of the windows (frames where there are none) of one packed sequence, the merger's rows, and at each
    DeepStack tap the row and the size of every cell that stands there."""
    visual, spec = model.model.visual, seen.tower
    unit = spec.unit
    cells = seen.x.unflatten(0, (-1, unit))
    windows = [(state.window == number).nonzero().flatten() for number in state.window.unique_consecutive()]
    parts = [Tokens.start(cells[own], own.tolist(), state.grid_places[own]) for own in windows]
    standing, taps = dict(state.stages), []
    for number, block in enumerate(spec.layers):
        frames = segments_of(seen.kwargs[number]).unflatten(0, (-1, unit))[:, 0]  # of every original cell
        goals = [int(standing[number][own].sum()) if number in standing else None for own in windows]

        def projected(part: Tokens, block: Any = block) -> list[Tensor]:
            tables = visual.rotary_pos_emb(part.x, part.place.flatten(0, 1))
            return packed_projections(block, part.x.flatten(0, 1), tables)

        if method == "mctf" and number in standing:
            for part, goal in zip(parts, goals, strict=True):
                if goal == len(part.x):
                    continue
                q, k, _, _ = projected(part)
                patches = [size for size in part.sizes for _ in range(unit)]
                received = mass(q, k, patches).mean((0, 1)).unflatten(0, (-1, unit)).mean(1)
                sizes = torch.tensor(part.sizes).float()
                score = criteria(part.x.mean(1), received, part.sizes)
                part.merge(two_ways(score, len(sizes), len(sizes) - goal, 0), received * sizes / sizes.max())
        every = [projected(part) for part in parts]
        segment = torch.cat([frames[part.keeper] for part in parts]).repeat_interleave(unit)
        sizes = [size for part in parts for size in part.sizes for _ in range(unit)]
        q, k, v = (torch.cat([own[i] for own in every], 1) for i in range(3))
        heads = torch.empty_like(v)
        for own in segment.unique():
            rows = segment == own
            heads[:, rows] = duplicated(q[:, rows], k[:, rows], v[:, rows], torch.tensor(sizes)[rows].tolist())
        out = block.attn.proj(heads.transpose(0, 1).flatten(1)).unflatten(0, (-1, unit))
        for part, own, update, goal in zip(parts, every, out.split([len(p.x) for p in parts]), goals, strict=True):
            part.x = part.x + update
            if method == "tome" and number in standing and goal < len(part.x):
                metric = own[3].mean(0).unflatten(0, (-1, unit)).mean(1)
                target = one_way(similarity(metric), len(part.x), len(part.x) - goal, 0)
                part.merge(target, torch.tensor(part.sizes).float())
            part.x = part.x + block.mlp(block.norm2(part.x))
        if number in getattr(visual, "deepstack_visual_indexes", ()):
            rows = visual.deepstack_merger_list[len(taps)](torch.cat([part.x for part in parts]).flatten(0, 1))
            weighted = zip([size for part in parts for size in part.sizes], rows, strict=True)
            taps.append(dict(zip([keeper for part in parts for keeper in part.keeper], weighted, strict=True)))
    return parts, visual.merger(torch.cat([part.x for part in parts]).flatten(0, 1)), taps


@pytest.mark.parametrize(
    ("method", "option"), [("mctf", "reuse_attention"), ("tome", "prop_attn")], ids=["recompute", "unweighted"]
)
@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_other_ways_of_merging(tiny: Any, family: str, method: str, option: str) -> None:
    """MCTF with attention computed anew on the merged tokens; ToMe with every token counted once."""
    model = tiny(family, vision_layers=6)
    batch = inputs(family, model, [[2, "image", 3]])
    seen, _ = plain_run(model, batch)
    vtok.compress(model, method, keep=0.4)
    usual = features(encode(model, batch))[0]
    vtok.compress(model, method, keep=0.4, **{option: False})
    with states(model) as found:
        output = features(encode(model, batch))[0]
    assert not torch.allclose(output, usual, atol=1e-4)
    state = found[0]
    everything = torch.ones(state.dst.shape, dtype=torch.bool)
    dense = torch.zeros(*state.dst.shape, seen.x.shape[-1])
    for number in range(len(state.counts)):
        tile = merged_dense(seen, state, number, method, everything, reuse=False, proportional=False)
        for x, keeper in zip(tile.x[:, 0], tile.keeper, strict=True):
            if keeper >= 0:
                dense[number, keeper] = x
    expected = placed(model, batch, "image", dense, state.kept())[0]
    model(**batch)
    kept = vtok.report(model).kept[0][0]
    torch.testing.assert_close(output[kept], expected[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_towers_equal_a_plain_loop(tiny: Any, family: str, method: str) -> None:
    model = tiny(family, vision_layers=6)
    batch = inputs(family, model, [[2, "image:84x70" if family in QWEN else "image", 3]])
    seen, _ = plain_run(model, batch)
    vtok.compress(model, method, keep=0.4)
    with states(model) as found:
        output = encode(model, batch)
    model(**batch)
    report, state = vtok.report(model), found[0]
    kept, groups = report.kept[0][0], report.groups[0][0]
    own = features(output)[0]
    if family in QWEN:
        parts, rows, taps = merged_packed(model, seen, state, method)
        raster = {int(cell): position for position, cell in enumerate(state.order)}
        slots = [(part.keeper[i], part.members[i]) for part in parts for i in range(len(part.keeper))]
        reference = {int(state.order[keeper]): row for (keeper, _), row in zip(slots, rows, strict=True)}
        members = {int(state.order[keeper]): sorted(int(state.order[m]) for m in own) for keeper, own in slots}
        assert set(kept.tolist()) <= set(members)
        assert len(members) - len(kept) <= 2  # what no window could merge any more goes at the end
        assert all(raster[cell] in state.cells.tolist() for cell in kept.tolist())
        for token, group in zip(kept.tolist(), groups, strict=True):
            assert group == members[token]
            torch.testing.assert_close(own[token], reference[token], atol=1e-5, rtol=1e-5)
            for tap, plane in zip(taps, getattr(output, "deepstack_features", None) or (), strict=True):
                there = [tap[raster[cell]] for cell in group if raster[cell] in tap]
                mean = sum(size * row for size, row in there) / sum(size for size, _ in there)
                torch.testing.assert_close(plane[0][token], mean, atol=1e-5, rtol=1e-5)
        return
    shown = unpadded(model, batch, *state.dst.shape)
    assert bool(shown.all()) == (family != "llava_next")
    tiles = [merged_dense(seen, state, tile, method, shown) for tile in range(len(state.counts))]
    dense = torch.zeros(*state.dst.shape, seen.x.shape[-1])
    standing = torch.zeros(state.dst.shape, dtype=torch.bool)
    for number, tile in enumerate(tiles):
        assert len(tile.x) - seen.tower.prefix == state.counts[number]
        for x, keeper in zip(tile.x[:, 0], tile.keeper, strict=True):
            if keeper >= 0:
                dense[number, keeper], standing[number, keeper] = x, True
        ours: dict[int, list[int]] = {}
        for patch, target in enumerate(state.dst[number].tolist()):
            ours.setdefault(target, []).append(patch)
        ours.pop(-1, None)  # cut off with the padding
        assert ours == {keeper: m for keeper, m in zip(tile.keeper, tile.members, strict=True) if keeper >= 0}
    assert torch.equal(standing, state.kept())
    expected = placed(model, batch, "image", dense, standing)[0]
    torch.testing.assert_close(own[kept], expected[kept], atol=1e-5, rtol=1e-5)


# What methods see equals eager attention


@dataclass(frozen=True)
class Looks(ValueNorm):
    """Takes down the views that the engine gives to a method, before and between cuts."""

    seen: list = field(default_factory=list, compare=False)

    def score(self, view: Any) -> Tensor:
        self.seen.append(view)
        return super().score(view)


def eager_maps(seen: Plain) -> list[tuple[Tensor, Tensor]]:
    """(tiles, H, N, N) or (H, seq, seq) attention map and (..., N, d) values of every block of the plain tower."""
    maps, x = [], seen.x
    for number, block in enumerate(seen.tower.layers[: seen.tower.feature_layer + 1]):
        if seen.tower.packed:
            q, k, v, _ = packed_projections(block, x, seen.kwargs[number]["position_embeddings"])
            segment = segments_of(seen.kwargs[number])
            other = segment[:, None] != segment[None]
            attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(other, -torch.inf).softmax(-1)
            x = x + block.attn.proj((attention @ v).transpose(0, 1).flatten(1))
            x = x + block.mlp(block.norm2(x))
        else:
            q, k, v = dense_projections(block, x)
            attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            x = x + block.self_attn.out_proj(joined(attention @ v))
            x = x + block.mlp(block.layer_norm2(x))
        maps.append((attention, v))
    return maps


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_equal_eager_maps(tiny: Any, family: str) -> None:
    """The row of the class token, what every token receives, and the values, one picture, before any cut."""
    model = tiny(family, vision_layers=6)
    batch = inputs(family, model, [[2, "image:56x56" if family in QWEN else "image", 3]])
    seen, _ = plain_run(model, batch)
    # in Qwen2.5-VL every second block sees the whole picture, and only these are scored
    attention, values = eager_maps(seen)[1]
    method = Looks()
    vtok.compress(model, method, keep=0.4)
    encode(model, batch)
    flow = vtok.get("flowcut")
    for view in method.seen:  # those of one size together
        shown = view.tokens.unsqueeze(-1) * view.unit + torch.arange(view.unit) + view.prefix
        for row, patches in zip(view.v, shown.flatten(1), strict=True):
            tiles = values[None] if family in QWEN else values
            assert any(torch.allclose(row[:, view.prefix :], tile[:, patches], atol=1e-5) for tile in tiles)
    if family == "llava_next":
        return
    (view,) = method.seen
    if family in QWEN:
        assert view.q.shape[2] == 64
        received = attention.mean((0, 1))
        torch.testing.assert_close(vtok.get("visionzip").dominance(view)[0], received.unflatten(0, (16, 4)).mean(1))
        # FlowCut's mean query is no row of any map: written out
        mean_row = (view.q.mean(2, keepdim=True) @ view.k.transpose(-1, -2) / view.q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(flow.relation(view)[0], mean_row.mean(1)[0, 0])
        eager = (view.q @ view.k.transpose(-1, -2) / view.q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(eager[0], attention, atol=1e-5, rtol=0)
        return
    if family == "llava":
        torch.testing.assert_close(flow.relation(view), attention[:, :, 0].mean(1)[:, 1:], atol=1e-5, rtol=0)
        eager = build(family, vision_layers=6, attn="eager").model.vision_tower
        maps = eager(batch["pixel_values"], output_attentions=True).attentions[1]
        torch.testing.assert_close(attention, maps, atol=1e-5, rtol=0)  # the reference is the library's map
    else:
        torch.testing.assert_close(vtok.get("visionzip").dominance(view), attention.mean((1, 2)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_keeps_the_highest_cells_of_the_picture(tiny: Any, family: str) -> None:
    """Values of the plain tower, by raster place, say which tokens must stand: Qwen2.5-VL has its cells in windows."""
    model = tiny(family, vision_layers=6)
    batch = inputs(family, model, [[2, "image:84x70" if family in QWEN else "image", 3]])
    seen, _ = plain_run(model, batch)
    values = eager_maps(seen)[1][1]
    vtok.compress(model, ValueNorm(), keep=0.4)
    model(**batch)
    kept = vtok.report(model).kept[0][0]
    if family in QWEN:
        score = values.norm(dim=-1).sum(0).unflatten(0, (-1, 4)).mean(1)
        if family == "qwen2_5_vl":
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

            visual = model.model.visual
            order, _ = get_vision_window_index(
                batch["image_grid_thw"], spatial_merge_size=2, window_size=visual.window_size, patch_size=7
            )
            assert not torch.equal(order, torch.arange(len(order)))
            score = torch.empty_like(score).index_copy(0, order, score)
        expected = score.topk(len(kept)).indices.sort().values
        assert torch.equal(kept, expected)
        return
    score = values[:, :, seen.tower.prefix :].norm(dim=-1).sum(1)
    if family == "llava":
        assert torch.equal(kept, score[0].topk(len(kept)).indices.sort().values)
        return
    base = kept[kept < 64]  # the thumbnail comes first and is whole; both its size and its share are the tile's
    if family == "llava_next":
        assert torch.equal(base, score[0].topk(len(base)).indices.sort().values)


# Counts, batches, mass


def lengths_of(model: Any, run: Callable[[], Any]) -> list[int]:
    """Rows (of all tiles) that every block of the tower computes."""
    spec = adapter_of(model).tower
    seen: dict[int, int] = {}

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        seen[id(module)] = x.shape[0] * x.shape[1] if x.ndim == 3 else x.shape[0]

    handles = [layer.register_forward_hook(after) for layer in spec.layers]
    run()
    for handle in handles:
        handle.remove()
    return [seen[id(layer)] for layer in spec.layers]


@pytest.mark.parametrize("method", ["flowcut", "values", *MERGERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_fewer_tokens(tiny: Any, family: str, method: str) -> None:
    model = tiny(family, vision_layers=8)
    batch = inputs(family, model, [[2, "image:84x70" if family in QWEN else "image", 3]])
    plain = lengths_of(model, lambda: encode(model, batch))
    assert len(set(plain)) == 1
    vtok.compress(model, PRUNERS.get(method, method), keep=0.3)
    with states(model) as found:
        lengths = lengths_of(model, lambda: encode(model, batch))
    state, spec = found[0], session_of(model).tower.spec
    rows = len(state.counts) if not spec.packed else 1
    unit, prefix = (spec.unit, 0) if spec.packed else (1, spec.prefix)
    for number, length in enumerate(lengths):
        stands = None
        for layer, standing in state.stages:
            # a cut or a fusion "before" shortens this block's own output; ToMe merges inside it
            if layer is not None and layer <= number:
                stands = standing
        if stands is not None:
            most = int(stands.sum()) if spec.packed else int(stands.sum(1).max())
            assert length == rows * (unit * most + prefix)
        elif family != "llava_next":  # whose padding goes at the first stage
            assert length == plain[0]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.75 * plain[0]


@pytest.mark.parametrize("method", ["flowcut", "values", "visionzip", *MERGERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_batch_are_what_they_are_alone(tiny: Any, family: str, method: str) -> None:
    """FlowCut leaves tiles of one call at different lengths on the way: the shorter ones are padded and masked."""
    model = tiny(family, vision_layers=8)
    batch = inputs(family, model, [[3, "image", 4], [2, "image:84x70", 3, "image:42x70#b", 2], [5, "image#c", 2]])
    vtok.compress(model, PRUNERS.get(method, method), keep=0.4)
    ragged = []
    tower = session_of(model).tower
    if method == "flowcut" and family in LLAVA:
        mask = tower._key_mask
        tower._key_mask = lambda state, x: (ragged.append(state.ragged), mask(state, x))[1]
    together = features(encode(model, batch))
    model(**batch)
    kept = [tokens for sample in vtok.report(model).kept for tokens in sample]
    assert not ragged or any(ragged)
    start = 0
    for sample in range(3):
        alone = single(batch, sample)
        own = features(encode(model, alone))
        model(**alone)
        stood = vtok.report(model).kept[0]
        for one, tokens in zip(own, stood, strict=True):
            assert torch.equal(tokens, kept[start])
            torch.testing.assert_close(one[tokens], together[start][tokens], atol=1e-5, rtol=1e-5)
            start += 1


@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_loses_nothing(tiny: Any, family: str, method: str) -> None:
    model = tiny(family, vision_layers=8)
    batch = inputs(family, model, TWO)
    vtok.compress(model, method, keep=0.5)
    with states(model) as found:
        model(**batch)
    state, report = found[0], vtok.report(model)
    if family in QWEN:
        assert state.counts == state.targets and sum(state.counts) == len(state.cells)
        if bool((state.dst >= 0).all()):
            assert state.sizes.sum() == len(state.order)
    else:
        real = state.real()
        placed_ = (state.dst >= 0).sum(1)
        assert torch.equal((state.sizes * real).sum(1), placed_.float())
        if family != "llava_next":  # its padding is gone
            assert (placed_ == state.total).all()
    for kept, groups, parts in zip(report.kept, report.groups, report.parts, strict=True):
        for tokens, own, layout in zip(kept, groups, parts, strict=True):
            if family == "llava_onevision" and len(layout) > 1:
                assert own is None  # a resampled run: no token has members
                continue
            assert own is not None
            members = [token for group in own for token in group]
            assert len(members) == len(set(members))
            assert all(token in group for token, group in zip(tokens.tolist(), own, strict=True))
            if family in ("llava", *QWEN) and bool((state.dst >= 0).all()):
                assert sorted(members) == list(range(sum(part.length for part in layout)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["flowcut", "values", "visionzip", *MERGERS])
def test_keep_all_is_bit_equal_and_restore_leaves_nothing(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, TWO)
    plain = features(encode(model, batch))
    before = anatomy(model)
    vtok.compress(model, PRUNERS.get(method, method), keep=1.0)
    for own, expected in zip(features(encode(model, batch)), plain, strict=True):
        assert torch.equal(own, expected)
    with vtok.budget(model, 0.4):
        assert not torch.equal(features(encode(model, batch))[0], plain[0])
    vtok.restore(model)
    assert anatomy(model) == before
    assert torch.equal(features(encode(model, batch))[0], plain[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["flowcut", *MERGERS])
def test_text_alone_and_many_pictures(tiny: Any, family: str, method: str) -> None:
    model = tiny(family)
    vtok.compress(model, method, **settings(method))
    text = inputs(family, model, [[7], [4]])
    with vtok.compressed(model, method, keep=1.0):
        plain = model(**text).logits
    assert torch.equal(model(**text).logits, plain)
    assert vtok.report(model).kept == [[], []]
    batch = inputs(family, model, [[9], [2, "image", 3, "image#b", "image:84x56#c", 2]])
    model(**batch)
    report = vtok.report(model)
    assert [len(sample) for sample in report.kept] == [0, 3]
    assert report.average_tokens <= 0.4 * report.tokens_in + 1


@pytest.mark.parametrize("method", ["flowcut", "values", "visionzip", *MERGERS])
def test_a_class_token_among_the_features_is_refused(method: str) -> None:
    model = build("llava")
    model.model.config.vision_feature_select_strategy = "full"
    before = anatomy(model)
    with pytest.raises(vtok.VtokError, match=r"hands the class token of its tower on .* such as divprune"):
        vtok.compress(model, PRUNERS.get(method, method), keep=0.5)
    assert anatomy(model) == before
    batch = inputs("llava", model, [[3, "image", 4]])
    first = int((batch["input_ids"] == IMAGE).nonzero()[0, 1])
    more = torch.cat((batch["input_ids"][:, :first], torch.full((1, 1), IMAGE), batch["input_ids"][:, first:]), 1)
    for behind in ("divprune", "todre"):
        vtok.compress(model, behind, keep=0.5)
        model(more, pixel_values=batch["pixel_values"])
        assert vtok.report(model).tokens_in == 65


@pytest.mark.parametrize("keep", [1, 2, 5, 0.02, 0.97])
@pytest.mark.parametrize("method", ["flowcut", "visionzip", *MERGERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_budgets_at_the_edge(tiny: Any, family: str, method: str, keep: int | float) -> None:
    """Tiny and almost whole budgets work, or are refused with the smallest budget that merging reaches."""
    model = tiny(family, vision_layers=8)
    batch = inputs(family, model, TWO)
    vtok.compress(model, method, keep=keep)
    try:
        logits = model(**batch).logits
    except vtok.VtokError as error:
        assert method in MERGERS
        assert "ask for at least" in str(error)  # noqa: PT017
        return
    assert torch.isfinite(logits).all()
    report = vtok.report(model)
    for kept, parts in zip(report.kept, report.parts, strict=True):
        for tokens, layout in zip(kept, parts, strict=True):
            assert 1 <= len(tokens) <= sum(part.length for part in layout)
    assert report.average_tokens <= (keep if isinstance(keep, int) else keep * report.tokens_in) + 5


# Numbers: bf16, attention implementations, arithmetic saved


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["flowcut", "values", "visionzip", *MERGERS])
def test_bf16(method: str, family: str) -> None:
    model = build(family, dtype=torch.bfloat16)
    batch = inputs(family, model, TWO)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    vtok.compress(model, PRUNERS.get(method, method), keep=0.4)
    logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()
    report = vtok.report(model)
    assert report.average_tokens <= 0.4 * report.tokens_in + 1
    exact = build(family)
    batch["pixel_values"] = batch["pixel_values"].float()
    vtok.compress(exact, PRUNERS.get(method, method), keep=0.4)
    exact(**batch)
    same, total = 0, 0
    for a, b in zip(report.kept, vtok.report(exact).kept, strict=True):
        for ours, theirs in zip(a, b, strict=True):
            same += len(set(ours.tolist()) & set(theirs.tolist()))
            total += len(theirs)
    assert same > 0.75 * total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["flowcut", "visionzip", *MERGERS])
def test_eager_and_sdpa_agree(tiny: Any, family: str, method: str) -> None:
    outputs, sets = [], []
    for attn in ("sdpa", "eager"):
        model = tiny(family, attn=attn)
        batch = inputs(family, model, [[3, "image", 4], [2, "image:84x70", 3]])
        vtok.compress(model, method, keep=0.4)
        outputs.append(features(encode(model, batch)))
        model(**batch)
        sets.append(vtok.report(model).kept)
        vtok.restore(model)
    for a, b in zip(*sets, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def flops(model: Any, batch: Batch) -> int:
    """Of matrix products and attention in the tower and behind it."""
    with FlopCounterMode(display=False) as counter:
        encode(model, batch)
    return counter.get_total_flops()


@pytest.mark.parametrize("method", ["flowcut", "values", "tome"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_computes_less(family: str, method: str) -> None:
    """Twelve blocks at a quarter of the tokens: the counted arithmetic, statistics included, must fall."""
    model = build(family, vision_layers=12)
    batch = inputs(family, model, [[2, "image:84x70" if family in QWEN else "image", 3]])
    plain = flops(model, batch)
    vtok.compress(model, PRUNERS.get(method, method), keep=0.25)
    ratio = flops(model, batch) / plain
    assert ratio < {"flowcut": 0.95, "values": 0.6, "tome": 0.85}[method]
