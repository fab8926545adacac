"""Selection by score, by spread and at random."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok_kernels as vk

few = settings(max_examples=40, deadline=None)


@few
@given(st.data())
def test_topk_takes_the_highest_and_the_lower_index_of_equals(data):
    n = data.draw(st.integers(1, 8))
    k = data.draw(st.integers(0, n))
    # Few distinct values, both zeros among them: nearly every draw has ties.
    row = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5]), min_size=n, max_size=n)
    scores = [data.draw(row), data.draw(row)]
    expected = [sorted(sorted(range(n), key=lambda i, s=s: (-s[i], i))[:k]) for s in scores]
    for dtype in (torch.float32, torch.float16):
        assert vk.topk(torch.tensor(scores, dtype=dtype), k).tolist() == expected


def test_topk_of_everything_of_integers_and_of_a_large_constant():
    assert vk.topk(torch.randn(2, 5), 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert vk.topk(torch.tensor([[2**40, 2**40 + 1, 0]]), 1).tolist() == [[1]]
    assert vk.topk(torch.zeros(1, 5000), 300)[0].tolist() == list(range(300))


@few
@given(st.data())
def test_keep_mask_marks_the_indices(data):
    n = data.draw(st.integers(1, 9))
    k = data.draw(st.integers(0, n))
    torch.manual_seed(n * 10 + k)
    indices = torch.stack([torch.randperm(n)[:k].sort().values for _ in range(2)])
    mask = vk.keep_mask(indices, n)
    assert mask.dtype == torch.bool
    assert mask.shape == (2, n)
    assert [row.nonzero()[:, 0].tolist() for row in mask] == indices.tolist()


@pytest.mark.parametrize("n", range(0, 25))
def test_uniform_is_increasing_symmetric_and_even(n):
    for k in range(n + 1):
        indices = vk.uniform(n, k).tolist()
        assert len(indices) == k
        assert all(0 <= i < n for i in indices)
        gaps = [b - a for a, b in itertools.pairwise(indices)]
        assert all(g > 0 for g in gaps)
        centred = [i for i in indices if i != (n - 1) // 2] if k % 2 else indices
        assert centred == [n - 1 - i for i in reversed(centred)]
        if k:
            assert max(gaps, default=0) <= n / k + 1


@pytest.mark.parametrize(("h", "w"), [(1, 7), (4, 4), (3, 8), (6, 5), (9, 2)])
def test_uniform_grid_has_the_smallest_widest_step(h, w):
    for k in range(h * w + 1):
        cells = vk.uniform_grid(h, w, k).tolist()
        assert len(cells) == k
        assert cells == sorted(set(cells))
        assert all(0 <= c < h * w for c in cells)
    for k in range(1, h * w + 1):
        from vtok_kernels.select import _sub_grid

        rows, cols = _sub_grid(h, w, k)
        shapes = [(r, c) for r in range(1, h + 1) for c in range(1, w + 1) if r * c <= k]
        assert (rows, cols) in shapes
        assert max(h / rows, w / cols) <= min(max(h / r, w / c) for r, c in shapes) + 1e-9


def test_uniform_grid_of_a_clip_tower():
    cells = vk.uniform_grid(24, 24, 64)
    rows = vk.uniform(24, 8)
    assert torch.equal(cells, (rows[:, None] * 24 + rows).flatten())


def test_random_is_a_seeded_subset():
    first = vk.random(50, 10, torch.Generator().manual_seed(3))
    assert torch.equal(first, vk.random(50, 10, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, vk.random(50, 10, torch.Generator().manual_seed(4)))
    assert first.tolist() == sorted(set(first.tolist()))
    assert vk.random(5, 5, torch.Generator()).tolist() == list(range(5))


@pytest.mark.parametrize(
    "call",
    [
        lambda: vk.topk(torch.zeros(1, 3), 4),
        lambda: vk.topk(torch.zeros(1, 3), -1),
        lambda: vk.uniform(3, 4),
        lambda: vk.uniform_grid(2, 2, 5),
        lambda: vk.random(3, 4, torch.Generator()),
    ],
)
def test_a_count_out_of_range_is_explained(call):
    with pytest.raises(ValueError, match="k must lie between 0 and"):
        call()


def test_scores_of_another_rank_are_explained():
    with pytest.raises(ValueError, match=r"\(B, N\) is needed"):
        vk.topk(torch.zeros(3), 1)
