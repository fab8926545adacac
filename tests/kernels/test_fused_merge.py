"""Merging in Triton equals the reference in float64, gradients included."""

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.backend import reference

pytestmark = pytest.mark.usefixtures("triton")

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def slots(n, n_out, device, batch=2, seed=0):
    """Slots with many tokens, with none, and dropped tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, n_out, (batch, n), generator=generator).to(device)


def close(found, exact):
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), exact.double(), atol=4 * tolerance, rtol=4 * tolerance)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("n", "n_out", "d"), [(1, 1, 1), (5, 8, 3), (40, 7, 33), (150, 90, 5)])
def test_several_tensors_equal_the_reference_in_float64(device, dtype, n, n_out, d):
    torch.manual_seed(n)
    dst = slots(n, n_out, device)
    x, place, sizes = torch.randn(2, n, d), torch.rand(2, n, 2, 2), torch.randint(1, 5, (2, n))
    weights = torch.rand(2, n)
    means = [x.to(device, dtype), place.to(device), x.to(device, dtype)]
    sums = [sizes.to(device), x.to(device, dtype)]
    each = [weights.to(device, dtype), weights.to(device)[..., None], None]
    found = vk.merge_tokens(dst, n_out, means, sums, each)
    exact = reference("merge_tokens")(
        dst,
        n_out,
        [m.double() for m in means],
        [sums[0], sums[1].double()],
        [None if w is None else w.double() for w in each],
    )
    for a, b in zip(found[0] + found[1][1:], exact[0] + exact[1][1:], strict=True):
        close(a, b)
    assert torch.equal(found[1][0], exact[1][0])
    assert found[1][0].dtype == torch.long


def test_rows_wider_than_a_program(device):
    x, dst = torch.randn(1, 4, 4100, device=device), torch.tensor([[0, 1, 0, -1]], device=device)
    close(vk.merge_mean(x, dst, 2), reference("merge_mean")(x.double(), dst, 2))


def test_slots_of_no_weight_get_the_plain_mean_and_tiny_weights_count(device):
    dst = torch.tensor([[0, 0, 1, 1, 2, -1]], device=device)
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0, 11.0]], device=device)
    weights = torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0, 1.0]], device=device)
    assert vk.merge_mean(x, dst, 3, weights).tolist() == [[2.0, 7.0, 9.0]]
    tiny = torch.tensor([[1e-38, 3e-38, 0.0, 1e38, 1.0, 1.0]], device=device)
    assert vk.merge_mean(x, dst, 3, tiny).tolist() == [[pytest.approx(2.5), 7.0, 9.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_fp32(device, dtype):
    # One by one in half precision, halves added to 1792 are lost. All results are exact: the interpreter truncates.
    dst = torch.zeros(1, 513, dtype=torch.long, device=device)
    x = torch.full((1, 513, 2), 0.5, dtype=dtype, device=device)
    x[0, 0] = 1792
    assert vk.merge_sum(x, dst, 1).tolist() == [[[2048.0, 2048.0]]]
    assert vk.merge_mean(x[:, 1:], dst[:, 1:], 1, torch.ones(1, 512, device=device)).tolist() == [[[0.5, 0.5]]]


def test_strides_do_not_matter(device):
    torch.manual_seed(0)
    dst = slots(24, 5, device, batch=4)[::2]
    base = torch.randn(3, 2, 5, 48, device=device)
    x, y = base[:, :, 1, ::2].permute(1, 2, 0), base[:2, 1, :4, ::2].transpose(1, 2)
    z = torch.randn(2, 24, 2, 3, 4, device=device).permute(0, 1, 4, 2, 3)[:, :, ::2]
    weights = torch.rand(24, 2, device=device).t()
    (a, b), (c,) = vk.merge_tokens(dst, 5, [x, z], [y], weights)
    close(a, reference("merge_mean")(x.double(), dst, 5, weights.double()))
    close(b, reference("merge_mean")(z.double(), dst, 5, weights.double()))
    close(c, reference("merge_sum")(y.double(), dst, 5))


@pytest.mark.parametrize("d", [(), (2, 2)])
def test_gradients(device, d):
    torch.manual_seed(0)
    dst = slots(6, 4, device)
    x, y = (torch.randn(2, 6, *d, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    w = torch.rand(2, 6, dtype=torch.float64, device=device).add(0.1).requires_grad_()
    v = torch.rand(2, 6, 1, dtype=torch.float64, device=device).add(0.1)

    def everything(x, y, w):
        means, sums = vk.merge_tokens(dst, 4, [x, y, y], [x], [w, v, None])
        return *means, *sums

    assert torch.autograd.gradcheck(everything, (x, y, w), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, w: vk.merge_mean(x, dst, 4, w), (x, w), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: vk.merge_sum(x, dst, 4), (x,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_training_precision(device, dtype):
    torch.manual_seed(0)
    dst = slots(30, 9, device)
    x, w = torch.randn(2, 30, 20).to(device, dtype), torch.rand(2, 30).to(device, dtype)
    w[0, dst[0].cpu() == dst[0].max().cpu()] = 0
    found, exact = ([t.clone().to(kind).requires_grad_() for t in (x, w)] for kind in (dtype, torch.float64))
    weight = torch.randn(2, 9, 20, device=device, dtype=dtype)
    (vk.merge_mean(found[0], dst, 9, found[1]) * weight).sum().backward()
    (reference("merge_mean")(exact[0], dst, 9, exact[1]) * weight.double()).sum().backward()
    close(found[0].grad, exact[0].grad)
    torch.testing.assert_close(
        found[1].grad.double(), exact[1].grad, atol=0.05 if dtype == torch.bfloat16 else 1e-4, rtol=0.02
    )
    assert (found[0].grad[dst < 0] == 0).all()


def test_runs_repeat_and_write_every_entry(device, monkeypatch):
    torch.manual_seed(0)
    dst = slots(50, 12, device)
    x = torch.randn(2, 50, 9, device=device, requires_grad=True)
    w = torch.rand(2, 50, device=device, requires_grad=True)
    empty = torch.empty

    def run():
        (mean,), (total,) = vk.merge_tokens(dst, 12, [x], [x], w)
        gradients = torch.autograd.grad((mean * mean).sum() + (total * total).sum(), (x, w))
        return mean, total, *gradients

    def poisoned(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(float("nan") if found.is_floating_point() else 7)

    first = run()
    monkeypatch.setattr(torch, "empty", poisoned)
    again = run()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_plans_pour_and_empty_ones_do_too(device):
    plan = vk.match_tokens(torch.randn(2, 9, 4, device=device), 3)
    x, sizes = torch.randn(2, 9, 4, device=device), torch.ones(2, 9, device=device)
    (mean,), (size,) = plan.pour([x], [sizes], sizes)
    torch.testing.assert_close(mean, plan.merge(x))
    assert torch.equal(size, plan.counts().float())
    none = vk.MergePlan.from_kept(torch.zeros(2, 0, dtype=torch.long, device=device), 9)
    assert none.pour([x], [sizes])[0][0].shape == (2, 0, 4)
    assert vk.merge_sum(x[:, :0], plan.dst[:, :0], 3).tolist() == torch.zeros(2, 3, 4).tolist()
    assert vk.merge_tokens(plan.dst, 6, []) == ([], [])


def test_errors_are_the_references(device):
    dst = slots(6, 3, device)
    with pytest.raises(ValueError, match="does not fit a plan"):
        vk.merge_sum(torch.zeros(2, 5, device=device), dst, 3)
    with pytest.raises(ValueError, match="use sum or amax"):
        vk.merge_mean(dst, dst, 3)
    with pytest.raises(ValueError, match="one for each"):
        vk.merge_tokens(dst, 3, [torch.zeros(2, 6, device=device)], [], [None, None])
    with pytest.raises(ValueError, match="weights has shape"):
        vk.merge_mean(torch.zeros(2, 6, device=device), dst, 3, torch.zeros(2, 5, device=device))
