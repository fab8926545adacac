"""Matching in Triton makes the plans of the reference, which forms the whole matrix of scores."""

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.backend import reference
from vtok_kernels.fused import match as fused

pytestmark = pytest.mark.usefixtures("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(metric, r, **options):
    """The plan in Triton, checked against that of float64 scores."""
    bias = options.pop("bias", None)
    plan = vk.match_tokens(metric, r, bias=bias, **options)
    exact = reference("match_tokens")(metric.double(), r, bias=None if bias is None else bias.double(), **options)
    assert plan.n_out == exact.n_out
    assert torch.equal(plan.dst, exact.dst)
    assert torch.equal(plan.representative, exact.representative)
    return plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize(("n", "d", "r"), [(1, 3, 1), (2, 1, 1), (3, 5, 2), (17, 40, 8), (131, 70, 40)])
def test_plans_equal_those_of_exact_scores(device, dtype, two_way, n, d, r):
    torch.manual_seed(n)
    same(torch.randn(2, n, d).to(device, dtype), r, two_way=two_way)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("two_way", [False, True])
def test_three_criteria(device, dtype, two_way):
    torch.manual_seed(0)
    x, received, sizes = torch.randn(2, 37, 12), torch.rand(2, 37), torch.randint(1, 4, (2, 37)).float()
    bias = vk.mctf_bias(received, sizes, (1, 20, 40))
    same(x.to(device, dtype), 15, two_way=two_way, protected=1, bias=bias.to(device), temperature=2.0)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("kind", ["number", "mask", "mask by sample", "everything"])
def test_protected_places_stay(device, two_way, kind):
    torch.manual_seed(1)
    protected = {
        "number": 3,
        "mask": torch.rand(23) < 0.4,
        "mask by sample": torch.rand(2, 23) < 0.4,
        "everything": torch.ones(23, dtype=torch.bool),
    }[kind]
    plan = same(torch.randn(2, 23, 6, device=device), 7, two_way=two_way, protected=protected)
    fixed = torch.arange(23) < protected if isinstance(protected, int) else protected
    counts = plan.unmerge(plan.counts()).cpu()
    assert (counts[fixed.expand(2, -1)] == 1).all()


@pytest.mark.parametrize("two_way", [False, True])
def test_lower_index_first_among_equals(device, two_way):
    # Axes and their opposites: cosines are exactly 0, 1 and -1, in every dtype and order of sums.
    generator = torch.Generator().manual_seed(0)
    axes = torch.cat((torch.eye(4), -torch.eye(4)))
    x = axes[torch.randint(8, (3, 150), generator=generator)].to(device)
    for r in (1, 20, 60):
        same(x, r, two_way=two_way)
    same(torch.zeros(1, 9, 4, device=device), 3, two_way=two_way)
    same(torch.ones(1, 140, 4, device=device), 9, two_way=two_way)


@pytest.mark.parametrize("two_way", [False, True])
def test_strides_do_not_matter(device, two_way):
    torch.manual_seed(0)
    x = torch.randn(9, 2, 3, 40, device=device)
    views = [
        x[:, :, 0].permute(1, 2, 0),
        x[::2, 1, :, ::3].permute(1, 2, 0),
        x[:1, 0].transpose(1, 2).expand(4, -1, -1),
    ]
    for view in views:
        assert not view.is_contiguous()
        same(view, 5, two_way=two_way)
    bias = torch.randn(40, 2, device=device).t()
    same(views[0], 5, two_way=two_way, bias=bias, temperature=1.0)


def test_shares_of_the_keys_do_not_matter(device, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(1, 270, 8, device=device)
    whole = same(x, 60, two_way=True)
    monkeypatch.setattr(fused, "PROGRAMS", 1)
    assert torch.equal(vk.match_tokens(x, 60, two_way=True).dst, whole.dst)
    monkeypatch.setattr(fused, "LONGEST", 10)
    assert torch.equal(vk.match_tokens(x, 60, two_way=True).dst, whole.dst)
    assert torch.equal(vk.match_tokens(x, 60).dst, reference("match_tokens")(x, 60).dst)


def test_scale_does_not_matter(device):
    torch.manual_seed(0)
    x = torch.randn(1, 20, 6, device=device)
    expected = same(x, 6).dst
    for scale in (1e-18, 1e18):
        assert torch.equal(vk.match_tokens(x * scale, 6).dst, expected)


def test_runs_repeat_and_write_every_entry(device, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 41, 7, device=device)
    first = vk.match_tokens(x, 13, two_way=True, protected=1)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(float("nan") if found.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    again = vk.match_tokens(x, 13, two_way=True, protected=1)
    assert torch.equal(first.dst, again.dst)
    assert torch.equal(first.representative, again.representative)


def test_a_sample_gets_in_a_batch_what_it_gets_alone(device):
    torch.manual_seed(0)
    x = torch.randn(3, 30, 10, device=device, dtype=torch.float16)
    together = vk.match_tokens(x, 9, two_way=True)
    alone = torch.cat([vk.match_tokens(row[None], 9, two_way=True).dst for row in x])
    assert torch.equal(together.dst, alone)


def test_no_gradient_and_float64_and_errors_are_the_references(device):
    x = torch.randn(1, 8, 3, device=device, requires_grad=True)
    assert not vk.match_tokens(x, 2).dst.requires_grad
    assert vk.match_tokens(x.double(), 2).n_out == 6
    with pytest.raises(ValueError, match="pass r >= 0"):
        vk.match_tokens(x, -1)
    with pytest.raises(ValueError, match="bias has shape"):
        vk.match_tokens(x, 1, bias=torch.zeros(1, 7, device=device))
