"""Bipartite matching equals its definition; VisionZip's strided targets too."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok_kernels as vk
from vtok_kernels import match

few = settings(max_examples=40, deadline=None)


def naive_limit(n, protected, two_way):
    a = [i for i in range(0, n, 2) if not protected[i]]
    b = [i for i in range(1, n, 2) if not protected[i]]
    for r in range(len(a + b) // 2, 0, -1):
        forward = r // 2 if two_way else r
        backward = r - forward
        if forward <= len(a) and backward <= len(b) and b and (backward == 0 or len(a) > forward):
            return r
    return 0


def naive_match(scores, r, protected, two_way):
    """ToMe's and MCTF's steps, with dictionaries. Returns the groups in the order of their representatives."""
    n = len(protected)
    a = [i for i in range(0, n, 2) if not protected[i]]
    b = [j for j in range(1, n, 2) if not protected[j]]
    r = min(r, naive_limit(n, protected, two_way))
    forward = r // 2 if two_way else r

    def value(i, j):
        return scores[i // 2][j // 2]

    def pour(givers, takers, count, score):
        best = {g: min(takers, key=lambda t: (-score(g, t), t)) for g in givers} if count else {}
        return {g: best[g] for g in sorted(best, key=lambda g: (-score(g, best[g]), g))[:count]}

    target = pour(a, b, forward, value)
    left = [i for i in a if i not in target]
    target.update(pour(b, left, r - forward, lambda j, i: value(i, j)))

    def root(token):
        return root(target[token]) if token in target else token

    groups = {t: [] for t in range(n) if t not in target}
    for t in range(n):
        groups[root(t)].append(t)
    return list(groups), list(groups.values())


@few
@given(st.data(), st.booleans(), st.booleans())
def test_matching_equals_its_definition(data, two_way, tied):
    n, r, seed = data.draw(st.integers(1, 11)), data.draw(st.integers(0, 8)), data.draw(st.integers(0, 10**6))
    torch.manual_seed(seed)
    scores = torch.randn(2, (n + 1) // 2, n // 2)
    if tied:
        scores = scores.round()
    protected = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n))) & (torch.rand(n) < 0.6)
    plan = vk.bipartite_match(scores, r, protected=protected, two_way=two_way)
    assert vk.merge_limit(n, protected, two_way=two_way) == naive_limit(n, protected.tolist(), two_way)
    for b, groups in enumerate(plan.groups()):
        roots, expected = naive_match(scores[b].tolist(), r, protected.tolist(), two_way)
        assert groups == expected
        assert plan.representative[b].tolist() == roots
        assert all([t] in groups for t in range(n) if protected[t])
    assert plan.n_out == n - min(r, naive_limit(n, protected.tolist(), two_way))


@pytest.mark.parametrize("two_way", [False, True])
def test_protection_by_sample_takes_the_tightest_limit(two_way):
    torch.manual_seed(0)
    scores = vk.cosine_scores(torch.randn(2, 8, 4))
    protected = torch.zeros(2, 8, dtype=torch.bool)
    protected[1, :6] = True
    plan = vk.bipartite_match(scores, 4, protected=protected, two_way=two_way)
    assert plan.n_out == 7
    alone = vk.bipartite_match(scores[1:], 4, protected=protected[1:], two_way=two_way)
    assert plan.groups()[1] == alone.groups()[0]


def test_no_destination_means_no_merge():
    scores = torch.randn(1, 3, 2)
    assert vk.bipartite_match(scores, 2, protected=torch.tensor([0, 1, 0, 1, 0]).bool()).n_out == 5
    assert vk.bipartite_match(scores, 2, protected=torch.tensor([1, 0, 1, 0, 1]).bool(), two_way=True).n_out == 5
    assert vk.bipartite_match(torch.randn(1, 1, 0), 2).groups() == [[[0]]]


def test_cosine_scores_are_cosines_of_alternate_tokens():
    x = torch.randn(2, 7, 5)
    expected = torch.cosine_similarity(x[:, ::2, None], x[:, None, 1::2], dim=-1)
    torch.testing.assert_close(vk.cosine_scores(x), expected)
    assert vk.cosine_scores(x.half()).dtype == torch.float32


def test_mctf_scores_are_the_logarithm_of_the_product():
    torch.manual_seed(0)
    x, a, s = torch.randn(2, 7, 5), torch.randn(2, 7).softmax(-1), torch.randint(1, 4, (2, 7)).float()
    u = (1 / a) / (1 / a).amax(1, keepdim=True)
    z = (1 / s) / (1 / s).amax(1, keepdim=True)
    similarity = (torch.cosine_similarity(x[:, ::2, None], x[:, None, 1::2], dim=-1) + 1) / 2
    information = u[:, ::2, None] * u[:, None, 1::2]
    size = z[:, ::2, None] * z[:, None, 1::2]
    expected = similarity ** (1 / 2) * information ** (1 / 20) * size ** (1 / 40)
    torch.testing.assert_close(vk.mctf_scores(x, a, s, (2, 20, 40)).exp(), expected)
    torch.testing.assert_close(vk.mctf_scores(x, a, s[..., None], (2, 20, 40)).exp(), expected)


def test_mctf_scores_stay_finite_where_attention_is_masked_and_tokens_are_opposite():
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    received = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    for dtype in (torch.float32, torch.float16):
        scores = vk.mctf_scores(x.to(dtype), received.to(dtype), torch.ones(1, 4))
        assert torch.isfinite(scores).all()
        assert scores.dtype == torch.float32


@pytest.mark.parametrize("two_way", [False, True])
def test_matching_tokens_is_matching_by_their_scores(two_way):
    torch.manual_seed(0)
    x, a, s = torch.randn(2, 11, 5), torch.rand(2, 11), torch.randint(1, 4, (2, 11)).float()
    protected, tau = torch.arange(11) < 2, (2, 20, 40)
    found = [
        vk.match_tokens(x, 3, protected=2, two_way=two_way),
        vk.match_tokens(x, 3, protected=2, two_way=two_way, bias=vk.mctf_bias(a, s, tau), temperature=tau[0]),
        vk.match_tokens(x, 3, two_way=two_way),
    ]
    expected = [
        vk.bipartite_match(vk.cosine_scores(x), 3, protected=protected, two_way=two_way),
        vk.bipartite_match(vk.mctf_scores(x, a, s, tau), 3, protected=protected, two_way=two_way),
        vk.bipartite_match(vk.cosine_scores(x), 3, two_way=two_way),
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.dst, other.dst)
        assert torch.equal(one.representative, other.representative)
    assert vk.match_tokens(x, 0).n_out == 11


@pytest.mark.parametrize("n", [12, 13])
@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("protected", [None, 1, torch.arange(13) % 5 == 0])
@pytest.mark.parametrize("criteria", [False, True])
def test_blocks_of_rows_match_as_the_whole_does(n, two_way, protected, criteria, monkeypatch):
    x = torch.randn(3, n, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x[:, 4] = x[:, 2]  # of equal sources and destinations the first
    x[:, 7] = x[:, 3]
    more = {"bias": vk.mctf_bias(x[..., 0].abs(), x[..., 1].abs()), "temperature": 2.0} if criteria else {}
    fixed = protected[:n] if isinstance(protected, torch.Tensor) else protected
    whole = vk.match_tokens(x, 4, protected=fixed, two_way=two_way, **more)
    monkeypatch.setattr(match, "_LARGEST_SCORES", 13)
    blocks = vk.match_tokens(x, 4, protected=fixed, two_way=two_way, **more)
    assert torch.equal(blocks.dst, whole.dst) and blocks.n_out == whole.n_out
    assert torch.equal(blocks.representative, whole.representative)


@pytest.mark.parametrize("two_way", [False, True])
def test_a_number_protects_the_first_places(two_way):
    for n in range(1, 9):
        for first in range(n + 2):
            limit = vk.merge_limit(n, torch.arange(n) < first, two_way=two_way)
            assert vk.merge_limit(n, first, two_way=two_way) == limit


@pytest.mark.parametrize("two_way", [False, True])
def test_matching_leaves_the_scores_alone(two_way):
    scores = torch.randn(1, 4, 4)
    before = scores.clone()
    vk.bipartite_match(scores, 3, protected=2, two_way=two_way)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(("m", "c"), [(11, 3), (12, 4), (5, 5), (3, 7), (9, 1), (10, 6)])
def test_strided_merge_joins_the_most_similar_target(m, c):
    torch.manual_seed(0)
    metric = torch.randn(2, m, 6)
    targets, assignment = vk.strided_merge(metric, c)
    expected = list(range(0, m, max(1, m // c)))[:c]
    assert targets.tolist() == expected
    for b in range(2):
        for t in range(m):
            similarity = torch.cosine_similarity(metric[b, t], metric[b, expected], dim=-1)
            assert assignment[b, t] == (expected.index(t) if t in expected else int(similarity.argmax()))
    assert (vk.MergePlan(assignment, len(targets)).counts().sum(1) == m).all()


def test_a_target_with_an_earlier_double_still_joins_itself():
    _, assignment = vk.strided_merge(torch.ones(1, 6, 3), 3)
    assert assignment.tolist() == [[0, 0, 1, 0, 2, 0]]


def test_matching_takes_no_gradient():
    x = torch.randn(1, 6, 3, requires_grad=True)
    assert not vk.cosine_scores(x).requires_grad
    assert not vk.mctf_scores(x, torch.ones(1, 6), torch.ones(1, 6)).requires_grad
    vk.bipartite_match(vk.cosine_scores(x), 2).merge(x).sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vk.bipartite_match(torch.zeros(1, 2, 3), 1), "use cosine_scores"),
        (lambda: vk.bipartite_match(torch.zeros(2, 3), 1), "is needed"),
        (lambda: vk.bipartite_match(torch.zeros(1, 2, 2), -1), "pass r >= 0"),
        (lambda: vk.bipartite_match(torch.zeros(1, 2, 2), 1, protected=torch.zeros(3).bool()), "protected has shape"),
        (lambda: vk.bipartite_match(torch.zeros(1, 2, 2), 1, protected=torch.zeros(4)), "bool mask is needed"),
        (lambda: vk.mctf_scores(torch.ones(1, 4, 2), torch.ones(1, 3), torch.ones(1, 4)), "attention_received"),
        (lambda: vk.mctf_scores(torch.ones(1, 4, 2), torch.ones(1, 4), torch.ones(1, 4), (0, 1, 1)), "positive"),
        (lambda: vk.match_tokens(torch.zeros(4, 2), 1), "is needed"),
        (lambda: vk.match_tokens(torch.zeros(1, 4, 2), -1), "pass r >= 0"),
        (lambda: vk.match_tokens(torch.zeros(1, 4, 2), 1, protected=-1), "how many of the first places"),
        (lambda: vk.match_tokens(torch.zeros(1, 4, 2), 1, bias=torch.zeros(1, 3)), "bias has shape"),
        (lambda: vk.match_tokens(torch.zeros(1, 4, 2), 1, temperature=0.0), "positive"),
        (lambda: vk.mctf_bias(torch.zeros(1, 4), torch.zeros(1, 3)), "sizes has shape"),
        (lambda: vk.strided_merge(torch.ones(1, 4, 2), 0), "skip the merge"),
        (lambda: vk.cosine_scores(torch.ones(4, 2)), "is needed"),
    ],
)
def test_bad_arguments_are_explained(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
