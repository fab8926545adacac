"""Attention statistics in Triton equal the whole map in float64."""

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.fused import _launch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-5, torch.float16: 2e-5}
DTYPES = list(TOLERANCE)


def eager(q, k, scale, mask=None):
    """The map (B, H, R, N) of the same numbers in float64; rows with nothing to attend are zero."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("bhrd,bhnd->bhrn", q.double(), k.double()) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0)


def heads(*shape, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def on(*shape, device="cpu", share=0.6, seed=1):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share).to(device)


def close(found, expected, dtype=torch.float32):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=1e-4)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Memory that a kernel allocates holds NaN until it writes there."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("masked", [None, 1, 3])
def test_rows(triton, dtype, n_heads, kv_heads, masked):
    q = heads(2, n_heads, 3, 24, dtype=dtype, device=triton)
    k = heads(2, kv_heads, 75, 24, dtype=dtype, device=triton, seed=2)
    mask = None if masked is None else on(2, masked, 75, device=triton)
    found = vk.attention_rows(q, k, scale=0.3, mask=mask)
    close(found, eager(q, k, 0.3, mask).mean(1), dtype)


@pytest.mark.parametrize(("rows", "n", "width"), [(1, 1, 1), (1, 200, 8), (17, 33, 72), (70, 5, 16), (2, 65, 130)])
def test_rows_of_odd_sizes(triton, rows, n, width):
    q, k = heads(1, 2, rows, width, device=triton), heads(1, 2, n, width, device=triton, seed=2)
    close(vk.attention_rows(q, k, scale=0.2), eager(q, k, 0.2).mean(1))


def test_rows_with_nothing_to_attend_are_zero(triton):
    q, k = heads(2, 2, 2, 8, device=triton), heads(2, 2, 70, 8, device=triton)
    mask = torch.ones(2, 2, 70, dtype=torch.bool, device=triton)
    mask[0, 1] = False
    mask[1, 0, :64] = False  # a part of the keys without one that is seen
    found = vk.attention_rows(q, k, scale=1.0, mask=mask)
    assert (found[0, 1] == 0).all()
    close(found, eager(q, k, 1.0, mask).mean(1))


def test_large_logits_do_not_overflow(triton):
    q, k = heads(1, 2, 2, 8, device=triton) * 50, heads(1, 2, 40, 8, device=triton, seed=2) * 50
    found = vk.attention_rows(q, k, scale=1.0)
    torch.testing.assert_close(found.double(), eager(q, k, 1.0).mean(1), atol=1e-3, rtol=1e-3)
    assert torch.isfinite(vk.received_attention(q, k, scale=1.0)).all()


def test_strides_are_followed(triton):
    """Projections come as (B, N, H, d) turned round, cut out of wider tensors."""
    q = heads(2, 5, 4, 40, device=triton)[:, ::2, :, 3:35].transpose(1, 2)
    k = heads(2, 90, 4, 64, device=triton, seed=2)[:, 1::2, 1:3, ::2].transpose(1, 2)
    assert not q.is_contiguous() and not k.is_contiguous()
    mask = on(45, 2, device=triton).t()[:, None].expand(2, 3, 45)
    close(vk.attention_rows(q, k, scale=0.2, mask=mask), eager(q, k, 0.2, mask).mean(1))
    positions = torch.arange(45, 42, -1, device=triton).expand(2, 3)
    visible = (torch.arange(45, device=triton) <= positions[..., None]) & mask
    found = vk.received_attention(q, k, scale=0.2, key_mask=mask[:, 0], query_positions=positions)
    close(found, eager(q, k, 0.2, visible).mean((1, 2)))
    similar = vk.value_similarity(k, q[:, :, 1], mask=mask[:, 0])
    close(similar, eager(q[:, :, 1:2], k, 1.0, mask[:, :1]).mean(1)[:, 0])


def test_large_strides_use_wide_offsets(triton):
    """Elements more than 2**31 apart, in memory that is reserved and never touched in between."""
    apart = 2**30 + 8
    try:
        storage = torch.zeros(1, dtype=torch.bfloat16, device=triton).new_empty(3 * apart)
    except RuntimeError:
        pytest.skip("needs 6 GB of address space")
    k = storage.as_strided((1, 1, 3, 8), (0, 0, apart, 1))
    k.copy_(heads(1, 1, 3, 8))
    q = heads(1, 1, 2, 8, dtype=torch.bfloat16, device=triton, seed=2)
    close(vk.attention_rows(q, k, scale=1.0), eager(q, k, 1.0).mean(1), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_heads", "kv_heads"), [(2, 2), (4, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_received(triton, dtype, n_heads, kv_heads, causal, masked):
    rows, n = 37, 70
    q = heads(2, n_heads, rows, 16, dtype=dtype, device=triton)
    k = heads(2, kv_heads, n, 16, dtype=dtype, device=triton, seed=2)
    key_mask = on(2, n, device=triton) if masked else None
    query_mask = on(2, rows, device=triton, seed=3) if masked else None
    generator = torch.Generator().manual_seed(4)
    positions = torch.randint(-1, n, (2, rows), generator=generator).to(triton) if causal else None
    visible = torch.ones(2, rows, n, dtype=torch.bool, device=triton)
    if masked:
        visible &= key_mask[:, None]
    if causal:
        visible &= torch.arange(n, device=triton) <= positions[..., None]
    counted = query_mask if masked else torch.ones(2, rows, dtype=torch.bool, device=triton)
    total = (eager(q, k, 0.25, visible).mean(1) * counted[..., None]).sum(1)
    found = vk.received_attention(q, k, scale=0.25, key_mask=key_mask, query_mask=query_mask, query_positions=positions)
    close(found, total / counted.sum(1, keepdim=True), dtype)


@pytest.mark.parametrize(("rows", "n"), [(1, 1), (1, 130), (150, 3), (70, 129)])
def test_received_by_odd_sizes_causally(triton, rows, n):
    q, k = heads(1, 2, rows, 8, device=triton), heads(1, 1, n, 8, device=triton, seed=2)
    positions = torch.arange(n - rows, n, device=triton)[None]
    visible = torch.arange(n, device=triton) <= positions[..., None]
    found = vk.received_attention(q, k, scale=0.5, query_positions=positions)
    close(found, eager(q, k, 0.5, visible).mean((1, 2)))


def test_no_valid_query_receives_zero(triton):
    q, k = heads(2, 2, 9, 8, device=triton), heads(2, 2, 9, 8, device=triton, seed=2)
    query_mask = torch.zeros(2, 9, dtype=torch.bool, device=triton)
    query_mask[1, 3] = True
    found = vk.received_attention(q, k, scale=0.5, query_mask=query_mask)
    assert (found[0] == 0).all()
    close(found[1], eager(q, k, 0.5)[1, :, 3].mean(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_similarity(triton, dtype):
    row, v = heads(2, 4, 16, dtype=dtype, device=triton), heads(2, 2, 51, 16, dtype=dtype, device=triton, seed=2)
    mask = on(2, 51, device=triton)
    expected = eager(row[:, :, None], v, 0.5, mask[:, None]).mean(1)[:, 0]
    close(vk.value_similarity(v, row, scale=0.5, mask=mask), expected, dtype)


def test_splits_and_chunks_change_nothing(triton, monkeypatch):
    from vtok_kernels.fused import attention

    q, k = heads(1, 4, 5, 8, device=triton), heads(1, 2, 150, 8, device=triton, seed=2)
    for programs in (1, 4096):
        monkeypatch.setattr(attention, "PROGRAMS", programs)
        close(vk.attention_rows(q, k, scale=0.5), eager(q, k, 0.5).mean(1))
        close(vk.received_attention(q, k, scale=0.5), eager(q, k, 0.5).mean((1, 2)))


def test_repeated_runs_agree_to_the_last_bit(triton):
    q, k = heads(1, 2, 5, 8, device=triton), heads(1, 1, 100, 8, device=triton, seed=2)
    for call in (vk.attention_rows, vk.received_attention):
        first = call(q, k, scale=0.5)
        assert all(torch.equal(call(q, k, scale=0.5), first) for _ in range(2))


def test_what_is_not_covered_is_left_to_the_reference(triton):
    q, k = heads(1, 2, 3, 8, device=triton).double(), heads(1, 2, 9, 8, device=triton).double()
    assert vk.attention_rows(q, k, scale=0.5).dtype == torch.float64
    assert vk.received_attention(q, k, scale=0.5).dtype == torch.float64
    assert vk.value_similarity(k, q[:, :, 0]).dtype == torch.float64
    assert vk.attention_rows(q[:, :, :0], k, scale=0.5).shape == (1, 0, 9)
    assert vk.received_attention(q.float()[:, :, :0], k.float(), scale=0.5).tolist() == [[0.0] * 9]
    assert vk.attention_rows(q, k[:, :, :0], scale=0.5).shape == (1, 3, 0)
    with pytest.raises(ValueError, match="multiple of the key heads"):
        vk.attention_rows(heads(1, 3, 1, 8, device=triton), k.float(), scale=1)
    with pytest.raises(ValueError, match="pass a bool mask"):
        vk.received_attention(q.float(), k.float(), scale=1, key_mask=torch.ones(1, 9, device=triton))
    with pytest.raises(ValueError, match="block >= 1"):
        vk.received_attention(q.float(), k.float(), scale=1, block=0)
    assert not vk.attention_rows(q.float().requires_grad_(), k.float(), scale=1).requires_grad


def test_triton_serves_on_request_only_where_it_is_interpreted(device, monkeypatch):
    best = "reference" if _launch.INTERPRETED else "triton"
    assert vk.available(device)["attention_rows"][0] == best
    assert vk.get("attention_rows", device) is vk.backend._OPERATORS["attention_rows"][best].function
    monkeypatch.setenv("VTOK_KERNELS", "triton")
    assert vk.get("attention_rows", device).__module__ == "vtok_kernels.fused.attention"
    assert [_launch.next_power(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
