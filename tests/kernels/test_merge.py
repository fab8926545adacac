"""Merge plans conserve mass, compose, undo, and let gradients through."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok_kernels as vk
from vtok_kernels import MergePlan

few = settings(max_examples=30, deadline=None)


def random_plan(seed, n, n_out, drop=True, batch=2):
    """Every slot has a token; some are dropped."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        rest = torch.randint(-1 if drop else 0, n_out, (n - n_out,), generator=generator)
        dst = torch.cat([torch.arange(n_out), rest])
        rows.append(dst[torch.randperm(n, generator=generator)])
    return MergePlan(torch.stack(rows), n_out)


shapes = st.tuples(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 6)).map(lambda t: (t[0], t[1] + t[2], t[1]))


@few
@given(shapes, st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_operations_equal_loops_over_groups(shape, weighted, trailing):
    seed, n, n_out = shape
    plan = random_plan(seed, n, n_out)
    torch.manual_seed(seed)
    x = torch.randn(2, n, *trailing, dtype=torch.float64)
    weights = torch.rand(2, n, dtype=torch.float64) if weighted else None
    merged, summed, highest = plan.merge(x, weights), plan.sum(x), plan.amax(x)
    for b, groups in enumerate(plan.groups()):
        for slot, group in enumerate(groups):
            w = (weights[b, group] if weighted else torch.ones(len(group))).double()
            w = w.reshape(-1, *[1] * len(trailing))
            torch.testing.assert_close(merged[b, slot], (w * x[b, group]).sum(0) / w.sum())
            torch.testing.assert_close(summed[b, slot], x[b, group].sum(0))
            torch.testing.assert_close(highest[b, slot], x[b, group].amax(0))
            assert plan.counts()[b, slot] == len(group)


@few
@given(shapes)
def test_merge_conserves_mass_and_groups_partition(shape):
    seed, n, n_out = shape
    plan = random_plan(seed, n, n_out, drop=False)
    torch.manual_seed(seed)
    x, sizes = torch.randn(2, n, 4, dtype=torch.float64), torch.randint(1, 5, (2, n)).double()
    mass = (plan.merge(x, sizes) * plan.sum(sizes)[..., None]).sum(1)
    torch.testing.assert_close(mass, (x * sizes[..., None]).sum(1))
    torch.testing.assert_close(plan.merge(x, sizes), plan.merge(x, sizes[..., None]))
    assert all(sorted(t for group in groups for t in group) == list(range(n)) for groups in plan.groups())


@few
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_composition_equals_one_after_the_other(seed, last, middle, first):
    one = random_plan(seed, last + middle + first, last + middle)
    two = random_plan(seed + 1, last + middle, last)
    torch.manual_seed(seed)
    x, sizes = torch.randn(2, one.dst.shape[1], 3).double(), torch.rand(2, one.dst.shape[1]).double()
    both = one.then(two)
    torch.testing.assert_close(both.sum(x), two.sum(one.sum(x)))
    torch.testing.assert_close(both.amax(x), two.amax(one.amax(x)))
    torch.testing.assert_close(both.merge(x, sizes), two.merge(one.merge(x, sizes), one.sum(sizes)))
    y = torch.randn(2, last, 3)
    torch.testing.assert_close(both.unmerge(y), one.unmerge(two.unmerge(y)))


def test_composition_follows_representatives():
    one = vk.bipartite_match(vk.cosine_scores(torch.randn(2, 10, 4)), 3)
    two = vk.bipartite_match(vk.cosine_scores(torch.randn(2, 7, 4)), 2)
    both = one.then(two)
    assert both.representative is not None
    slots = both.dst.gather(1, both.representative)
    assert torch.equal(slots, torch.arange(5).expand(2, 5))
    assert one.then(MergePlan(two.dst, 5)).representative is None


def test_pruning_is_a_plan_that_drops():
    x, kept = torch.randn(2, 6, 3), torch.tensor([[0, 2, 5], [1, 3, 4]])
    plan = MergePlan.from_kept(kept, 6)
    torch.testing.assert_close(plan.merge(x), vk.gather_tokens(x, kept))
    torch.testing.assert_close(plan.unmerge(plan.merge(x)), x * vk.keep_mask(kept, 6)[..., None])
    assert plan.groups() == [[[0], [2], [5]], [[1], [3], [4]]]
    assert plan.counts().tolist() == [[1, 1, 1]] * 2
    assert torch.equal(plan.representative, kept)


def test_a_plan_may_drop_everything():
    x = torch.randn(2, 6, 3)
    plan = MergePlan.from_kept(torch.zeros(2, 0, dtype=torch.long), 6)
    assert plan.merge(x).shape == plan.sum(x).shape == plan.amax(x).shape == (2, 0, 3)
    assert (plan.unmerge(plan.merge(x)) == 0).all()
    assert (plan.then(MergePlan.identity(2, 0)).dst == -1).all()
    assert plan.groups() == [[], []]


def test_identity_changes_nothing():
    x = torch.randn(2, 5, 3)
    plan = MergePlan.identity(2, 5)
    assert torch.equal(plan.merge(x), x)
    assert torch.equal(plan.unmerge(x), x)
    assert plan.groups() == [[[i] for i in range(5)]] * 2


def test_slot_of_zero_weights_gets_the_plain_mean():
    plan = MergePlan(torch.tensor([[0, 0, 1, 1, 2]]), 3)
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0]])
    assert plan.merge(x, torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0]])).tolist() == [[2.0, 7.0, 9.0]]


def test_tiny_weights_neither_vanish_nor_overflow():
    plan = MergePlan(torch.tensor([[0, 0]]), 1)
    assert plan.merge(torch.tensor([[1.0, 3.0]]), torch.tensor([[1e-38, 3e-38]])).item() == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_fp32(dtype):
    # Summed one by one in half precision, 4096 ones would stop growing at 2048 (fp16) or 256 (bf16).
    plan = MergePlan(torch.zeros(1, 4096, dtype=torch.long), 1)
    ones = torch.ones(1, 4096, 2, dtype=dtype)
    assert plan.sum(ones).tolist() == [[[4096.0, 4096.0]]]
    assert plan.merge(ones, torch.ones(1, 4096)).tolist() == [[[1.0, 1.0]]]
    assert plan.merge(ones).dtype == dtype


def test_gradients_flow_to_members_and_weights_and_not_to_dropped_tokens():
    plan = MergePlan(torch.tensor([[0, 1, 0, -1, 1]]), 2)
    x = torch.randn(1, 5, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 5, dtype=torch.float64).add(0.1).requires_grad_()
    assert torch.autograd.gradcheck(plan.merge, (x, weights))
    assert torch.autograd.gradcheck(plan.sum, (x,))
    assert torch.autograd.gradcheck(plan.amax, (x,))
    assert torch.autograd.gradcheck(plan.unmerge, (torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True),))
    plan.merge(x, weights.detach()).sum().backward()
    assert (x.grad[0, 3] == 0).all()
    assert (x.grad[0, :3] != 0).all()


def test_several_tensors_pour_as_each_does_alone():
    torch.manual_seed(0)
    plan = random_plan(2, 7, 4)
    x, place, sizes, weights = torch.randn(2, 7, 3), torch.rand(2, 7, 2, 2), torch.rand(2, 7), torch.rand(2, 7)
    (a, b), (c,) = plan.pour([x, place], [sizes], [weights, None])
    assert torch.equal(a, plan.merge(x, weights))
    assert torch.equal(b, plan.merge(place))
    assert torch.equal(c, plan.sum(sizes))
    assert torch.equal(plan.pour([place], weights=weights)[0][0], plan.merge(place, weights))


def test_merge_attention_sums_columns_and_averages_rows():
    torch.manual_seed(0)
    plan = random_plan(3, 6, 4, drop=False)
    attn = torch.randn(2, 3, 6, 6, dtype=torch.float64).softmax(-1)
    weights = torch.rand(2, 6, dtype=torch.float64)
    fused = vk.merge_attention(plan, attn, weights)
    torch.testing.assert_close(fused.sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    for b, groups in enumerate(plan.groups()):
        for i, rows in enumerate(groups):
            for j, columns in enumerate(groups):
                w = weights[b, rows] / weights[b, rows].sum()
                expected = (attn[b][:, rows][:, :, columns].sum(-1) * w).sum(-1)
                torch.testing.assert_close(fused[b, :, i, j], expected)


@pytest.mark.parametrize("masked", [False, True])
def test_reused_attention_is_that_of_the_fused_map(masked):
    torch.manual_seed(1)
    plan = random_plan(2, 7, 4, drop=False)
    batch = plan.dst.shape[0]
    q, k = torch.randn(2, batch, 3, 7, 5, dtype=torch.float64)
    values = torch.randn(batch, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(batch, 7, dtype=torch.float64)
    bias = torch.randn(batch, 1, 1, 7, dtype=torch.float64) if masked else None
    logits = 0.3 * q @ k.transpose(-1, -2) + (0 if bias is None else bias)
    expected = vk.merge_attention(plan, logits.softmax(-1), weights) @ values
    found = vk.reuse_attention(plan, q, k, values, scale=0.3, weights=weights, bias=bias)
    torch.testing.assert_close(found, expected)
    (ours,), (theirs,) = (torch.autograd.grad(x.square().sum(), values) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p: MergePlan(torch.zeros(3).long(), 1), r"\(B, N\) is needed"),
        (lambda p: MergePlan(torch.zeros(1, 3), 1), "pass a long tensor"),
        (lambda p: MergePlan(p.dst, 2, torch.zeros(1, 3).long()), "representative has shape"),
        (lambda p: p.merge(torch.zeros(1, 4)), "does not fit a plan"),
        (lambda p: p.merge(torch.zeros(1, 3).long()), "use sum or amax"),
        (lambda p: p.merge(torch.zeros(1, 3), torch.zeros(3)), "weights has shape"),
        (lambda p: p.pour([torch.zeros(1, 3)], weights=[None, None]), "one for each"),
        (lambda p: p.unmerge(torch.zeros(1, 3)), "2 slots"),
        (lambda p: p.then(p), "first one's output"),
        (lambda p: vk.merge_attention(p, torch.zeros(1, 1, 2, 3)), "attn has shape"),
        (lambda p: vk.reuse_attention(p, *torch.zeros(2, 1, 1, 4, 2), torch.zeros(1, 1, 2, 2), scale=1.0), "plan has"),
        (lambda p: vk.reuse_attention(p, *torch.zeros(3, 1, 1, 3, 2), scale=1.0), "values has shape"),
    ],
)
def test_bad_arguments_are_explained(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(MergePlan(torch.tensor([[0, 1, 0]]), 2))
