"""The tiny models run, and behave well enough that other tests can compare against them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .models import (
    FAMILIES,
    FIRST_TEXT,
    HAS_VIDEO,
    IMAGE,
    PAD,
    QWEN,
    SCENARIOS,
    VISION_END,
    VISION_START,
    Batch,
    build,
    inputs,
    labels,
    pad_right,
    sample_images,
    scenarios,
    single,
    text_only,
    visual_mask,
)

CASES = [(family, name) for family in FAMILIES for name in scenarios(family)]
plain = cache(build)


@torch.no_grad()
def logits(model: PreTrainedModel, batch: dict) -> Tensor:
    return model(**batch).logits


def last(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits at every sample's last token."""
    rows, columns = batch["attention_mask"].shape
    ends = (batch["attention_mask"] * torch.arange(columns)).argmax(-1)
    return logits(model, batch)[torch.arange(rows), ends]


def assert_same(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert (a.images, a.videos, a.tiles) == (b.images, b.videos, b.tiles)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_batch_is_single(family: str, name: str) -> None:
    model = plain(family)
    batch = inputs(family, model, SCENARIOS[name])
    together = last(model, batch)
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokens.shape == (len(together), 3)
    assert tokens.min() >= FIRST_TEXT
    for i, prompt in enumerate(SCENARIOS[name]):
        alone = single(batch, i)
        assert_same(alone, inputs(family, model, [prompt]))
        assert alone["attention_mask"].all()
        torch.testing.assert_close(last(model, alone)[0], together[i], atol=1e-4, rtol=0)
        own = model.generate(**alone, max_new_tokens=3, do_sample=False)[0, -3:]
        assert own.tolist() == tokens[i].tolist()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_padding_side(family: str, name: str) -> None:
    model = plain(family)
    batch = inputs(family, model, SCENARIOS[name])
    right = pad_right(batch)
    torch.testing.assert_close(last(model, right), last(model, batch), atol=1e-4, rtol=0)
    for i in range(len(SCENARIOS[name])):
        assert_same(single(right, i), single(batch, i))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_depend_on_the_image(family: str) -> None:
    model = plain(family)
    batch = inputs(family, model, [[5, "image#1", 7]])
    other = inputs(family, model, [[5, "image#2", 7]])
    base = last(model, batch)
    for pixels in (torch.zeros_like(batch["pixel_values"]), other["pixel_values"]):
        assert (last(model, Batch({**batch, "pixel_values": pixels}, [1], [0], batch.tiles)) - base).abs().max() > 0.1


@pytest.mark.parametrize("family", HAS_VIDEO)
def test_logits_depend_on_every_frame(family: str) -> None:
    model = plain(family)
    batch = inputs(family, model, SCENARIOS["video"])
    base, pixels = last(model, batch), batch["pixel_values_videos"]
    frames = pixels[0] if pixels.ndim == 5 else pixels.view(3, -1, pixels.shape[-1])
    for k in range(3):
        frame = frames[k].clone()
        frames[k] = 0
        assert (last(model, batch) - base).abs().max() > 0.01
        frames[k] = frame


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_neither_uniform_nor_on_one_token(family: str) -> None:
    model = build(family, attn="eager", layers=4)
    batch = inputs(family, model, SCENARIOS["one"])
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    assert len(attentions) == 4
    visual = visual_mask(batch)[0]
    for weights in attentions:
        row = weights[0, :, -1]
        used = (-(row * row.clamp_min(1e-12).log()).sum(-1)).exp().mean() / row.shape[-1]
        assert 0.02 < used < 0.7
        assert row[:, visual].sum(-1).mean() > 0.05
        score = row.mean(0)[visual]
        assert score.max() > 3 * score.min()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_depend_on_every_position_axis(family: str) -> None:
    model = plain(family)
    batch = inputs(family, model, SCENARIOS["one"])
    base = logits(model, batch)[0, -1]
    if family in QWEN:
        positions = model.model.get_rope_index(**{k: v for k, v in batch.items() if k != "pixel_values"})[0]
    else:
        positions = torch.arange(batch["input_ids"].shape[1]).expand(1, 1, -1)
    for axis in range(len(positions)):
        moved = positions.clone()
        moved[axis][visual_mask(batch)] += 1
        moved = moved if family in QWEN else moved[0]
        assert (logits(model, {**batch, "position_ids": moved})[0, -1] - base).abs().max() > 0.02


@pytest.mark.parametrize("family", FAMILIES)
def test_build(family: str) -> None:
    model, again = build(family, seed=3), build(family, seed=3, attn="eager")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert not model.training
    assert model.config is not again.config
    assert (model.config._attn_implementation, again.config._attn_implementation) == ("sdpa", "eager")
    batch = inputs(family, model, SCENARIOS["ragged"])
    torch.testing.assert_close(last(model, batch), last(again, batch), atol=1e-4, rtol=0)
    assert (last(plain(family), batch) - last(model, batch)).abs().max() > 0.1
    shallow = dict(build(family, seed=3, layers=2, vision_layers=2).named_parameters())
    full = dict(model.named_parameters())
    assert shallow.keys() < full.keys()
    assert all(torch.equal(value, full[name]) for name, value in shallow.items())
    small = build(family, layers=2, vision_layers=1, dtype=torch.bfloat16)
    assert last(small, batch).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_and_names(family: str) -> None:
    model = plain(family)
    batch = inputs(family, model, [[4, "image#1", 2], [4, "image", 2], [4, "image", 2], [6, "image#1", 3]])
    assert [sample_images(batch, i) for i in range(4)] == [(1, 0)] * 4
    pixels = [single(batch, i)["pixel_values"] for i in range(4)]
    assert torch.equal(pixels[0], pixels[3])
    assert not torch.equal(pixels[1], pixels[2])
    assert not torch.equal(single(batch, 1)["input_ids"], single(batch, 2)["input_ids"])
    assert text_only(family, model, [3, 8])["attention_mask"].sum(-1).tolist() == [3, 8]
    with pytest.raises(ValueError, match="has no"):
        inputs(family, model, [["picture"]])
    if family not in HAS_VIDEO:
        with pytest.raises(ValueError, match="has no"):
            inputs(family, model, SCENARIOS["video"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.grad
def test_labels_and_gradients(family: str) -> None:
    model = build(family, layers=2).train()
    batch = pad_right(inputs(family, model, SCENARIOS["ragged"]))
    target = labels(batch)
    ids, kept = batch["input_ids"], target != -100
    assert torch.equal(target[kept], ids[kept])
    assert not torch.isin(ids[kept], torch.tensor([PAD, IMAGE, VISION_END])).any()
    starts = 3 if family in QWEN else 0  # there an image sits between two special tokens, and the second one is masked
    assert (ids[kept] == VISION_START).sum() == starts
    assert kept.sum() == 5 + 4 + 3 + 2 + 6 + 9 + (starts or -3)
    model(**batch, labels=target).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.lm_head.parameters())


def test_onevision_flat_images() -> None:
    """A flat list of images: each is split, and `batch_num_images` counts nothing per sample."""
    model = plain("llava_onevision")
    batch = inputs("llava_onevision", model, SCENARIOS["ragged"], nested=False)
    assert batch["batch_num_images"].tolist() == [1, 1, 1]
    assert visual_mask(batch).sum(-1).tolist() == [194, 358, 0]
    together = last(model, batch)
    for i in range(3):
        torch.testing.assert_close(last(model, single(batch, i))[0], together[i], atol=1e-4, rtol=0)
