"""Compaction in Triton equals a gather of each tensor, bit for bit."""

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.backend import reference

pytestmark = pytest.mark.usefixtures("triton")


def tensors(n, device, batch=2):
    """What moves together when a sequence is shortened: states, a table for all samples, indices, a mask, planes."""
    torch.manual_seed(n)
    return [
        torch.randn(batch, n, 40).to(device, torch.bfloat16),
        torch.randn(1, n, 6, device=device),
        torch.randint(100, (3, batch, n), device=device).permute(1, 2, 0),
        torch.rand(batch, n, device=device) < 0.5,
        torch.randn(batch, 2, n, 3, device=device, dtype=torch.float64).transpose(1, 2),
        torch.randn(batch, n, 2, 3, 4, device=device).half().permute(0, 1, 4, 2, 3)[:, :, ::2],
    ]


def same(given, index):
    found, expected = vk.compact(given, index), reference("compact")(given, index)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    return found


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (20, 20), (130, 70)])
def test_every_tensor_moves(device, n, k):
    index = torch.stack([torch.randperm(n)[:k], torch.randint(n, (k,))]).to(device)
    same(tensors(n, device), index)
    same(tensors(n, device), torch.stack((index, index), 1)[:, 1])


def test_one_tensor_wider_than_a_program_and_of_another_length(device):
    x, y = torch.randn(2, 5, 4099, device=device), torch.randn(2, 9, device=device)
    same([x, y], torch.tensor([[4, 0], [3, 3]], device=device))
    assert torch.equal(vk.gather_tokens(y, torch.tensor([[8], [0]], device=device)), torch.stack((y[0, 8:], y[1, :1])))


def test_empty_spans_and_nothing_to_move(device):
    none = torch.zeros(2, 0, dtype=torch.long, device=device)
    assert [tuple(x.shape[:2]) for x in same(tensors(4, device), none)] == [(2, 0)] * 6
    assert same([torch.zeros(2, 3, 0, device=device)], torch.zeros(2, 2, dtype=torch.long, device=device))
    assert vk.compact([], none) == []


def test_into_a_static_cache(device):
    torch.manual_seed(0)
    keys, cache = torch.randn(2, 3, 9, 4, device=device), torch.full((2, 3, 16, 4), 7.0, device=device)
    index = torch.tensor([[0, 2, 5], [1, 3, 8]], device=device)
    place = cache[:, :, :3].transpose(1, 2)
    assert vk.compact([keys.transpose(1, 2)], index, out=[place])[0] is place
    assert torch.equal(cache[:, :, :3], keys.gather(2, index[:, None, :, None].expand(2, 3, 3, 4)))
    assert (cache[:, :, 3:] == 7).all()


def test_within_its_own_memory(device):
    x = torch.randn(2, 9, 4, device=device)
    index = torch.tensor([[1, 0, 5], [8, 0, 2]], device=device)
    expected = vk.gather_tokens(x, index).clone()
    vk.compact([x], index, out=[x[:, :3]])
    assert torch.equal(x[:, :3], expected)


def test_gradients_of_repeated_tokens_add_up(device):
    index = torch.tensor([[0, 3, 3], [2, 2, 2]], device=device)
    x = torch.randn(2, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(1, 4, dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.ones(2, 4, dtype=torch.bool, device=device)
    assert torch.autograd.gradcheck(lambda x, y: tuple(vk.compact([x, y, mask], index)[:2]), (x, y))
    assert torch.autograd.gradcheck(lambda x: vk.gather_tokens(x, index), (x,))
    assert not vk.compact([x, mask], index)[1].requires_grad


def test_runs_repeat_and_write_every_entry(device, monkeypatch):
    given, index = tensors(30, device), torch.randint(30, (2, 11), device=device)
    first, empty = vk.compact(given, index), torch.empty

    def poisoned(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(float("nan") if found.is_floating_point() else 1)

    monkeypatch.setattr(torch, "empty", poisoned)
    assert all(torch.equal(a, b) for a, b in zip(vk.compact(given, index), first, strict=True))


def test_errors_are_explained(device):
    x, index = torch.zeros(2, 3, device=device), torch.zeros(3, 1, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="do not fit"):
        vk.compact([x], index)
    with pytest.raises(ValueError, match="in the same dtypes"):
        vk.compact([x], index[:2], out=[torch.zeros(2, 2, device=device)])
