"""What a model's answers hang on: the head that learns it, and the picks that it weighs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vtok.resampler import OrderedResampler, ResamplerConfig
from vtok.resampler.learn import salience
from vtok.resampler.saliency import FLOOR, SaliencyHead, energy, saliency_loss, weights
from vtok.resampler.starts import farthest


@given(st.lists(st.floats(-40, 40), min_size=1, max_size=30), st.data())
def test_weights_are_for_real_cells_and_keep_their_order(logits: list[float], data: st.DataObject) -> None:
    row = torch.tensor([logits])
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))])
    mask[0, data.draw(st.integers(0, len(logits) - 1))] = True
    found = weights(row, mask)
    assert ((found >= FLOOR) & (found <= 1)).all()
    assert found[mask].max() == 1
    own, order = found[mask], row[mask].argsort()
    assert (own[order].diff() >= 0).all()


def test_energies_are_in_units_of_the_spread() -> None:
    gradient = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]])
    assert energy(gradient, torch.tensor([1.0, 0.5])).tolist() == [[9.0, 1.0]]


def test_an_untrained_head_picks_as_farthest_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 42, 24)
    made = OrderedResampler(ResamplerConfig(dim=24, width=32, head_dim=16, tokens=20, scheme="salient"))
    found, plain = made.starts(x, (6, 7), 20), farthest(x, (6, 7), 20)
    assert found.picks is not None and torch.equal(found.picks, plain.picks)


def test_picks_follow_the_weights() -> None:
    torch.manual_seed(0)
    x, weighed = torch.randn(2, 42, 24), torch.full((2, 42), 0.01)
    weighed[:, 7:14] = 1
    found = farthest(x, (6, 7), 7, weights=weighed).picks
    assert found is not None and found.sort(1).values.tolist() == [list(range(7, 14))] * 2
    mask = torch.ones(2, 42, dtype=torch.bool)
    mask[0, 10:] = False
    masked = farthest(x, (6, 7), 4, mask, weighed).picks
    assert masked is not None and set(masked[0, :3].tolist()) == {7, 8, 9}
    assert torch.equal(masked[1], found[1, :4])


@pytest.mark.grad
def test_the_head_learns_the_mean_over_questions() -> None:
    """Two kinds of tokens; a question in four is about the rare kind, and has longer gradients."""
    torch.manual_seed(0)
    kinds = torch.randn(3, 24)
    resampler = OrderedResampler(ResamplerConfig(dim=24, width=32, head_dim=16, tokens=8, scheme="salient"))
    optimizer = torch.optim.AdamW(resampler.saliency.parameters(), lr=1e-2)
    shown = torch.tensor([0] * 10 + [1, 2])
    for step in range(300):
        gradient = torch.zeros(12, 24)
        gradient[11 if step % 4 == 0 else 10] = 100.0 if step % 4 == 0 else 1.0
        gradient[3] = torch.nan  # not measured
        loss, numbers = salience(resampler, [kinds[shown]], [gradient])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = resampler.saliency(kinds[shown]).softmax(-1)
    assert share[10].item() == pytest.approx(0.75, abs=0.07)
    assert share[11].item() == pytest.approx(0.25, abs=0.07)
    assert numbers["perplexity"] > 1
    changed = [name for name, p in resampler.named_parameters() if p.grad is not None]
    assert changed and all(name.startswith("saliency.") for name in changed)


@pytest.mark.grad
def test_pictures_without_a_gradient_teach_nothing() -> None:
    head = SaliencyHead(4)
    logits = [head(torch.randn(5, 4)), head(torch.randn(3, 4))]
    loss = saliency_loss(logits, [torch.zeros(5), torch.full((3,), torch.nan)])
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_picks_do_not_hang_on_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 42, 24)
    made = OrderedResampler(ResamplerConfig(dim=24, width=32, head_dim=16, tokens=20, scheme="salient"))
    nn.init.normal_(made.saliency.out.weight)
    plain = made.starts(x, (6, 7), 20).picks
    with torch.autocast("cpu", torch.bfloat16):
        found = made.starts(x, (6, 7), 20).picks
    assert found is not None and plain is not None and torch.equal(found, plain)
    assert not torch.equal(plain, farthest(x, (6, 7), 20).picks)
