"""Greedy selectors equal brute force written from their definitions."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vtok_kernels as vk

few = settings(max_examples=25, deadline=None)


def cosine(a, b):
    dot, la, lb = (sum(x * y for x, y in zip(p, q, strict=True)) for p, q in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(la * lb) if la and lb else 0.0


def best(candidates, value):
    """The candidate of highest value; the lowest of equals."""
    return min(candidates, key=lambda i: (-value(i), i))


def naive_farthest_first(x, k, weights=None, first=None):
    n = len(x)
    w = weights or [1.0] * n
    if first is None:
        first = best(range(n), lambda i: w[i] * min((1 - cosine(x[i], x[j]) for j in range(n) if j != i), default=0))
    picks = [first]
    while len(picks) < k:
        rest = [i for i in range(n) if i not in picks]
        picks.append(best(rest, lambda i: w[i] * min(1 - cosine(x[i], x[j]) for j in picks)))
    return picks


def naive_max_sum(x, k, pivot, objective):
    reduce = sum if objective == "sum" else max
    picks = [pivot]
    while len(picks) < k:
        rest = [i for i in range(len(x)) if i not in picks]
        picks.append(best(rest, lambda i: -reduce([cosine(x[i], x[j]) for j in picks])))
    return picks


def determinant(x, r, subset):
    rows = [[r[i] * r[j] * cosine(x[i], x[j]) for j in subset] for i in subset]
    return torch.tensor(rows, dtype=torch.float64).det().item() if subset else 1.0


def naive_dpp(x, k, r):
    picks = []
    while len(picks) < k:
        rest = [i for i in range(len(x)) if i not in picks]
        # Nine digits, so that the diagonal's rounding does not decide between equals.
        picks.append(best(rest, lambda i: float(f"{determinant(x, r, [*picks, i]):.9g}")))
    return picks


def features(seed, n, d=5, batch=2):
    """Continuous: no ties. float64, so that rounding does not decide."""
    return torch.randn(batch, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Signed axes at power-of-two lengths: every cosine is exactly -1, 0 or 1, and every row has duplicates and ties.
axis = st.tuples(st.integers(0, 2), st.sampled_from([-2.0, -1.0, 1.0, 4.0])).map(
    lambda a: [a[1] if i == a[0] else 0.0 for i in range(3)]
)
seeds, sizes = st.integers(0, 10**6), st.integers(2, 9)


@few
@example(seed=1040, n=6, weighted=False, with_first=False)  # the first pick is one of two that are farthest from others
@given(seeds, sizes, st.booleans(), st.booleans())
def test_farthest_first_equals_brute_force(seed, n, weighted, with_first):
    x = features(seed, n)
    weights = features(seed + 1, n, 1).abs().squeeze(-1) if weighted else None
    first = torch.tensor([n - 1, 0]) if with_first else None
    k = 1 + seed % n
    found = vk.farthest_first(x, k, weights=weights, first=first, sort=False).tolist()
    for b in range(2):
        w = weights[b].tolist() if weighted else None
        assert found[b] == naive_farthest_first(x[b].tolist(), k, w, first[b].item() if with_first else None)


@few
@given(seeds, sizes, st.sampled_from(["sum", "min"]))
def test_max_sum_equals_brute_force(seed, n, objective):
    x, k, pivot = features(seed, n), 1 + seed % n, torch.tensor([seed % n, n - 1])
    found = vk.max_sum(x, k, pivot, objective=objective, sort=False).tolist()
    assert found == [naive_max_sum(x[b].tolist(), k, pivot[b].item(), objective) for b in range(2)]


@few
@given(seeds, sizes, st.booleans())
def test_dpp_map_equals_brute_force(seed, n, relevant):
    # As wide as long, so that K has full rank and each step is decided by a determinant, not by rounding.
    x, k = features(seed, n, d=n + 2), 1 + seed % n
    r = features(seed + 1, n, 1).abs().squeeze(-1) + 0.1 if relevant else None
    found = vk.dpp_map(x, k, r, sort=False).tolist()
    assert found == [naive_dpp(x[b].tolist(), k, r[b].tolist() if relevant else [1.0] * n) for b in range(2)]


@few
@given(st.lists(axis, min_size=2, max_size=8), st.data())
def test_ties_go_to_the_lower_index(rows, data):
    n = len(rows)
    k, pivot = data.draw(st.integers(1, n)), data.draw(st.integers(0, n - 1))
    x = torch.tensor([rows])
    assert vk.farthest_first(x, k, sort=False)[0].tolist() == naive_farthest_first(rows, k)
    for objective in ("sum", "min"):
        found = vk.max_sum(x, k, torch.tensor([pivot]), objective=objective, sort=False)
        assert found[0].tolist() == naive_max_sum(rows, k, pivot, objective)
    r = [data.draw(st.sampled_from([1.0, 2.0])) for _ in rows]
    assert vk.dpp_map(x, k, torch.tensor([r]), sort=False)[0].tolist() == naive_dpp(rows, k, r)


def k_center(x, k):
    return vk.max_sum(x, k, torch.zeros(2, dtype=torch.long), objective="min")


@pytest.mark.parametrize("select", [vk.farthest_first, vk.dpp_map, k_center])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_rows_duplicates_and_everything(select, dtype):
    torch.manual_seed(0)
    equal = torch.randn(1, 1, 96).expand(2, 13, 96).to(dtype)
    assert select(equal, 4).tolist() == [[0, 1, 2, 3]] * 2
    x = torch.randn(2, 6, 16).to(dtype)
    assert select(x, 6).tolist() == [list(range(6))] * 2
    doubled = torch.cat([x, x], 1)
    picked = select(doubled, 6)
    assert (picked % 6).sort(1).values.tolist() == [list(range(6))] * 2
    assert select(doubled, 12).tolist() == [list(range(12))] * 2
    assert select(x, 0).shape == (2, 0)


def test_zero_rows_and_batch_independence():
    x = features(0, 8).float()
    x[:, 3] = 0
    for select in (vk.farthest_first, vk.dpp_map):
        together = select(x, 4, sort=False)
        assert torch.equal(together, torch.cat([select(x[:1], 4, sort=False), select(x[1:], 4, sort=False)]))
        assert len(set(select(x, 8)[0].tolist())) == 8
    assert 3 not in vk.dpp_map(x, 5)[0]


def test_nearest_other_token_is_found_across_blocks():
    from vtok_kernels.greedy import _nearest_other

    x = torch.nn.functional.normalize(features(1, 11), dim=-1)
    distance = 1 - x @ x.transpose(1, 2)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    torch.testing.assert_close(_nearest_other(x, block=4), distance.amin(-1))


def test_dpp_increments_are_determinant_ratios():
    """The product of the picked residuals is det(K_S): each pick's gain is a ratio of determinants."""
    n = 7
    x, r = features(5, n, d=9, batch=1), features(6, n, 1, batch=1).abs().squeeze(-1) + 0.2
    order = vk.dpp_map(x, n, r, sort=False)[0].tolist()
    rows, relevance = x[0].tolist(), r[0].tolist()
    determinants = [determinant(rows, relevance, order[:k]) for k in range(n + 1)]
    gains = [b / a for a, b in itertools.pairwise(determinants)]
    for step, gain in enumerate(gains):
        others = [determinant(rows, relevance, [*order[:step], i]) / determinants[step] for i in order[step:]]
        assert gain == pytest.approx(max(others))
    assert gains == sorted(gains, reverse=True)
    torch.testing.assert_close(vk.dpp_map(x, 4, r), vk.dpp_map(x, 4, 1000 * r))


def test_beyond_the_rank_picks_stay_distinct():
    x = features(2, 40, d=3).float()
    picks = vk.dpp_map(x, 30, sort=False)
    assert all(len(set(row)) == 30 for row in picks.tolist())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: vk.farthest_first(x, 9), "k must lie between"),
        (lambda x: vk.farthest_first(x[0], 1), r"\(B, N, D\) is needed"),
        (lambda x: vk.farthest_first(x, 1, weights=torch.ones(3)), "weights has shape"),
        (lambda x: vk.farthest_first(x, 1, first=torch.zeros(3).long()), "first has shape"),
        (lambda x: vk.max_sum(x, 1, torch.zeros(2).long(), objective="max"), "choose 'sum'"),
        (lambda x: vk.max_sum(x, 1, torch.zeros(3).long()), "pivot has shape"),
        (lambda x: vk.dpp_map(x, 1, torch.ones(3)), "relevance has shape"),
    ],
)
def test_bad_arguments_are_explained(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(features(0, 5))
