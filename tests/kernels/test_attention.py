"""Attention statistics equal those of the full eager map."""

import pytest
import torch

import vtok_kernels as vk

B, H, N, D = 2, 4, 9, 8
SCALE = D**-0.5


def eager(q, k, scale, mask=None):
    """The whole map (B, H, R, N), as an eager model makes it; rows with nothing to attend are zero."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("bhrd,bhnd->bhrn", q.double(), k.double()) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0)


def qkv(rows=N, kv_heads=H, seed=0):
    torch.manual_seed(seed)
    return torch.randn(B, H, rows, D), torch.randn(B, kv_heads, N, D)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask_rows", [None, 1, 3])
def test_attention_rows_equal_eager_map(kv_heads, mask_rows):
    q, k = qkv(3, kv_heads)
    mask = None if mask_rows is None else torch.rand(B, mask_rows, N) < 0.6
    rows = vk.attention_rows(q, k, scale=SCALE, mask=mask)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), eager(q, k, SCALE, mask).mean(1), atol=1e-6, rtol=1e-5)


def test_attention_rows_with_nothing_to_attend_are_zero():
    q, k = qkv(2)
    mask = torch.ones(B, 2, N, dtype=torch.bool)
    mask[0, 1] = False
    rows = vk.attention_rows(q, k, scale=SCALE, mask=mask)
    assert (rows[0, 1] == 0).all()
    torch.testing.assert_close(rows.sum(-1), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("block", [1, 4, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_received_attention_equals_eager_map(kv_heads, block, causal, masked):
    q, k = qkv(7, kv_heads)
    key_mask = torch.rand(B, N) < 0.7 if masked else None
    query_mask = torch.rand(B, 7) < 0.7 if masked else None
    positions = torch.randint(-1, N, (B, 7)) if causal else None
    mask = torch.ones(B, 7, N, dtype=torch.bool)
    if masked:
        mask = mask & key_mask[:, None]
    if causal:
        mask = mask & (torch.arange(N) <= positions[:, :, None])
    valid = query_mask if masked else torch.ones(B, 7, dtype=torch.bool)
    rows = eager(q, k, SCALE, mask).mean(1) * valid[..., None]
    expected = rows.sum(1) / valid.sum(1, keepdim=True).clamp_min(1)

    received = vk.received_attention(
        q,
        k,
        scale=SCALE,
        key_mask=key_mask,
        query_mask=query_mask,
        query_positions=positions,
        block=block,
    )
    torch.testing.assert_close(received.double(), expected, atol=1e-6, rtol=1e-5)


def test_received_attention_without_valid_query_is_zero():
    q, k = qkv()
    query_mask = torch.zeros(B, N, dtype=torch.bool)
    query_mask[1, 3] = True
    received = vk.received_attention(q, k, scale=SCALE, query_mask=query_mask)
    assert (received[0] == 0).all()
    torch.testing.assert_close(received[1], eager(q, k, SCALE)[1, :, 3].mean(0).float())


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("masked", [False, True])
def test_value_similarity_is_a_softmax_of_products(scale, masked):
    row, v = qkv(1)
    mask = torch.rand(B, N) < 0.6 if masked else None
    expected = eager(row, v, scale, None if mask is None else mask[:, None]).mean(1)[:, 0]
    found = vk.value_similarity(v, row[:, :, 0], scale=scale, mask=mask)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_scored_in_fp32_and_double_stays(dtype):
    q, k = (x.to(dtype) for x in qkv(2))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    rows = vk.attention_rows(q, k, scale=SCALE)
    assert rows.dtype == expected
    torch.testing.assert_close(rows.double(), eager(q, k, SCALE).mean(1), atol=1e-6, rtol=1e-5)
    assert vk.received_attention(q, k, scale=SCALE).dtype == expected
    assert vk.value_similarity(k, q[:, :, 0]).dtype == expected


def test_statistics_take_no_gradient():
    q, k = qkv(2)
    assert not vk.attention_rows(q.requires_grad_(), k, scale=SCALE).requires_grad


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda q, k: vk.attention_rows(q[:, :3], k[:, :2], scale=1), "multiple of the key heads"),
        (lambda q, k: vk.attention_rows(q[0], k, scale=1), r"\(B, H, R, d\) is needed"),
        (lambda q, k: vk.attention_rows(q, k, scale=1, mask=torch.zeros(B, N, N)), "pass a bool mask"),
        (lambda q, k: vk.attention_rows(q, k, scale=1, mask=torch.ones(B, N, dtype=torch.bool)), "is needed"),
        (lambda q, k: vk.received_attention(q, k, scale=1, block=0), "block >= 1"),
        (lambda q, k: vk.received_attention(q, k, scale=1, query_positions=torch.zeros(B, 3)), "query_positions"),
        (lambda q, k: vk.value_similarity(k, q), r"\(B, H, d\) is needed"),
    ],
)
def test_bad_arguments_are_explained(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(*qkv())
