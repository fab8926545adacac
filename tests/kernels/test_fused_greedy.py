"""Greedy selection in Triton equals the reference in float64, where no rounding decides."""

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.backend import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def features(n, d=24, batch=2, seed=0, dtype=torch.float32):
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positive(batch, n, seed=1):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed)) + 0.2


def by_distance(x, k, **options):
    return vk.farthest_first(x, k, **options)


def from_first(x, k, **options):
    first = torch.tensor([x.shape[1] - 1, 0], device=x.device)[: x.shape[0]]
    return vk.farthest_first(x, k, first=first, **options)


def weighted(x, k, **options):
    return vk.farthest_first(x, k, weights=positive(*x.shape[:2]).to(x.device), **options)


def by_sum(x, k, **options):
    return vk.max_sum(x, k, torch.full((x.shape[0],), x.shape[1] // 2, device=x.device), **options)


def by_maximum(x, k, **options):
    return by_sum(x, k, objective="min", **options)


def by_determinant(x, k, **options):
    return vk.dpp_map(x, k, **options)


def relevant(x, k, **options):
    return vk.dpp_map(x, k, positive(*x.shape[:2]).to(x.device), **options)


SELECTORS = [by_distance, from_first, weighted, by_sum, by_maximum, by_determinant, relevant]
selectors = pytest.mark.parametrize("select", SELECTORS, ids=lambda s: s.__name__)


def expected(select, x, k, **options):
    """What the reference picks from the same numbers in float64."""
    with vk.use("reference"):
        return select(x.cpu().double(), k, **options)


@selectors
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_float64(select, dtype, triton):
    # 37 tokens: three programs of a DPP, two tiles of products, both with a ragged end.
    x = features(37, dtype=dtype).to(triton)
    for sort in (True, False):
        assert select(x, 6, sort=sort).tolist() == expected(select, x, 6, sort=sort).tolist()


@selectors
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (17, 17), (16, 3), (33, 1)])
def test_odd_sizes(select, n, k, triton):
    x = features(n, d=n + 3)  # full rank: no DPP pick is rounding noise
    assert select(x.to(triton), k, sort=False).tolist() == expected(select, x, k, sort=False).tolist()


@selectors
def test_strides_are_followed(select, triton):
    x = features(19, d=20).to(triton)
    wide = torch.full((2, 40, 60), float("nan"), device=triton)
    wide[:, 1:39:2, ::3] = x
    for view in (wide[:, 1:39:2, ::3], x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
        assert torch.equal(select(view, 3), select(x, 3))


def test_strides_of_weights_are_followed(triton):
    x, w = features(19).to(triton), positive(2, 19).to(triton)
    spread = torch.full((19, 5), float("nan"), device=triton)
    spread[:, 1::2] = w.T
    view = spread[:, 1::2].T
    assert torch.equal(vk.farthest_first(x, 5, weights=view), vk.farthest_first(x, 5, weights=w))
    assert torch.equal(vk.dpp_map(x, 5, view), vk.dpp_map(x, 5, w))
    first = torch.tensor([[3, -9], [7, -9]], device=triton)[:, 0]
    assert torch.equal(vk.max_sum(x, 5, first), vk.max_sum(x, 5, first.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", [by_distance, by_sum, by_maximum, by_determinant], ids=lambda s: s.__name__)
def test_ties_go_to_the_lower_index(select, dtype, triton):
    axes = torch.tensor([[1.0, 0, 0], [0, 2, 0], [-4, 0, 0], [0, 2, 0], [0, 0, 1], [2, 0, 0]]).repeat(3, 1)
    x = axes.expand(2, -1, -1).to(triton, dtype)  # every cosine is -1, 0 or 1
    assert select(x, 12, sort=False).tolist() == expected(select, x, 12, sort=False).tolist()
    equal = features(1, 40, dtype=dtype)
    if triton == "cpu":
        # The interpreter multiplies by numpy, which on some processors (OpenBLAS for AVX2) sums the last columns of a
        # tile in another order than the first: only whole numbers are exact in both.
        equal = (4 * equal).round()
    equal = equal.expand(2, 21, 40).to(triton)
    assert select(equal, 4).tolist() == [[0, 1, 2, 10] if select in (by_sum, by_maximum) else [0, 1, 2, 3]] * 2


@selectors
def test_zero_rows_alone_and_in_a_batch_and_again(select, triton):
    x = features(21).to(triton)
    x[0, 5] = x[1, 0] = 0
    picks = select(x, 5, sort=False)
    assert picks.tolist() == expected(select, x, 5, sort=False).tolist()
    assert torch.equal(picks, select(x, 5, sort=False))
    if select in (by_distance, by_determinant, by_sum, by_maximum):
        assert torch.equal(picks, torch.cat([select(item[None], 5, sort=False) for item in x]))


@selectors
def test_nothing_is_read_before_it_is_written(select, triton, monkeypatch):
    x = features(21).to(triton)
    plain, empty = select(x, 4), torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else -(10**9))

    monkeypatch.setattr(torch, "empty", poisoned)
    assert torch.equal(select(x, 4), plain)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@selectors
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_features_give_distinct_places(select, value, triton):
    x = features(13).to(triton)
    x[:, 4] = value
    picks = select(x, 6)
    assert all(len(set(row)) == 6 and set(row) <= set(range(13)) for row in picks.tolist())


def test_beyond_the_rank_picks_stay_distinct(triton):
    assert all(len(set(row)) == 12 for row in vk.dpp_map(features(18, d=3).to(triton), 12).tolist())


@pytest.mark.parametrize("name", ["farthest_first", "max_sum", "dpp_map"])
def test_what_the_kernels_leave_goes_to_the_reference(name, triton):
    pivot = (torch.zeros(2, dtype=torch.long, device=triton),) if name == "max_sum" else ()
    call = getattr(vk, name)
    x = features(7).to(triton)
    double = x.double()
    assert torch.equal(call(double, 3, *pivot), reference(name)(double, 3, *pivot))
    assert call(x, 0, *pivot).shape == (2, 0)
    assert call(x[:0], 3, *(p[:0] for p in pivot)).shape == (0, 3)
    with pytest.raises(ValueError, match="k must lie between 0 and 7"):
        call(x, 8, *pivot)
    with pytest.raises(ValueError, match=r"\(B, N, D\) is needed"):
        call(x[0], 3, *pivot)
    with pytest.raises(ValueError, match="has shape"):
        vk.max_sum(x, 3, torch.zeros(3, dtype=torch.long, device=triton))
