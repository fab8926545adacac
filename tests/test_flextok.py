"""Method flextok: what an ordered resampler's tokens are, where they stand, and what is said when all is not well."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vtok
from vtok.api import adapter_of, session_of
from vtok.methods.flextok import layouts
from vtok.resampler import OrderedResampler, ResamplerConfig, files, plan
from vtok.resampler.learn import answer_loss
from vtok.resampler.watching import Probe
from vtok.view import Selection, View

from .conftest import LLAVA
from .models import FAMILIES, QWEN, SCENARIOS, build, inputs, scenarios, single
from .oracle import recorded, survivors


def close(a: Tensor, b: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def made(model: Any, trained: bool = True, **changes: Any) -> OrderedResampler:
    """A small resampler for a model; "trained" ones have random corrections."""
    door = files.door(adapter_of(model))
    config = ResamplerConfig(**{"dim": door.dim, "width": 32, "head_dim": 16, "blocks": 2, "tokens": 32, **changes})
    torch.manual_seed(0)
    resampler = OrderedResampler(files.made_for(config, door)).eval()
    if trained:
        torch.nn.init.normal_(resampler.leave.weight, std=0.2)
        if resampler.config.scheme == "salient":
            torch.nn.init.normal_(resampler.saliency.out.weight)
    return resampler


@dataclass(frozen=True)
class Shifted(Probe):
    """Adds something to the tokens that it keeps, view by view."""

    shift: list[Tensor] = field(default_factory=list, compare=False)

    def select(self, view: View, count: int) -> Selection:
        found = super().select(view, count)
        assert found.features is not None
        return replace(found, features=found.features.detach() + self.shift[len(self.seen) - 1])


# what the tokens are


@pytest.mark.parametrize("scheme", ["quadtree", "haar"])
def test_llava_gets_averages_in_front_of_its_projector(tiny: Any, scheme: str) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["ragged"])
    entered: list[Tensor] = []
    base = model.model
    watch = base.multi_modal_projector.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    model(**batch)
    watch.remove()
    vtok.compress(model, "flextok", keep=17, scheme=scheme)
    with recorded(model) as prompt:
        model(**batch)
    laid = plan(17, (8, 8), scheme)
    for number, span in enumerate(session_of(model).last.spans):
        tokens = base.multi_modal_projector(laid.weights @ entered[0][number])
        close(prompt.embeds[span.sample, span.columns[laid.places]], tokens)


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("trained", [False, True])
def test_qwen_gets_them_behind_its_merger_at_their_own_positions(tiny: Any, family: str, trained: bool) -> None:
    model = tiny(family)
    batch = inputs(family, model, [[4, "image:84x56", 5]])
    resampler = made(model) if trained else None
    seen: dict[str, Any] = {}

    def behind(module: Any, args: tuple, kwargs: dict) -> None:
        seen.update(kwargs)

    with torch.no_grad():
        plain: dict[str, Any] = {}
        handle = model.model.language_model.register_forward_pre_hook(
            lambda m, a, kw: plain.update(kw), with_kwargs=True
        )
        model(**batch)
        handle.remove()
    vtok.compress(model, "flextok", keep=5, weights=resampler)
    handle = model.model.language_model.register_forward_pre_hook(behind, with_kwargs=True)
    model(**batch)
    handle.remove()
    (span,) = session_of(model).last.spans
    grid, scheme = (4, 6), "haar" if trained else "quadtree"
    laid = plan(5, grid, scheme)
    kept = vtok.report(model).kept[0][0]
    assert torch.equal(kept, laid.places.sort().values)
    standing = survivors(model, batch)[0].nonzero().flatten()
    columns = torch.stack([(standing == span.columns[place]).nonzero()[0, 0] for place in laid.places])
    x = plain["inputs_embeds"][0, span.columns]
    expected = resampler(x[None], grid, 5)[0] if resampler is not None else laid.weights @ x
    close(seen["inputs_embeds"][0, columns], expected)
    # M-RoPE ids are those of the places, text keeps the full sequence's
    assert torch.equal(seen["position_ids"], plain["position_ids"][..., standing])
    if family == "qwen3_vl":
        for short, full in zip(seen["deepstack_visual_embeds"], plain["deepstack_visual_embeds"], strict=True):
            close(short, (laid.weights @ full)[laid.places.argsort()])


@pytest.mark.parametrize("family", QWEN)
def test_untrained_picks_are_divprunes(tiny: Any, family: str) -> None:
    """Behind the merger both compare the same features, and first of all comes what is farthest from its nearest."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, "divprune", keep=5)
    expected, kept = model(**batch).logits, vtok.report(model).kept
    vtok.compress(model, "flextok", keep=5, scheme="farthest")
    close(model(**batch).logits, expected)
    for own, other in zip(vtok.report(model).kept, kept, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))


@pytest.mark.grad
@pytest.mark.parametrize("family", FAMILIES)
def test_what_an_answer_hangs_on_is_its_gradient(tiny: Any, family: str) -> None:
    """Of every picture's tokens in raster order, against differences."""
    model = copy.deepcopy(tiny(family)).double()
    batch = inputs(family, model, SCENARIOS["mixed" if "mixed" in scenarios(family) else "ragged"])
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}

    def said(probe: Probe) -> Tensor:
        torch.manual_seed(3)  # keeps the same tokens
        with vtok.compressed(model, probe, keep=0.9):
            return model(**batch).logits[:, -1].log_softmax(-1)[:, 3].sum()

    probe = Probe()
    pictures, gradients = probe.pictures(said(probe))
    views = [view for view, _, _ in probe.seen]
    assert len(pictures) == len(gradients) == sum(len(rows) * len(grids) for v in views for rows, grids in layouts(v))
    known = torch.cat([own.isfinite().all(1) for own in gradients]).float().mean()
    assert 0.8 < known < 1 and all(x.shape == own.shape for x, own in zip(pictures, gradients, strict=True))
    # towards where it rises: norms in fp32 would drown small differences
    again = Probe()
    direction = list(torch.autograd.grad(said(again), [tokens for _, _, tokens in again.seen]))
    direction = [own / own.norm() for own in direction]
    step = 1e-2
    ends = [said(Shifted(shift=[sign * step * own for own in direction])) for sign in (1, -1)]
    found = torch.tensor(0.0)
    for (view, kept, _), own in zip(probe.seen, direction, strict=True):
        whole = torch.zeros(view.features.shape, dtype=own.dtype).scatter_(1, kept[..., None].expand_as(own), own)
        for rows, grids in layouts(view):
            for where, _ in grids:
                for shifts in whole[rows][:, where]:
                    found = found + (gradients.pop(0).nan_to_num() * shifts.float()).sum()
    assert found.item() == pytest.approx((ends[0] - ends[1]).item() / (2 * step), rel=0.02)


@pytest.mark.parametrize("scheme", ["haar", "farthest", "salient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_tokens_are_the_first_of_more(tiny: Any, family: str, scheme: str) -> None:
    """With trained weights too: at the same places stands the same, whatever else does."""
    model = tiny(family)
    batch = single(inputs(family, model, SCENARIOS["ragged"]), 0)
    resampler = made(model, scheme=scheme)
    found = {}
    for keep in (5, 12):
        vtok.compress(model, "flextok", keep=keep, weights=resampler)
        with recorded(model) as prompt:
            model(**batch)
        (span,) = session_of(model).last.spans
        kept = vtok.report(model).kept[0][0].tolist()
        found[keep] = {token: prompt.merged[0, span.columns[token]] for token in kept}
    if family == "llava_onevision":  # its tiles are resampled to fewer tokens behind the projector
        return
    assert found[5].keys() < found[12].keys()
    for token, value in found[5].items():
        close(found[12][token], value, 1e-5)


@pytest.mark.parametrize("scheme", ["haar", "farthest", "salient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_weights_hold_in_batches_of_different_pictures(tiny: Any, family: str, scheme: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["mixed" if "mixed" in scenarios(family) else "ragged"])
    vtok.compress(model, "flextok", keep=0.3, weights=made(model, tokens=64, scheme=scheme))
    together, live = model(**batch).logits, survivors(model, batch)
    ids = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] == batch["input_ids"].shape[1] + 3
    for row in range(len(batch["input_ids"])):
        own = single(batch, row)
        close(together[row][live[row]], model(**own).logits[0][survivors(model, own)[0]])


def test_tiles_get_a_call_each_and_share_the_budget(tiny: Any) -> None:
    model = tiny("llava_next")
    batch = inputs("llava_next", model, [[4, "image:112x84", 5]])  # two rows of two tiles, unpadded, and a thumbnail
    vtok.compress(model, "flextok", keep=40)
    model(**batch)
    report = vtok.report(model)
    assert report.tokens_kept == 40
    first = report.parts[0][0][0].length
    kept = report.kept[0][0]
    inside = int((kept < first).sum())
    assert 0 < inside < 40
    laid = plan(inside, (8, 8), "quadtree")
    assert torch.equal(kept[:inside], laid.places.sort().values)


def test_every_patch_belongs_to_a_token(tiny: Any) -> None:
    model = tiny("llava")
    vtok.compress(model, "flextok", keep=9)
    model(**inputs("llava", model, SCENARIOS["one"]))
    report = vtok.report(model)
    groups = report.groups[0][0]
    assert sorted(token for group in groups for token in group) == list(range(64))
    assert all(token in group for token, group in zip(report.kept[0][0].tolist(), groups, strict=True))


# learning


@pytest.mark.grad
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_divergence_falls_and_the_model_stays(family: str) -> None:
    """Distilled on one batch, tokens that stand for the whole picture bring the answers nearer to the plain model's."""
    model = build(family, layers=3).requires_grad_(False)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    batch = inputs(family, model, [[5, "image#1", 6], [3, "image#2", 8]])
    with torch.no_grad():
        teacher = model(**batch).logits[:, -3:].flatten(0, 1)
    resampler = made(model, trained=False, tokens=8).train()
    optimizer = torch.optim.AdamW(resampler.parameters(), lr=3e-3)
    vtok.compress(model, "flextok", keep=4, weights=resampler)
    losses = []
    for _ in range(25):
        student = model(**batch).logits[:, -3:].flatten(0, 1)
        loss, numbers = answer_loss(student, teacher, teacher.argmax(-1), weight=1.0)
        losses.append(numbers["kl"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    vtok.restore(model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


# how many


@pytest.mark.parametrize("scheme", ["haar", "farthest"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "llava_next"])
def test_auto_gives_each_picture_what_it_needs(tiny: Any, family: str, scheme: str) -> None:
    """Batches whose pictures keep different numbers of tokens are still their samples."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    resampler = made(model, halting=True, scheme=scheme)
    resampler.enough = lambda registers, quality: 1 + (registers[:, 1:, 0] > 0).sum(1)  # differs from one to the next
    vtok.compress(model, "flextok", keep="auto", weights=resampler)
    assert session_of(model).methods[0].auto == 0.8
    together, live = model(**batch).logits, survivors(model, batch)
    report = vtok.report(model)
    sizes = [len(kept) for sample in report.kept for kept in sample]
    assert len(set(sizes)) > 1
    assert report.average_tokens <= 0.5 * report.tokens_in + 1
    model.generate(**batch, max_new_tokens=2)
    for row in range(len(batch["input_ids"])):
        own = single(batch, row)
        close(together[row][live[row]], model(**own).logits[0][survivors(model, own)[0]])
        assert [len(kept) for kept in vtok.report(model).kept[0]] == [len(kept) for kept in report.kept[row]]


# saved with the model


def test_saved_models_bring_their_resampler(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llava")
    batch = inputs("llava", model, SCENARIOS["one"])
    vtok.compress(model, "flextok", keep=9, weights=made(model))
    expected = model(**batch).logits
    vtok.save(model, tmp_path / "saved")
    again = vtok.load(tmp_path / "saved")
    assert torch.equal(again(**batch).logits, expected)
    assert torch.equal(vtok.load(tmp_path / "saved", model=model)(**batch).logits, expected)


def test_an_evaluation_tells_weights_apart(tiny: Any, tmp_path: Path) -> None:
    """Answers are kept by what they depend on, which a folder's name alone does not say."""
    from vtok_eval.harness.cells import line_up

    model, folder = tiny("llava"), str(tmp_path / "own")
    found = []
    for trained in (False, True):
        files.save(made(model, trained=trained), folder)
        entries = line_up(model, ["flextok"], [9], {"flextok": {"weights": folder}}, [64])
        assert [entry.status for entry in entries] == ["ok", "ok"]
        assert entries[1].options == {"weights": folder}
        found.append(json.dumps(entries[1].fingerprint()))
    assert found[0] != found[1]
    (_, given) = line_up(model, [vtok.get("flextok", weights=made(model))], [9], {}, [64])
    assert given.options["weights"].startswith("OrderedResampler ")
    assert "weights" not in line_up(model, ["flextok"], [9], {}, [64])[1].fingerprint()


# wrong


def test_weights_of_another_model(tiny: Any, tmp_path: Path) -> None:
    llava, other, qwen = tiny("llava"), tiny("llava", seed=1), tiny("qwen2_vl")
    folder = str(files.save(made(llava), tmp_path / "own"))
    vtok.compress(llava, "flextok", keep=4, weights=folder)
    with pytest.raises(vtok.VtokError, match=r"belong to a llava model, and this is a qwen2_vl; distil"):
        vtok.compress(qwen, "flextok", keep=4, weights=folder)
    with pytest.raises(vtok.VtokError, match=r"distilled from another model of the same size"):
        vtok.compress(other, "flextok", keep=4, weights=folder)
    odd = OrderedResampler(ResamplerConfig(dim=48, width=32, head_dim=16, blocks=1, tokens=8))
    with pytest.raises(vtok.VtokError, match=r"of 48 channels, and this model's have 32"):
        vtok.compress(llava, "flextok", keep=4, weights=odd)
    assert session_of(llava)  # the first one still stands
    with torch.no_grad():  # a copy in half precision is the same model
        half = build("llava", layers=2).to(torch.bfloat16)
    vtok.compress(half, "flextok", keep=4, weights=folder)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "nowhere"}, r"no resampler 'nowhere'.*known names are"),
        ({"weights": 3}, r"flextok takes str or OrderedResampler or None as weights, not 3"),
        ({"scheme": "spiral"}, r"scheme='spiral' is unknown; known are quadtree, haar"),
        ({"scheme": "salient"}, r"scheme='salient' needs trained weights, which bring it along: pass weights= alone"),
        ({"auto": 0.5}, r"only trained weights can tell; pass weights="),
        ({"auto": 1.5}, r"auto=1.5 is no quality; give a number between 0 and 1"),
        ({"keep": "auto"}, r"only trained weights can tell; pass weights="),
        ({"keep": "some"}, r"keep='some' is not a budget"),
        ({"keep": 0}, r"would leave no visual token"),
    ],
)
def test_wrong_options(tiny: Any, options: dict, match: str) -> None:
    with pytest.raises(vtok.VtokError, match=match):
        vtok.compress(tiny("llava"), "flextok", **{"keep": 4, **options})


def test_methods_that_cannot_tell_have_no_auto(tiny: Any) -> None:
    with pytest.raises(vtok.VtokError, match=r'keep="auto".*which divprune cannot.*flextok'):
        vtok.compress(tiny("llava"), "divprune", keep="auto")


def test_more_tokens_than_it_was_trained_for(tiny: Any) -> None:
    model = tiny("llava")
    vtok.compress(model, "flextok", keep=20, weights=made(model, tokens=16))
    with pytest.raises(vtok.VtokError, match=r"up to 16 tokens of a picture, and 20 were asked for; take keep=16"):
        model(**inputs("llava", model, SCENARIOS["one"]))


def test_no_halting_head(tiny: Any) -> None:
    model = tiny("llava")
    with pytest.raises(vtok.VtokError, match=r"without a halting head.*give a number as keep"):
        vtok.compress(model, "flextok", keep="auto", weights=made(model))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("before", ["visionzip", "divprune"])
def test_thinned_pictures_are_refused(tiny: Any, family: str, before: str) -> None:
    with pytest.raises(vtok.VtokError, match=rf"reads whole pictures, and {before} would thin them.*put flextok first"):
        vtok.compress(tiny(family), [before, "flextok"], keep=0.3)


@pytest.mark.parametrize("family", LLAVA)
def test_behind_it_comes_any_decoder_method(tiny: Any, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, ["flextok", "fastv"], keep=0.3)
    model(**batch)
    report = vtok.report(model)
    assert [stage.site for stage in report.stages] == ["encoder", "decoder"]
    assert report.layer_tokens[-1] < report.layer_tokens[0] < report.tokens_in
