"""Samplers of prefix lengths, and nested dropout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.errors import VtokError
from vtok.tokenizers.config import SAMPLERS
from vtok.tokenizers.nested import NestedDropout, powers_of_two, sample_keep


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SAMPLERS), st.integers(1, 300), st.integers(1, 40), st.integers(0, 1000))
def test_lengths_are_lengths(sampler: str, count: int, batch: int, seed: int) -> None:
    keep = sample_keep(sampler, count, batch, torch.Generator().manual_seed(seed))
    assert keep.shape == (batch,) and keep.dtype == torch.long
    assert keep.min() >= 1 and keep.max() <= count
    assert torch.equal(keep, sample_keep(sampler, count, batch, torch.Generator().manual_seed(seed)))
    if sampler in ("pow2", "uniform_pow2", "mix"):
        assert set(keep.tolist()) <= set(powers_of_two(count))
    if sampler == "mix":
        assert (keep[batch // 2 :] == count).all()


def test_shares() -> None:
    def share(sampler: str) -> list[float]:
        drawn = sample_keep(sampler, 16, 40000, torch.Generator().manual_seed(0))
        return (torch.bincount(drawn, minlength=17) / 40000).tolist()

    assert share("uniform")[1:] == pytest.approx([1 / 16] * 16, abs=0.01)
    assert [share("pow2")[k] for k in (1, 2, 4, 8, 16)] == pytest.approx([0.2] * 5, abs=0.01)
    # half of all lengths lie above K / 2, a quarter above K / 4 ...
    assert [share("uniform_pow2")[k] for k in (1, 2, 4, 8, 16)] == pytest.approx(
        [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2], abs=0.01
    )
    assert share("none")[16] == 1


def test_powers_end_with_the_whole() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(9) == [1, 2, 4, 8, 9]


def test_dropped_tokens_become_the_learned_one() -> None:
    dropout, x = NestedDropout(4), torch.randn(3, 5, 4)
    y = dropout(x, torch.tensor([1, 5, 3]))
    for row, k in enumerate((1, 5, 3)):
        assert torch.equal(y[row, :k], x[row, :k])
        assert torch.equal(y[row, k:], dropout.mask.expand(5 - k, -1))


def test_unknown_sampler() -> None:
    with pytest.raises(VtokError, match="uniform_pow2"):
        sample_keep("zipf", 4, 2)
