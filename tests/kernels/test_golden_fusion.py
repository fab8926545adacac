"""Golden vectors of the authors' ToMe and MCTF code (the inputs are closed formulas, below).

Slots are in another order than the authors' (ours are spatial), so groups are compared as sets; a second round starts
from the authors' order, because alternation depends on it.
"""

import json
from pathlib import Path

import pytest
import torch

import vtok_kernels as vk

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_fusion.json").read_text())
B, N, D, H = 2, 13, 6, 2


def axis(size, *shape):
    return torch.arange(size, dtype=torch.float64).reshape(shape)


def recipe_x():
    b, n, d = axis(B, B, 1, 1), axis(N, 1, N, 1), axis(D, 1, 1, D)
    return torch.sin(1 + 0.7 * b + 0.37 * n * (1 + 0.13 * d) + 0.9 * d) + 0.25 * torch.cos(0.11 * n * (n + 1) + b)


def recipe_attention():
    b, h, q, k = axis(B, B, 1, 1, 1), axis(H, 1, H, 1, 1), axis(N, 1, 1, N, 1), axis(N, 1, 1, 1, N)
    return (torch.sin(0.31 * q + 1.7 * k + h) + 0.5 * torch.cos(0.23 * k * k + b)).softmax(-1)


def authors_order(plan, golden_groups):
    """Our slots in the authors' order (B, n_out); fails where the groups differ."""
    order = []
    for ours, theirs in zip(plan.groups(), golden_groups, strict=True):
        assert sorted(ours) == sorted(theirs)
        order.append([ours.index(group) for group in theirs])
    return torch.tensor(order)


def first_channel(x):
    return pytest.approx(x[0, :, 0].tolist(), abs=1e-6)


@pytest.mark.parametrize("case", GOLDEN["tome"], ids=lambda c: f"r{c['r']}-cls{c['cls']:d}-dist{c['dist']:d}")
def test_tome(case):
    x = recipe_x()
    n_protected = case["cls"] + case["dist"]
    first = vk.bipartite_match(vk.cosine_scores(x), case["r"], protected=torch.arange(N) < n_protected)
    order = authors_order(first, case["groups"])
    merged, size = first.merge(x), first.counts()
    merged, size = vk.gather_tokens(merged, order), vk.gather_tokens(size, order)
    assert case["x0"] == first_channel(merged)

    protected = torch.arange(first.n_out) < n_protected
    second = vk.bipartite_match(vk.cosine_scores(merged), 2, protected=protected)
    slots = torch.empty_like(order).scatter(1, order, torch.arange(first.n_out).expand_as(order))
    reordered = vk.MergePlan(slots.gather(1, first.dst), first.n_out)
    both = reordered.then(second)
    final = authors_order(both, case["groups_after_r2"])
    merged = vk.gather_tokens(second.merge(merged, size), final)
    size = vk.gather_tokens(second.sum(size), final)
    assert size.tolist() == case["size2"]
    torch.testing.assert_close(vk.gather_tokens(both.merge(x), final), merged)
    assert merged.sum().item() == pytest.approx(case["x2_sum"], abs=1e-5)


@pytest.mark.parametrize(
    "case",
    GOLDEN["mctf"],
    ids=lambda c: f"r{c['r']}-way{c['bidirection']}-prot{c['num_protected']}-{c['pooling_type']}",
)
def test_mctf(case):
    x, attn = recipe_x(), recipe_attention()
    sizes = torch.tensor(case["sizes_in"], dtype=torch.float64).expand(B, N)
    received = attn.mean((1, 2))
    scores = vk.mctf_scores(x, received, sizes)
    protected = torch.arange(N) < case["num_protected"]
    plan = vk.bipartite_match(scores, case["r"], protected=protected, two_way=bool(case["bidirection"]))
    order = authors_order(plan, case["groups"])

    pooled = received * sizes / sizes.amax(1, keepdim=True)
    merged = plan.merge(x, pooled if case["pooling_type"] == 1 else sizes)
    assert case["x0"] == first_channel(vk.gather_tokens(merged, order))
    assert vk.gather_tokens(plan.sum(sizes), order).tolist() == case["size_out"]

    fused = vk.merge_attention(plan, attn, pooled)
    torch.testing.assert_close(fused.sum(-1), torch.full_like(fused[..., 0], case["attn_rowsum"]))
    assert case["attn00"] == pytest.approx(fused[0, 0, order[0, 0], order[0]].tolist(), abs=1e-6)


def test_single_precision_finds_the_same_groups():
    for case in GOLDEN["tome"]:
        protected = torch.arange(N) < case["cls"] + case["dist"]
        plan = vk.bipartite_match(vk.cosine_scores(recipe_x().float()), case["r"], protected=protected)
        authors_order(plan, case["groups"])
