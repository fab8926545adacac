"""The head behind keep="auto": what it is taught, what it learns, when it has enough."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vtok.resampler.agreement import AgreementHead, agreement_loss, enough, same_answers


def test_an_answer_is_the_same_if_all_its_tokens_are() -> None:
    turn = torch.tensor([1, 1, 1002, 1002, 1002, 1001])
    teacher = torch.tensor([5, 6, 7, 8, 9, 5])
    said = torch.tensor([5, 6, 7, 0, 9, 4])
    assert same_answers(said, teacher, turn).tolist() == [True, False, False]  # 1, 1001, 1002
    assert same_answers(teacher, teacher, turn).all()


@pytest.mark.grad
def test_pictures_of_a_question_multiply() -> None:
    one, two = torch.tensor([0.5]), torch.tensor([1.0, -2.0])
    p, q = one.sigmoid()[0], two.sigmoid().prod()
    found = agreement_loss([one, two], torch.tensor([True, False]))
    assert found.item() == pytest.approx(-(p.log() + (1 - q).log()).item() / 2, rel=1e-5)
    certain = torch.tensor([60.0], requires_grad=True)
    loss = agreement_loss([certain], torch.tensor([False]))
    loss.backward()
    assert loss.isfinite() and certain.grad is not None and certain.grad.isfinite().all()


@given(st.lists(st.floats(-6, 6), min_size=1, max_size=20), st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_a_higher_quality_never_asks_for_fewer(logits: list[float], one: float, two: float) -> None:
    low, high = sorted((one, two))
    asked = torch.tensor([logits])
    assert 1 <= enough(asked, low).item() <= enough(asked, high).item() <= len(logits)


def test_the_first_from_which_on_all_pass_or_all() -> None:
    logits = torch.tensor([[-1.0, 0.2, 0.3, 3.0], [0.2, -1.0, 0.2, 3.0], [3.0, 3.0, 3.0, -1.0], [1.0, 1.0, 1.0, 1.0]])
    assert enough(logits, 0.5).tolist() == [2, 3, 4, 1]
    assert enough(logits, 0.9).tolist() == [4, 4, 4, 4]


@pytest.mark.grad
def test_the_head_learns_how_often_answers_stay() -> None:
    """Two kinds of pictures: one needs 3 of 16 tokens, the other 12; below that every third answer is right by luck."""
    torch.manual_seed(0)
    head, places, kinds = AgreementHead(16), torch.randn(16, 16), torch.randn(2, 16)
    needed = torch.tensor([3, 12])

    def registers(kind: Tensor, k: Tensor) -> Tensor:
        return places[k - 1] + kinds[kind]

    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(300):
        kind, k = torch.randint(2, (64,)), torch.randint(1, 17, (64,))
        same = (k >= needed[kind]) | (torch.rand(64) < 1 / 3)
        loss = agreement_loss(list(head(registers(kind, k)[:, None])), same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    everything = torch.arange(1, 17)
    with torch.no_grad():
        logits = torch.stack([head(registers(torch.full((16,), kind), everything)) for kind in (0, 1)])
    assert ((enough(logits, 0.8) - needed).abs() <= 1).all()
    below = logits[1, :10].sigmoid().mean().item()
    assert 0.2 < below < 0.5  # luck is not taken for knowledge, nor denied
    assert logits[0, 5:].sigmoid().min() > 0.85
