"""Fine-tuning a compressed model: the masked model's losses, gradients for what survives, none for scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import vtok

from .conftest import PAIRS, acts_in_tower, settings
from .models import SCENARIOS, Batch, build, inputs, pad_right, single
from .models import labels as next_tokens
from .oracle import hidden_columns, masked, recorded, rewrites, survivors

pytestmark = pytest.mark.grad
pairs = pytest.mark.parametrize(("method", "family"), PAIRS)


def labels(batch: Batch) -> Tensor:
    """Without a sample's first token either, which left padding has predict."""
    padding = batch["attention_mask"] == 0
    return next_tokens(batch).masked_fill(F.pad(padding[:, :-1], (1, 0)), -100)


def gradients(
    model: PreTrainedModel, batch: Batch, targets: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, labels=targets, **options).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def compare(a: dict[str, Tensor], b: dict[str, Tensor], atol: float = 2e-5) -> None:
    for name in a.keys() | b.keys():
        zero = torch.zeros_like((a if name in a else b)[name])
        x, y = a.get(name, zero), b.get(name, zero)
        torch.testing.assert_close(x, y, atol=atol, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pairs
def test_loss_and_gradients_equal_the_masked_models(tiny: Any, method: str, family: str) -> None:
    """On labels of text that follows text: what is predicted at an image's last token may change (it may be gone)."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    targets = labels(batch)
    vtok.compress(model, method, **settings(method, family, positions="keep"))
    with recorded(model) as prompt:
        loss, found = gradients(model, batch, targets)
    gone, changed = hidden_columns(model, batch), rewrites(model)
    vtok.restore(model)
    with masked(model, gone, batch["attention_mask"], prompt if changed else None):
        expected, reference = gradients(model, batch, targets)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    if changed:  # the plain model was handed the features: its gradient ends there
        decoder = [name for name in reference if "language_model.layers" in name or "lm_head" in name]
        found, reference = ({name: own[name] for name in decoder} for own in (found, reference))
    compare(found, reference)


@pairs
def test_gradients_reach_projector_tower_and_words(tiny: Any, method: str, family: str) -> None:
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, method, **settings(method, family))
    _, found = gradients(model, batch, labels(batch))
    wanted = {"embed_tokens": 0, "multi_modal_projector": 0, "merger": 0, "vision_tower": 0, "visual.blocks": 0}
    for name, gradient in found.items():
        assert gradient.isfinite().all(), name
        for part in wanted:
            wanted[part] += int(part in name and bool(gradient.abs().sum() > 0))
    assert wanted["embed_tokens"]
    assert wanted["multi_modal_projector"] or wanted["merger"]
    assert wanted["vision_tower"] or wanted["visual.blocks"]


@pairs
def test_gradients_reach_survivors_alone(tiny: Any, method: str, family: str) -> None:
    """A token that was dropped in front of the decoder gets no gradient; one that stands gets some."""
    if acts_in_tower(method, family):
        pytest.skip("what the tower drops never reaches the placeholders")
    model = tiny(family)
    batch = single(inputs(family, model, SCENARIOS["ragged"]), 0)
    text = model.model.language_model
    entered: list[Tensor] = []

    def before(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        entered.append(kwargs["inputs_embeds"].detach().requires_grad_())
        return args, {**kwargs, "inputs_embeds": entered[-1]}

    handle = text.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    vtok.compress(model, method, **settings(method, family, positions="keep"))
    model(**batch, labels=labels(batch)).loss.backward()
    handle.remove()
    reached = entered[0].grad[0].abs().sum(-1) > 0
    gone = hidden_columns(model, batch)[0][0]
    live = survivors(model, batch)[0]
    report = vtok.report(model)
    assert reached[live][:-1].all()  # the last token predicts nothing
    groups = report.groups[0][0] if report.kept[0] else None
    if groups is None:
        assert not reached[gone].any()
    else:  # merged tokens pass theirs on to all members
        start = int((batch["input_ids"][0] == batch["input_ids"][0].mode().values).nonzero()[0])
        members = torch.tensor([token for group in groups for token in group]) + start
        assert reached[members].all()


@pairs
def test_scores_need_no_gradients(tiny: Any, method: str, family: str) -> None:
    """The same tokens stay with and without gradients, and choosing them saves nothing for the backward pass."""
    model = tiny(family)
    batch = inputs(family, model, SCENARIOS["ragged"])
    vtok.compress(model, method, **settings(method, family))
    with torch.no_grad():
        model(**batch)
    kept = vtok.report(model).kept
    output = model(**batch)
    assert output.logits.requires_grad
    again = vtok.report(model).kept
    assert all(torch.equal(a, b) for x, y in zip(kept, again, strict=True) for a, b in zip(x, y, strict=True))
    model.requires_grad_(False)
    try:
        assert not model(**batch).logits.requires_grad
    finally:
        model.requires_grad_(True)


REENTRANT = [(method, family, True) for method, family in PAIRS if family in ("llava", "qwen3_vl")]


@pytest.mark.parametrize(("method", "family", "reentrant"), [*((*pair, False) for pair in PAIRS), *REENTRANT])
def test_gradient_checkpointing(method: str, family: str, reentrant: bool) -> None:
    """Recomputed layers see the tokens that they saw the first time."""
    old = "__call__" in GradientCheckpointingLayer.__dict__
    if old and reentrant and family == "qwen3_vl":
        pytest.skip("transformers 5.17 runs hooks inside the checkpoint, and DeepStack planes are no arguments of it")
    model = build(family, layers=6).train()
    batch = inputs(family, model, SCENARIOS["ragged"])
    targets = labels(batch)
    if reentrant:
        model.enable_input_require_grads()
    vtok.compress(model, method, **settings(method, family))
    loss, found = gradients(model, batch, targets, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if acts_in_tower(method, family) and old:
        with pytest.raises(vtok.VtokError, match=r"inside the vision tower.*update transformers"):
            gradients(model, batch, targets, use_cache=False)
        return
    again, checked = gradients(model, batch, targets, use_cache=False)
    assert torch.equal(loss, again)
    compare(found, checked, atol=1e-6)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", ["divprune", "fastv", "transprune"])
def test_a_few_steps_learn(method: str, family: str) -> None:
    model = build(family, layers=6).train()
    batch = pad_right(inputs(family, model, SCENARIOS["ragged"]))
    targets = labels(batch)
    vtok.compress(model, method, **settings(method, family))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(**batch, labels=targets).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
