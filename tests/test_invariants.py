"""What must always hold, for every method on every family that it fits (DESIGN.md section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import vtok
from vtok.api import session_of
from vtok.engine.cache import cache_of

from .conftest import LLAVA, METHODS, PAIRS, SHARED, anatomy, settings, site
from .models import FAMILIES, QWEN, SCENARIOS, Batch, close, inputs, pad_right, real_of, scenarios, single, visual_mask
from .oracle import Prompt, hidden_columns, masked, recorded, rewrites, survivors, text_model

SOME = ("ragged", "adjacent", "mixed")  # all that the other scenarios have is in these
CASES = [(method, family, name) for method, family in PAIRS for name in SOME if name in scenarios(family)]
pairs = pytest.mark.parametrize(("method", "family"), PAIRS)
cases = pytest.mark.parametrize(("method", "family", "name"), CASES)
GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 3}


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
        past = cache_of(kwargs).get_seq_length(number)
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
