"""The halting head: what it is taught, what it learns, when it halts."""

from __future__ import annotations

import pytest
import torch

from vtok.errors import VtokError
from vtok.tokenizers.halting import HaltingHead, ask, halt, halting_loss, wanted


def test_a_measured_prefix_teaches_what_it_implies() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    halting_loss(logits, torch.tensor([2, 3]), torch.tensor([0.1, 0.1]), torch.tensor([0.2, 0.05])).backward()
    assert logits.grad is not None
    signs = logits.grad.sign().int().tolist()
    assert signs[0] == [0, -1, -1, -1]  # reached with 2: so with more; fewer is unknown
    assert signs[1] == [1, 1, 1, 0]  # not reached with 3: nor with fewer; more is unknown


def test_halting_at_the_first_prefix_that_passes() -> None:
    logits = torch.tensor([[-1.0, 0.5, 1.2, 3.0], [2.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert halt(logits).tolist() == [3, 1, 4]
    assert halt(logits, 0.5).tolist() == [2, 1, 1]


def test_wanted_errors_lie_around_measured_ones() -> None:
    asked = ask(torch.full((4000,), 0.1), torch.Generator().manual_seed(0))
    assert asked.log2().mean().item() == pytest.approx(torch.tensor(0.1).log2().item(), abs=0.05)
    assert (asked > 0.1).float().mean() == pytest.approx(0.5, abs=0.05)


def test_it_learns_where_errors_fall_below_what_is_asked() -> None:
    """Pictures whose error behind k tokens is c / k, c readable from every register, need c / quality of them."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    head, places = HaltingHead(16), torch.randn(16, 16)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)

    def registers(c: torch.Tensor) -> torch.Tensor:
        return places.expand(len(c), -1, -1) + 3 * c[:, None, None].log() * torch.eye(16)[3]

    for _ in range(500):
        c = torch.exp2(2 * torch.rand(128, generator=generator) - 3)
        keep = torch.randint(1, 17, (128,), generator=generator)
        error = c / keep
        asked = ask(error, generator)
        loss = halting_loss(head(registers(c), asked), keep, error, asked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for quality in (0.025, 0.05, 0.1):
        c = torch.tensor([0.15, 0.25, 0.4])
        with torch.no_grad():
            found = halt(head(registers(c), wanted(quality, 3)))
        needed = (c / quality).clamp(1, 16)
        assert ((found / needed).log2().abs() < 1).all(), (quality, found.tolist(), needed.tolist())


def test_quality_must_be_an_error() -> None:
    for quality in (0, -1.0, float("nan"), "good", True):
        with pytest.raises(VtokError, match="quality"):
            wanted(quality, 2)  # type: ignore[arg-type]
