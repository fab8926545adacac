"""What must always hold, for every method on every family that it fits (DESIGN.md section 5)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import vtok
from vtok.api import session_of

from .conftest import LAYERS, LLAVA, METHODS, PAIRS, SHARED, anatomy, settings, site
from .models import FAMILIES, QWEN, SCENARIOS, Batch, inputs, pad_right, scenarios, single, visual_mask
from .oracle import Prompt, hidden_columns, masked, recorded, rewrites, survivors, text_model

SOME = ("ragged", "adjacent", "mixed")  # all that the other scenarios have is in these
CASES = [(method, family, name) for method, family in PAIRS for name in SOME if name in scenarios(family)]
pairs = pytest.mark.parametrize(("method", "family"), PAIRS)
cases = pytest.mark.parametrize(("method", "family", "name"), CASES)
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}


def real_of(batch: Batch) -> Tensor:
    return batch["attention_mask"].bool()


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# 1. keep of everything, and restore


@cases
def test_keep_of_everything_changes_nothing(tiny: Any, method: str, family: str, name: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS[name])
    plain = model(**batch).logits
    for keep in (1.0, 10_000):
        vtok.compress(model, method, **settings(method, family, keep=keep))
        close(model(**batch).logits[real_of(batch)], plain[real_of(batch)], 1e-5)
    report = vtok.report(model)
    assert report.average_tokens == pytest.approx(report.tokens_in) == report.tokens_kept
    assert report.mac_ratio == 1.0
    if name == "ragged":
        ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
        vtok.restore(model)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), ids)


@pairs
def test_restore_leaves_no_trace(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    plain = model(**batch, output_hidden_states=True).logits
    before, weights = anatomy(model), {k: v.clone() for k, v in model.state_dict().items()}

    assert vtok.compress(model, method, **settings(method, family)) is model
    assert not torch.equal(model(**batch).logits, plain)
    assert anatomy(model)["state_dict"] == before["state_dict"]
    model.generate(**batch, max_new_tokens=2)
    assert vtok.restore(model) is model

    after = anatomy(model)
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == set()
    assert torch.equal(model(**batch).logits, plain)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert anatomy(vtok.restore(model)) == before  # nothing to do is fine


@pytest.mark.parametrize("family", FAMILIES)
def test_context_manager_restores_after_an_exception(tiny: Any, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["one"])
    plain = model(**batch).logits
    before = anatomy(model)
    with pytest.raises(KeyError), vtok.compressed(model, ["divprune", "random_deep"], keep=0.3):
        model(**batch)["nothing"]
    assert anatomy(model) == before
    with pytest.raises(ValueError, match="do not match"), vtok.compressed(model, "fastv", keep=0.5):
        model(**{**batch, "input_ids": batch["input_ids"][:, :-40]})  # fails inside the forward
    assert anatomy(model) == before
    assert torch.equal(model(**batch).logits, plain)


def test_a_failed_call_leaves_a_model_that_works(tiny: Any) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    vtok.compress(model, "fastv", keep=0.5)
    expected = model(**batch).logits
    with pytest.raises(ValueError, match="do not match"):
        model(**{**batch, "input_ids": batch["input_ids"][:, :-40]})
    assert torch.equal(model(**batch).logits, expected)


def test_compress_again_replaces(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    before = anatomy(model) if model(**batch) else {}
    vtok.compress(model, "divprune", keep=0.5)
    expected = model(**batch).logits
    with caplog.at_level("INFO", "vtok"):
        vtok.compress(model, "fastv", keep=0.5)
        vtok.compress(model, "divprune", keep=0.5)
    assert "divprune replaces fastv" in caplog.text
    assert torch.equal(model(**batch).logits, expected)
    with vtok.compressed(model, "random", keep=0.2):
        assert not torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)  # back to what was there before the block
    vtok.restore(model)
    assert anatomy(model) == before


def test_budget_for_some_calls(tiny: Any) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    vtok.compress(model, "divprune", keep=32)
    for keep, count in ((8, 8), (0.25, 16), (1.0, 64)):
        with vtok.budget(model, keep):
            model(**batch)
            assert vtok.report(model).tokens_kept == count
    model(**batch)
    assert vtok.report(model).tokens_kept == 32


# 2. the masked oracle


@dataclass
class Run:
    """One compressed prefill and three greedy tokens, and what is known about them."""

    batch: Batch
    logits: Tensor
    prompt: Prompt
    tokens: Any
    report: vtok.Report
    gone: list[Tensor]
    live: Tensor
    changed: bool
    lengths: list[int]
    asked: float


def run(model: PreTrainedModel, batch: Batch, method: Any, options: dict) -> Run:
    vtok.compress(model, method, **{"positions": "keep", **options})
    with recorded(model) as prompt:
        output = model(**batch, use_cache=True)
    report, changed = vtok.report(model), rewrites(model)
    gone, live = hidden_columns(model, batch), survivors(model, batch)
    lengths = [output.past_key_values.get_seq_length(layer) for layer in range(len(gone))]
    tokens = model.generate(**batch, **GREEDY)
    asked = session_of(model).keep
    vtok.restore(model)
    return Run(batch, output.logits, prompt, tokens, report, gone, live, changed, lengths, asked)


@cache
def ran(method: str, family: str, name: str) -> Run:
    model = SHARED(family)
    return run(model, inputs(family, model, SCENARIOS[name]), method, settings(method, family))


@cases
def test_masked_oracle(tiny: Any, method: str, family: str, name: str) -> None:
    """Prefill and decoding equal the plain model in which the dropped tokens are masked from their site on."""
    check_oracle(tiny(family), ran(method, family, name))


@pairs
def test_masked_oracle_eager(tiny: Any, method: str, family: str) -> None:
    model = tiny(family, attn="eager")
    check_oracle(model, run(model, inputs(family, model, SCENARIOS["ragged"]), method, settings(method, family)))


@pairs
def test_masked_oracle_padding_on_the_right(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    batch = pad_right(inputs(family, model, SCENARIOS["ragged"]))
    got = run(model, batch, method, settings(method, family))
    check_oracle(model, got, generate=False)
    for right, left in zip(got.report.kept, ran(method, family, "ragged").report.kept, strict=True):
        assert [kept.tolist() for kept in right] == [kept.tolist() for kept in left]


CHAINS: list[list[str]] = [
    ["divprune", "random_deep"],
    ["random", "divprune"],
    ["uniform", "fastv"],
    ["downsample", "transprune"],
    ["todre", "random_deep"],
    ["fastv", "random_deep"],
    ["flextok", "divprune", "fastv"],
    *[[method, "divprune", "fastv"] for method in METHODS if site(method) == "encoder"],
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_masked_oracle_of_a_chain(tiny: Any, family: str, chain: list[str]) -> None:
    if not set(chain) <= set(vtok.methods(family)):
        pytest.skip("not on this family")
    model = tiny(family)
    check_oracle(model, run(model, inputs(family, model, SCENARIOS["ragged"]), chain, {"keep": 0.45}))


def check_oracle(model: PreTrainedModel, got: Run, generate: bool = True) -> None:
    batch = got.batch
    assert got.gone[-1].any()
    if not got.changed:
        assert torch.equal(got.prompt.merged, got.prompt.embeds)
    with masked(model, got.gone, batch["attention_mask"], got.prompt if got.changed else None):
        expected = model(**batch, use_cache=True).logits
        close(got.logits[got.live], expected[got.live])
        if not generate:
            return
        reference = model.generate(**batch, **GREEDY)
        assert torch.equal(got.tokens.sequences, reference.sequences)
        for step, (a, b) in enumerate(zip(got.tokens.logits, reference.logits, strict=True)):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=lambda m, step=step: f"step {step}: {m}")


@pairs
def test_dropped_columns_repeat_the_survivor_before(method: str, family: str) -> None:
    got = ran(method, family, "ragged")
    assert got.logits.shape[:2] == got.batch["input_ids"].shape
    for row, live in zip(got.logits, got.live, strict=True):
        seen = live.cumsum(0)
        column = live.nonzero().flatten()[(seen - 1).clamp_min(0)]
        assert torch.equal(row[seen > 0], row[column][seen > 0])


# 3. a batch is its samples


@cases
def test_batch_is_its_samples(tiny: Any, method: str, family: str, name: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS[name])
    vtok.compress(model, method, **settings(method, family))
    together = model(**batch).logits
    report = vtok.report(model)
    live = survivors(model, batch)
    tokens = model.generate(**batch, **GREEDY) if name == "ragged" else None
    for row in range(len(batch["input_ids"])):
        own = single(batch, row)
        alone = model(**own).logits
        assert [kept.tolist() for kept in vtok.report(model).kept[0]] == [kept.tolist() for kept in report.kept[row]]
        close(together[row][live[row]], alone[0][survivors(model, own)[0]])
        if tokens is None:
            continue
        steps = model.generate(**own, **GREEDY)
        for a, b in zip(tokens.logits, steps.logits, strict=True):
            close(a[row], b[0])


@pairs
def test_same_picture_in_another_row(tiny: Any, method: str, family: str) -> None:
    """The batch row never matters, not even to random choices."""
    model = tiny(family)
    batch = inputs(family, model, [[2, "image#1", 9], [7], [2, "image#1", 9]])
    batch["input_ids"][2] = batch["input_ids"][0]
    vtok.compress(model, method, **settings(method, family))
    logits = model(**batch).logits
    kept = vtok.report(model).kept
    assert torch.equal(kept[0][0], kept[2][0])
    close(logits[0, -9:], logits[2, -9:])


@pairs
def test_text_prompts_are_left_alone(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["text"])
    plain = model(**batch).logits
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    vtok.compress(model, method, **settings(method, family))
    assert torch.equal(model(**batch).logits, plain)
    assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), ids)
    report = vtok.report(model)
    assert report.kept == [[], []]
    assert report.tokens_in == report.tokens_kept == 0


# 4. tokens really fall


@cases
def test_caches_hold_what_the_report_says(method: str, family: str, name: str) -> None:
    got = ran(method, family, name)
    report, gone, depth = got.report, got.gone, len(got.gone)
    real = got.batch["attention_mask"].sum(1)
    assert got.lengths == [int((real - gone[layer].sum(1)).max()) for layer in range(depth)]
    images = sum(len(sample) for sample in report.kept)
    visual = visual_mask(got.batch)
    per_layer = [int((visual & ~gone[layer]).sum()) / images for layer in range(depth)]
    assert report.layer_tokens == pytest.approx(per_layer)
    assert report.layer_tokens == sorted(report.layer_tokens, reverse=True)
    assert report.average_tokens == pytest.approx(sum(per_layer) / depth)
    assert report.tokens_in == visual.sum() / images
    assert report.tokens_kept == per_layer[-1] < report.tokens_in
    assert report.average_tokens <= got.asked * report.tokens_in + 1.0
    assert 0 < report.mac_ratio < 1
    check_indices(report, got.batch)


def check_indices(report: vtok.Report, batch: Batch) -> None:
    """Indices ascend, lie in their image, and each stage narrows the one before."""
    runs = [int(sum(sum(p.length for p in parts) for parts in sample)) for sample in report.parts]
    assert runs == visual_mask(batch).sum(1).tolist()
    for row, sample in enumerate(report.kept):
        for number, kept in enumerate(sample):
            length = sum(part.length for part in report.parts[row][number])
            standing = torch.arange(length)
            for stage in report.stages:
                own = stage.kept[row][number]
                assert own.dtype == torch.long
                assert own.device.type == "cpu"
                assert (own.diff() > 0).all()
                assert set(own.tolist()) <= set(standing.tolist())
                standing = own
            assert torch.equal(kept, standing)
            groups = report.groups[row][number]
            if groups is not None:
                assert len(groups) == len(kept)
                members = [token for group in groups for token in group]
                assert len(set(members)) == len(members)
                assert all(token in group for token, group in zip(kept.tolist(), groups, strict=True))


@pairs
@pytest.mark.parametrize("share", [0.9, 0.25])
def test_the_average_is_the_budget(tiny: Any, method: str, family: str, share: float) -> None:
    """Never more than rounding above `keep`; below it only where the data decides."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, method, **settings(method, family))
    profile, depth = session_of(model).profile, session_of(model).depth
    if site(method) == "decoder" and share < profile.layers[0] / depth:
        share = 0.05 + profile.layers[0] / depth  # the first cut comes too late for less
    vtok.compress(model, method, **settings(method, family, keep=share))
    model(**batch)
    report = vtok.report(model)
    goal = share * report.tokens_in
    assert report.average_tokens <= goal + 1.0
    if method not in ("todre", "downsample"):  # all or nothing; grids that fit
        assert report.average_tokens >= goal - 1.0


# inside the tower


@dataclass(frozen=True)
class Longest(vtok.Method):
    """Keeps the longest features, at one layer of the tower."""

    layer: int = 2
    site = "encoder"

    def score(self, view: vtok.TowerView) -> Tensor:
        return view.per_cell(view.features.norm(dim=-1))


TOWER = ["", *(method for method in METHODS if method == "flowcut")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", TOWER, ids=["longest", *TOWER[1:]])
def test_masked_oracle_of_the_tower(tiny: Any, method: str, family: str) -> None:
    """What the tower makes of the survivors is what the plain one makes with the dropped patches masked as keys."""
    model = tiny(family)
    prompts = SCENARIOS["ragged"]
    if family == "llava_onevision":  # of sizes that it does not resample: there, a token comes from several patches
        prompts = [[2, "image:56x112", 3], [2, "image:56x56", 1, "image:112x56", 3]]
    batch = inputs(family, model, prompts)
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    call = {key: batch[key] for key in names if key in batch}
    vtok.compress(model, method or Longest(), keep=0.5)
    got = model.get_image_features(**call, return_dict=True)
    adapter, media = session_of(model).adapter, got._vtok_state.media
    vtok.restore(model)
    layers = sorted({layer for item in media for layer, _ in item.stages})
    assert layers
    hidden = {layer: hidden_patches(adapter, call, media, layer) for layer in layers}
    handles = []
    for number, block in enumerate(adapter.tower.layers):
        gone = next((hidden[layer] for layer in reversed(layers) if layer <= number), None)
        if gone is not None and adapter.tower.packed:
            handles.append(block.attn.register_forward_hook(partial(attend_packed, gone), with_kwargs=True))
        elif gone is not None:
            handles.append(block.self_attn.register_forward_pre_hook(partial(mask_dense, gone), with_kwargs=True))
    expected = model.get_image_features(**call, return_dict=True)
    for handle in handles:
        handle.remove()
    sizes = [item.medium.length for item in media]
    newline = getattr(model.model, "image_newline", torch.full((64,), torch.nan))
    for number, (a, b) in enumerate(zip(feature_sets(got, sizes), feature_sets(expected, sizes), strict=True)):
        for item, own, plain in zip(media, a, b, strict=True):
            assert 0 < len(item.tokens) < len(own)
            close(own[item.tokens], plain[item.tokens])
            rest = torch.ones(len(own)).index_fill(0, item.tokens, 0).bool()
            if number == 0:  # planes may be taken before the cut
                assert not own[rest & (own != newline).any(-1)].any()


def feature_sets(output: Any, sizes: list[int]) -> list[tuple[Tensor, ...]]:
    """Features by image, and so Qwen3-VL's DeepStack planes."""
    found = [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return [
        torch.cat(tuple(part)).split(sizes) if isinstance(part, (list, tuple)) else part.split(sizes) for part in found
    ]


def hidden_patches(adapter: Any, call: dict, media: Any, layer: int) -> Tensor:
    """Patches that were dropped before `layer`: (tiles, N) of a dense tower, (seq,) of a packed one."""
    stands = []
    for item in media:
        own = [kept for at, kept in item.stages if at <= layer]
        stands.append(own[-1] if own else torch.ones(item.medium.length, dtype=torch.bool))
    if adapter.tower.packed:
        raster = ~torch.cat(stands)
        windows = adapter.windows(call["image_grid_thw"])
        return (raster if windows is None else raster[windows[0]]).repeat_interleave(adapter.tower.unit)
    tiles, patches = max(item.medium.tiles.stop for item in media), adapter.tile_length("image")
    flat = torch.arange(tiles * patches, dtype=torch.float64).view(tiles, patches, 1)
    gone = torch.ones(tiles * patches, dtype=torch.bool)
    for stand, index in zip(
        stands, adapter.pack("image", call, [item.medium for item in media], flat, -1.0), strict=True
    ):
        numbers = index[:, 0].round().long()[stand]
        gone[numbers[numbers >= 0]] = False
    return gone.view(tiles, patches)


def mask_dense(gone: Tensor, module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    x = args[0] if args else kwargs["hidden_states"]
    bias = torch.zeros(x.shape[:2])
    bias[:, x.shape[1] - gone.shape[1] :].masked_fill_(gone, torch.finfo(x.dtype).min)
    return args[:1], {**kwargs, "attention_mask": bias[:, None, None]}


def attend_packed(gone: Tensor, module: Any, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """Attention of a Qwen tower by hand, with masked keys."""
    x = args[0] if args else kwargs["hidden_states"]
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
    cos, sin = (part[:, None] for part in kwargs["position_embeddings"])
    q, k = (t * cos + torch.cat((-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]), -1) * sin for t in (q, k))
    ends = kwargs["cu_seqlens"].tolist()
    segment = torch.repeat_interleave(torch.arange(len(ends) - 1), torch.tensor(ends).diff())
    visible = (segment[:, None] == segment) & (~gone | torch.eye(len(gone), dtype=torch.bool) & gone)
    logits = torch.einsum("qhd,khd->hqk", q, k) * module.scaling
    rows = logits.masked_fill(~visible, torch.finfo(x.dtype).min).softmax(-1)
    return module.proj(torch.einsum("hqk,khd->qhd", rows, v).flatten(1))


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if site(pair[0]) == "encoder"])
def test_towers_leave_tokens_at_their_places(tiny: Any, method: str, family: str) -> None:
    """With little dropped or merged, a survivor still looks most like the plain model's feature at its own place."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["mixed" if "mixed" in scenarios(family) else "ragged"])
    plain, some = (tower_features(model, batch, method, keep) for keep in (1.0, 0.9))
    vtok.compress(model, method, keep=0.9)
    model(**batch)
    right = total = 0
    for span in session_of(model).last.spans:
        tokens = span.columns if span.encoded.tokens is None else span.columns[span.encoded.tokens]
        nearest = torch.cdist(some[span.sample, tokens], plain[span.sample, span.columns]).argmin(1)
        right += int((span.columns[nearest] == tokens).sum())
        total += len(tokens)
        if span.length > 10 and not session_of(model).decoder_stages:
            assert len(tokens) < span.length
    assert right > 0.9 * total


def tower_features(model: PreTrainedModel, batch: Batch, method: str, keep: float) -> Tensor:
    vtok.compress(model, method, keep=keep)
    with recorded(model) as prompt:
        model(**batch)
    vtok.restore(model)
    return prompt.embeds


# merging


@pytest.mark.parametrize("family", FAMILIES)
def test_downsample_stands_for_the_mean_of_its_group(tiny: Any, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, "downsample", keep=0.3)
    with recorded(model) as prompt:
        model(**batch)
    report = vtok.report(model)
    for span in session_of(model).last.spans:
        original = prompt.embeds[span.sample, span.columns]
        merged = prompt.merged[span.sample, span.columns]
        for token, group in zip(
            report.kept[span.sample][span.place].tolist(), report.groups[span.sample][span.place], strict=True
        ):
            assert len(group) >= 1
            close(merged[token], original[group].mean(0), 1e-6)


# 7. deterministic


@pairs
def test_deterministic_under_a_seed(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, method, **settings(method, family))
    torch.manual_seed(1)
    first, kept = model(**batch).logits, vtok.report(model).kept
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = model(**batch).logits
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    assert all(
        torch.equal(a, b) for x, y in zip(kept, vtok.report(model).kept, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("method", ["random", "random_deep"])
def test_the_seed_matters(tiny: Any, method: str) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, [[4, "image#1", 3, "image#1", 6]])
    found = []
    for seed in range(3):
        vtok.compress(model, method, **settings(method, "llava", seed=seed))
        model(**batch)
        found += [tuple(kept.tolist()) for kept in vtok.report(model).kept[0]]
    assert len(set(found)) == len(found)  # another draw for every seed and for every place in the prompt


# positions


@pytest.mark.parametrize(("method", "family"), [pair for pair in PAIRS if pair[1] in LLAVA])
def test_reindexed_prompt_is_a_shorter_prompt(tiny: Any, method: str, family: str) -> None:
    """With ids closed up, the model sees just what it would see of a prompt that has only the survivors in it."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    extra = {"tau": 1.0} if method == "todre" else {}  # every sample takes the cut that depends on the data
    vtok.compress(model, method, **settings(method, family, positions="reindex", **extra))
    if session_of(model).decoder_stages:
        check_contiguous_positions(model, inputs(family, model, SCENARIOS["one"]))
        return
    with recorded(model) as prompt:
        model(**batch)
    tokens = model.generate(**batch, **GREEDY)
    live = survivors(model, batch)
    vtok.restore(model)
    for row in range(len(live)):
        embeds = prompt.merged[row][live[row]][None]
        reference = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]).long(), **GREEDY)
        for a, b in zip(tokens.logits, reference.logits, strict=True):
            close(a[row], b[0])


def check_contiguous_positions(model: PreTrainedModel, batch: Batch) -> None:
    """Every layer counts what it has: cos and sin are those of 0, 1, 2, ... at every depth, in prefill and decoding."""
    text = text_model(model)
    seen: list[tuple[Tensor, int, int]] = []

    def before(number: int, module: Any, args: tuple, kwargs: dict) -> None:
        past = kwargs["past_key_values"].get_seq_length(number)
        seen.append((kwargs["position_embeddings"][0], past, args[0].shape[1]))

    handles = [
        layer.register_forward_pre_hook(partial(before, number), with_kwargs=True)
        for number, layer in enumerate(text.layers)
    ]
    model.generate(**batch, max_new_tokens=3, do_sample=False)
    for handle in handles:
        handle.remove()
    assert len(seen) == 3 * len(text.layers)
    for cos, past, new in seen:
        ids = torch.arange(past, past + new)[None]
        close(cos, text.rotary_emb(torch.zeros(1), position_ids=ids)[0], 1e-6)
    assert len({new for *_, new in seen}) > 2  # the prompt, at least one cut, and single tokens


@pytest.mark.parametrize("family", QWEN)
def test_qwen_has_no_reindex(tiny: Any, family: str) -> None:
    with pytest.raises(vtok.VtokError, match=r"rows and columns.*positions=\"keep\""):
        vtok.compress(tiny(family), "divprune", keep=8, positions="reindex")


@pairs
def test_kept_positions_by_default_where_published(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    vtok.compress(model, method, **settings(method, family))
    published = vtok.method.registry()[method].positions
    assert session_of(model).positions == ("keep" if family in QWEN else published)


# 5. statistics


@dataclass(frozen=True)
class Probe(vtok.Method):
    """Takes every statistic down and keeps the first tokens."""

    seen: list = field(default_factory=list)
    layer: int = 2
    site = "decoder"

    def stages(self, shape: vtok.Shape) -> tuple[vtok.Stage, ...]:
        reads = frozenset({"attention", "qkv", "transition"})
        observed = (self.layer - 2, self.layer - 1)
        return (vtok.Stage("decoder", self.layer, self.select, reads=reads, share=1 / self.layer, observed=observed),)

    def select(self, view: vtok.DecoderView, count: int) -> Tensor:
        q, k, v_last, v = view.projections()
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        found = {
            "last": view.attention("last"),
            "instruction": view.attention("instruction"),
            "next last": view.attention("last", of="next"),
            "next instruction": view.attention("instruction", of="next"),
            "text to visual": view.mass()[0],
            "visual to text": view.mass()[1],
            "transition": view.transition(),
            "relation": ((k @ q[..., None])[..., 0] * q.shape[-1] ** -0.5).softmax(-1).mean(1),
            "value": torch.cat((v, v_last[:, :, None]), 2),
        }
        for i, number in enumerate(view.spans):
            self.seen.append((number, view.tokens[i], {name: value[i] for name, value in found.items()}))
        return torch.arange(count).expand(view.features.shape[0], -1)


STATISTICS = [(family, name) for family in FAMILIES for name in ("ragged", "adjacent", "video", "mixed")]


@pytest.mark.parametrize(("family", "name"), [case for case in STATISTICS if case[1] in scenarios(case[0])])
def test_statistics_equal_those_of_attention_maps(tiny: Any, family: str, name: str) -> None:
    """Before a first and before a second cut, against maps, inputs and outputs of the (masked) plain eager model."""
    model = tiny(family, attn="eager")
    batch = inputs(family, model, SCENARIOS[name])
    probes = [Probe([], 2), Probe([], 5)]
    vtok.compress(model, probes, keep=0.6)
    model(**batch)
    gone, spans = hidden_columns(model, batch), session_of(model).last.spans
    vtok.restore(model)
    for probe in probes:
        assert {number for number, *_ in probe.seen} == set(range(len(spans)))
        still = [gone[min(layer, probe.layer - 1)] for layer in range(LAYERS)]  # up to this cut
        maps, taken = watch(model, batch, still)
        for number, tokens, found in probe.seen:
            where, row = spans[number].columns[tokens], spans[number].sample
            expected = by_hand(batch, maps, taken, still, probe.layer, row, where)
            assert found.keys() == expected.keys()
            for key, value in found.items():
                torch.testing.assert_close(
                    value.double(), expected[key].double(), atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
                )


Taken = dict[tuple[int, str], tuple[Tensor, Tensor]]


def watch(model: PreTrainedModel, batch: Batch, gone: list[Tensor]) -> tuple[Any, Taken]:
    """Attention maps of the masked plain model, and what goes into and comes out of its attention, mlp and values."""
    taken: Taken = {}

    def after(key: tuple[int, str], module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        entering = args[0] if args else kwargs["hidden_states"]
        taken[key] = entering, output[0] if isinstance(output, tuple) else output

    handles = []
    for i, layer in enumerate(text_model(model).layers):
        parts = {"attention": layer.self_attn, "mlp": layer.mlp, "v": layer.self_attn.v_proj}
        handles += [m.register_forward_hook(partial(after, (i, k)), with_kwargs=True) for k, m in parts.items()]
    with masked(model, gone, batch["attention_mask"]):
        maps = model(**batch, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return maps, taken


def by_hand(
    batch: Batch, maps: Any, taken: Taken, gone: list[Tensor], layer: int, row: int, where: Tensor
) -> dict[str, Tensor]:
    """The probe's statistics before `layer`, for the image of sample `row` that stands at columns `where`."""
    real, visual = real_of(batch)[row], visual_mask(batch)[row]
    before, coming = (maps[i][row].double().mean(0) for i in (layer - 1, layer))
    last = int(real.nonzero()[-1])
    tail = torch.arange(int(visual.nonzero()[-1]) + 1, last + 1)
    first = int(visual.nonzero()[0])
    pictures = visual & ~gone[layer - 1][row]
    words = ~visual & real & (torch.arange(len(real)) > first)
    relation = maps[layer - 1][row][:, last, where].double()
    value = taken[layer - 1, "v"][1][row][torch.cat((where, torch.tensor([last])))]
    transition = torch.zeros(len(real)).double()
    for i in {0, 1} | {layer - 2, layer - 1}:
        standing = real & ~gone[i][row]
        for part in ("attention", "mlp"):
            x, y = (side[row].double() for side in taken[i, part])
            turn = (1 - torch.cosine_similarity(x, y, dim=-1)).exp()
            transition += y.norm(dim=-1) / x.norm(dim=-1) * turn / turn[standing].sum()
    return {
        "last": before[last, where],
        "instruction": before[tail][:, where].mean(0),
        "next last": coming[last, where],
        "next instruction": coming[tail][:, where].mean(0),
        "text to visual": before[words][:, pictures].sum(1).mean(),
        "visual to text": before[pictures][:, words].sum(1).mean(),
        "transition": transition[where],
        "relation": (relation / relation.sum(-1, keepdim=True)).mean(0),
        "value": value.unflatten(-1, (2, -1)).transpose(0, 1),
    }
