"""Gather, scatter and left padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok_kernels as vk


@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_gather_and_scatter_are_inverse(trailing):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *trailing)
    index = torch.tensor([[0, 3, 5], [1, 2, 4]])
    gathered = vk.gather_tokens(x, index)
    assert torch.equal(gathered, torch.stack([x[b, index[b]] for b in range(2)]))
    kept = vk.keep_mask(index, 6).reshape(2, 6, *[1] * len(trailing))
    assert torch.equal(vk.scatter_tokens(gathered, index, 6), x * kept)


def test_several_tensors_move_as_each_does_alone():
    torch.manual_seed(0)
    x, table, mask = torch.randn(2, 6, 3), torch.randn(1, 6, 2), torch.rand(2, 6) < 0.5
    index = torch.tensor([[0, 3], [1, 5]])
    found = vk.compact([x, table, mask], index)
    assert torch.equal(found[0], vk.gather_tokens(x, index))
    assert torch.equal(found[1], table[0][index])
    assert torch.equal(found[2], mask.gather(1, index))
    cache = torch.zeros(2, 5, 3)
    place = cache[:, :2]
    assert vk.compact([x], index, out=[place])[0] is place
    assert torch.equal(cache[:, :2], found[0])
    vk.compact([x], index, out=[x[:, :2]])
    assert torch.equal(x[:, :2], found[0])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_left_compaction_round_trip(rows):
    keep = torch.tensor(rows)
    longest = int(keep.sum(1).max())
    index, mask = vk.left_compact(keep, longest)
    for b, row in enumerate(rows):
        kept = [i for i, k in enumerate(row) if k]
        padding = longest - len(kept)
        assert index[b, padding:].tolist() == kept
        assert mask[b].tolist() == [False] * padding + [True] * len(kept)
    x = torch.randn(len(rows), 6, 2)
    back = vk.scatter_tokens(vk.gather_tokens(x, index), index, 6, mask)
    assert torch.equal(back, x * keep[..., None])


def test_gradients_flow_through_gather_and_scatter():
    x = torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True)
    index, mask = torch.tensor([[0, 1, 3]]), torch.tensor([[False, True, True]])
    assert torch.autograd.gradcheck(lambda x: vk.gather_tokens(x, index), (x,))
    rows = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: vk.scatter_tokens(rows, index, 5, mask), (rows,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.long, torch.bool])
def test_every_dtype_moves(dtype):
    x = torch.ones(1, 4, 2).to(dtype)
    index = torch.tensor([[1, 2]])
    assert vk.scatter_tokens(vk.gather_tokens(x, index), index, 4).sum() == 4
    assert vk.gather_tokens(x, index).dtype == dtype


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vk.gather_tokens(torch.zeros(2, 3), torch.zeros(1, 3).long()), "do not fit"),
        (lambda: vk.scatter_tokens(torch.zeros(1, 2, 3), torch.zeros(1, 3).long(), 4), "do not fit"),
        (lambda: vk.compact([torch.zeros(2, 3)], torch.zeros(3, 3).long()), "do not fit"),
        (lambda: vk.compact([torch.zeros(1, 3)], torch.zeros(1, 2).long(), out=[torch.zeros(1, 3)]), "same dtypes"),
        (lambda: vk.left_compact(torch.zeros(1, 3), 2), "bool mask is needed"),
        (lambda: vk.left_compact(torch.zeros(1, 3).bool(), 4), "k must lie between"),
    ],
)
def test_bad_arguments_are_explained(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
