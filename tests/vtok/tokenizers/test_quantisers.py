"""Quantisers against their formulas, and through their one interface."""

from __future__ import annotations

import builtins
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers import preset, quantisers

CHOICES: dict[str, dict[str, Any]] = {
    "fsq": {},
    "fsq-odd": {"quantiser": "fsq", "levels": (3, 4, 7)},
    "vq": {"codebook": 50, "code_dim": 6},
    "binary": {"bits": 9},
    "kl": {"code_dim": 5},
    "none": {"code_dim": 5},
}


def build(name: str) -> quantisers.Quantiser:
    torch.manual_seed(0)
    return quantisers.build(preset("test", **{"quantiser": name} | CHOICES[name]))


def sample(quantiser: quantisers.Quantiser, count: int = 40) -> Tensor:
    return 2 * torch.randn(2, count, quantiser.inputs, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CHOICES)
def test_tokens_stand_for_the_values_that_training_sees(name: str) -> None:
    quantiser = build(name).eval()
    z = sample(quantiser)
    tokens = quantiser.tokens(z)
    values, losses = quantiser(z)
    assert not losses
    assert values.shape == (2, 40, quantiser.dim)
    torch.testing.assert_close(quantiser.embed(tokens), values, atol=1e-6, rtol=0)
    if quantiser.codes:
        assert tokens.dtype == torch.long and tokens.shape == (2, 40)
        assert tokens.min() >= 0 and tokens.max() < quantiser.codes
        assert torch.equal(quantiser.tokens(quantiser.embed(tokens) * 50) if name == "binary" else tokens, tokens)
    assert torch.equal(quantiser.train().tokens(z), tokens)


@pytest.mark.parametrize("name", CHOICES)
def test_gradients_reach_what_is_quantised(name: str) -> None:
    quantiser = build(name).train()
    z = sample(quantiser).requires_grad_()
    values, losses = quantiser(z, torch.Generator().manual_seed(0))
    (values.square().sum() + sum(losses.values())).backward()
    assert z.grad is not None and (z.grad.abs().amax((0, 1)) > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(3, 9), min_size=1, max_size=5),
    st.lists(st.floats(-6, 6, width=32), min_size=5, max_size=5),
)
def test_fsq_formula(levels: list[int], numbers: list[float]) -> None:
    """Bound, round, number: arXiv 2309.15505 section 3.2 and appendix A, one channel at a time in plain Python."""
    quantiser = quantisers.FSQ(tuple(levels))
    values, token, base, certain = [], 0, 1, True
    for level, z in zip(levels, numbers, strict=False):
        half = (level - 1) * 1.001 / 2
        offset = 0.5 if level % 2 == 0 else 0.0
        bounded = math.tanh(z + math.atanh(offset / half)) * half - offset
        certain &= abs(bounded - math.floor(bounded) - 0.5) > 1e-4  # at a tie fp32 may round the other way
        digit = round(bounded) + level // 2
        assert 0 <= digit < level or not certain
        values.append(round(bounded) / (level // 2))
        token, base = token + digit * base, base * level
    assert quantiser.codes == base
    if certain:
        z = torch.tensor(numbers[: len(levels)])[None, None]
        assert quantiser.tokens(z).item() == token
        torch.testing.assert_close(quantiser(z).values[0, 0], torch.tensor(values))


def test_fsq_has_every_code() -> None:
    quantiser = quantisers.FSQ((3, 4, 5))
    codes = quantiser.embed(torch.arange(60)[None])
    assert len(codes[0].unique(dim=0)) == 60
    assert torch.equal(quantiser.tokens(torch.atanh(codes * 0.9 * 0.999)).unique(), torch.arange(60).unique())


def test_vq_takes_the_nearest_direction_and_moves_its_codes_in_training_only() -> None:
    quantiser = build("vq")
    z = sample(quantiser)
    before = quantiser.core.codebook.clone()
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(50))
    nearest = torch.nn.functional.cosine_similarity(z[:, :, None], before, dim=-1).argmax(-1)
    assert torch.equal(quantiser.tokens(z), nearest)
    quantiser.eval()(z)
    assert torch.equal(quantiser.core.codebook, before)
    assert set(quantiser.train()(z).losses) == {"commitment"}
    assert not torch.equal(quantiser.core.codebook, before)


def test_bits_are_drawn_with_their_probability() -> None:
    quantiser = quantisers.Binary(3).train()
    z = torch.tensor([-1.0, 0.0, 2.0]).expand(1, 20000, 3)
    values, losses = quantiser(z, torch.Generator().manual_seed(0))
    p = torch.tensor([-1.0, 0.0, 2.0]).sigmoid()
    assert set(values.detach().unique().round(decimals=4).tolist()) == {-1.0, 1.0}
    torch.testing.assert_close((values[0] > 0).float().mean(0), p, atol=0.02, rtol=0)
    torch.testing.assert_close(losses["bits"], (p * (1 - p)).mean())
    assert quantiser.tokens(torch.tensor([[[1.0, -1.0, 1.0]]])).item() == 5
    assert quantisers.Binary(62).embed(torch.tensor([[2**61]])).sum() == -60


def test_kl_is_that_of_torch() -> None:
    quantiser = build("kl").train()
    z = sample(quantiser)
    mean, log_variance = z.chunk(2, -1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum(-1).mean()
    torch.testing.assert_close(quantiser(z).losses["kl"], expected)
    assert torch.equal(quantiser.tokens(z), mean)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **named: Any) -> Any:
        if name == "vector_quantize_pytorch":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in ("fsq", "vq"):
        with pytest.raises(VtokError, match=r"vtok\[tokenizers\]"):
            build(name)
    assert build("binary").codes == 512
