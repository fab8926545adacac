"""TokenBridge: equally likely bins, codes that decode to their means, tight packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok.errors import VtokError
from vtok.tokenizers import FlexTok, TokenBridge
from vtok.tokenizers.bridge import normal_bins


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bins_are_equally_likely_and_decode_to_their_means(bits: int) -> None:
    edges, means = normal_bins(bits)
    assert edges.shape == (2**bits - 1,) and means.shape == (2**bits,)
    x = normal(400_000)
    x = x[x.abs() < 3]
    number = torch.bucketize(x, edges)
    share = torch.bincount(number, minlength=2**bits) / len(x)
    torch.testing.assert_close(share * 2**bits, torch.ones(2**bits), atol=0.15, rtol=0)
    measured = torch.zeros(2**bits).index_add_(0, number, x) / (share * len(x))
    torch.testing.assert_close(means, measured, atol=0.02, rtol=0)
    torch.testing.assert_close(means, -means.flip(0), atol=1e-6, rtol=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 7), st.integers(0, 100))
def test_codes_and_packing_are_exact(bits: int, rows: int, channels: int, seed: int) -> None:
    tokens = 3 * torch.randn(2, rows, channels, generator=torch.Generator().manual_seed(seed))
    bridge = TokenBridge(bits)
    codes = bridge.encode(tokens)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**bits
    assert torch.equal(bridge.encode(bridge.decode(codes)), codes)  # a mean lies in its own bin
    packed = bridge.pack(codes)
    assert len(packed) == -(-codes.numel() * bits // 8)
    assert torch.equal(bridge.unpack(packed, tuple(codes.shape)), codes)


def test_six_bits_lose_little_and_more_bits_less() -> None:
    tokens = normal(500, 8) * torch.linspace(0.1, 9, 8) + torch.linspace(-5, 5, 8)
    lost = []
    for bits in (2, 4, 6, 8):
        bridge = TokenBridge.fit(tokens, bits)
        error = bridge.decode(bridge.encode(tokens)) - tokens
        lost.append((error.square().mean(0) / tokens.var(0)).mean().item())
    assert lost == sorted(lost, reverse=True)
    assert lost[2] < 0.01


def test_the_published_range_maps_five_to_three_deviations() -> None:
    bridge = TokenBridge()
    assert bridge.decode(torch.tensor([[63]], dtype=torch.uint8)).item() < 5
    assert bridge.encode(torch.tensor([[5.0, -5.0, 0.001]])).tolist() == [[63, 0, 32]]


def test_it_stores_the_tokens_of_a_continuous_tokenizer() -> None:
    torch.manual_seed(0)
    tokenizer = FlexTok.preset("test", quantiser="kl")
    tokens = tokenizer.encode(torch.rand(4, 3, 32, 32))
    bridge = TokenBridge.fit(tokens, 8)
    restored = bridge.decode(bridge.encode(tokens))
    torch.testing.assert_close(tokenizer.decode(restored), tokenizer.decode(tokens), atol=0.02, rtol=0)


def test_errors() -> None:
    for bits in (0, 9, 2.0, True):
        with pytest.raises(VtokError, match="bits"):
            TokenBridge(bits)  # type: ignore[arg-type]
    with pytest.raises(VtokError, match="spread"):
        TokenBridge(6, torch.zeros(3), torch.zeros(3))
    with pytest.raises(VtokError, match="two"):
        TokenBridge.fit(torch.zeros(1, 3))
    with pytest.raises(VtokError, match="finite"):
        TokenBridge().encode(torch.full((1, 3), torch.nan))
    with pytest.raises(VtokError, match="below 64"):
        TokenBridge().decode(torch.full((1, 3), 64))
    with pytest.raises(VtokError, match="shape"):
        TokenBridge().unpack(torch.zeros(3, dtype=torch.uint8), (2, 3))
