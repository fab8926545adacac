"""Packed attention: segments do not see each other, biases count keys, and xformers gets what it needs."""

import sys
import types

import pytest
import torch
from torch.nn import functional as F

import vtok_kernels as vk
from vtok_kernels import packed

LENGTHS = [5, 1, 7]


def qkv(d: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(torch.randn(sum(LENGTHS), 3, d) for _ in range(3))


def dense(q, k, v, scale, bias):
    """One attention over everything with an explicit block mask."""
    segment = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(segment[:, None] != segment[None], float("-inf"))
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)


@pytest.mark.parametrize("biased", [False, True])
def test_equals_masked_attention(biased):
    q, k, v = qkv()
    bias = torch.rand(sum(LENGTHS)).mul(3).add(1).log() if biased else None
    out = vk.packed_attention(q, k, v, LENGTHS, scale=0.3, bias=bias)
    torch.testing.assert_close(out, dense(q, k, v, 0.3, bias), atol=1e-6, rtol=1e-5)


def test_log_size_bias_is_a_repeated_key():
    q, k, v = qkv()
    out = vk.packed_attention(q[:5], k[:5], v[:5], [5], scale=0.3, bias=torch.tensor([3.0, 1, 1, 1, 1]).log())
    twice = vk.packed_attention(
        torch.cat((q[:5], q[:2])), torch.cat((k[:5], k[:1], k[:1])), torch.cat((v[:5], v[:1], v[:1])), [7], scale=0.3
    )
    torch.testing.assert_close(out, twice[:5], atol=1e-6, rtol=1e-5)


def test_lengths_must_add_up():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="add up to 4"):
        vk.packed_attention(q, k, v, [4], scale=1.0)


@pytest.mark.parametrize("biased", [False, True])
def test_xformers_call(monkeypatch, biased):
    """A stand-in for xformers that does what its kernel does: no bias but the block mask, channels a multiple of 8."""

    def attention(q, k, v, attn_bias, scale):
        assert q.shape[-1] % 8 == 0
        segment = torch.repeat_interleave(torch.arange(len(attn_bias)), torch.tensor(attn_bias))
        allowed = segment[:, None] == segment[None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).transpose(1, 2)

    mask = types.SimpleNamespace(BlockDiagonalMask=types.SimpleNamespace(from_seqlens=list))
    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention, ops.fmha = attention, types.SimpleNamespace(attn_bias=mask)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v = qkv()
    bias = torch.rand(sum(LENGTHS)).add(1).log() if biased else None
    out = packed.xformers_attention(q, k, v, LENGTHS, scale=0.3, bias=bias)
    torch.testing.assert_close(out, dense(q, k, v, 0.3, bias), atol=1e-6, rtol=1e-5)


def test_missing_xformers_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError, match=r"pip install vtok\[xformers\]"):
        vk.load_xformers()
    assert "xformers" not in vk.available()["packed_attention"]
