"""The registry, and what every operator promises: no host synchronisation, traceable, public."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import vtok_kernels as vk
from vtok_kernels import backend


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(backend, "_OPERATORS", {name: dict(kinds) for name, kinds in backend._OPERATORS.items()})


def test_reference_serves_by_default_and_on_request():
    assert all(kinds[0] == "reference" for kinds in vk.available("cpu").values())
    with vk.use("reference"):
        assert vk.topk(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist() == [[1, 2]]


@pytest.mark.usefixtures("registry")
def test_a_fused_version_replaces_one_operator():
    scores = torch.tensor([[1.0, 3.0, 2.0]])

    @vk.register("topk", "fused", devices=("cpu",))
    def fused(scores, k):
        return torch.full((1, k), 7)

    @vk.register("keep_mask", "elsewhere", devices=("cuda",))
    def elsewhere(indices, n):
        raise AssertionError

    assert vk.available()["topk"] == ("fused", "reference")
    assert vk.available("cpu")["keep_mask"] == ("reference",)
    assert vk.get("topk", "cpu") is fused
    assert vk.topk(scores=scores, k=1).tolist() == [[7]]
    with vk.use("reference"):
        assert vk.topk(scores, 1).tolist() == [[1]]
        with vk.use("fused"):
            assert vk.topk(scores, 1).tolist() == [[7]]
            assert vk.keep_mask(torch.tensor([[1]]), 2).tolist() == [[False, True]]
    with vk.use("elsewhere"), pytest.raises(ValueError, match=r"runs on \('cuda',\): move the tensors from cpu"):
        vk.keep_mask(torch.tensor([[1]]), 2)


@pytest.mark.usefixtures("registry")
def test_plans_use_the_registered_merge():
    vk.register("merge_sum", "fused")(lambda x, dst, n_out: x[:, :n_out] * 0)
    plan = vk.MergePlan.identity(1, 3)
    assert (plan.sum(torch.ones(1, 3)) == 0).all()


def test_the_requested_backend_is_forgotten_after_an_exception():
    with pytest.raises(RuntimeError, match="stop"), vk.use("reference"):
        raise RuntimeError("stop")
    assert backend._requested.get() is None


def test_unknown_names_are_explained():
    with (
        pytest.raises(ValueError, match=r"no backend 'triton2': choose one of .*reference"),
        vk.use("triton2"),
    ):
        pass
    with pytest.raises(ValueError, match=r"There is no operator 'topp': choose one of .*topk"):
        vk.get("topp")


def calls(device="cpu"):
    """One call of every registered operator, by name, and of what is built on them."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    x, heads, index = randn(2, 8, 4), randn(2, 2, 8, 4), torch.tensor([[0, 3, 5], [1, 2, 7]]).to(device)
    on, dst, pivot = randn(2, 8) > 0, (randn(2, 8) > 0).long(), torch.tensor([3, 0]).to(device)
    rows, sizes, protected = randn(2, 8), randn(2, 8).abs(), torch.arange(8) < 1
    scores, attn = randn(2, 4, 4), randn(2, 1, 8, 8)
    positions = torch.arange(8).expand(2, 8).to(device)
    return {
        "attention_rows": lambda: vk.attention_rows(heads, heads, scale=0.5, mask=on[:, None]),
        "received_attention": lambda: vk.received_attention(
            heads, heads, scale=0.5, key_mask=on, query_mask=on, query_positions=positions, block=3
        ),
        "value_similarity": lambda: vk.value_similarity(heads, heads[:, :, 0], mask=on),
        "transition": lambda: vk.transition(x, x.flip(1), on),
        "topk": lambda: vk.topk(rows, 3),
        "keep_mask": lambda: vk.keep_mask(index, 8),
        "farthest_first": lambda: vk.farthest_first(x, 4, weights=sizes),
        "max_sum": lambda: vk.max_sum(x, 4, pivot),
        "dpp_map": lambda: vk.dpp_map(x, 4, sizes),
        "gather_tokens": lambda: vk.gather_tokens(x, index),
        "scatter_tokens": lambda: vk.scatter_tokens(x, positions, 9, on),
        "compact": lambda: vk.compact([x, on, positions], index),
        "left_compact": lambda: vk.left_compact(on, 6),
        "merge_sum": lambda: vk.merge_sum(x, dst, 2),
        "merge_mean": lambda: vk.merge_mean(x, dst, 2, sizes),
        "merge_tokens": lambda: vk.merge_tokens(dst, 2, [x], [sizes], sizes),
        "match_tokens": lambda: (
            vk.match_tokens(x, 3, protected=1, two_way=True, bias=vk.mctf_bias(sizes, sizes), temperature=1.0).dst
        ),
        "cosine_scores": lambda: vk.cosine_scores(x),
        "mctf_scores": lambda: vk.mctf_scores(x, sizes, sizes),
        "bipartite_match": lambda: vk.bipartite_match(scores, 3, protected=protected, two_way=True).dst,
        "strided_merge": lambda: vk.strided_merge(x, 3),
        "MergePlan": lambda: vk.MergePlan(dst, 2).then(vk.MergePlan.from_kept(dst[:, :1] * 0, 2)).amax(x),
        "merge_attention": lambda: vk.merge_attention(vk.MergePlan(dst, 2), attn, sizes),
        "reuse_attention": lambda: vk.reuse_attention(
            vk.MergePlan(dst, 2), heads, heads, heads[:, :, :2], scale=0.5, weights=sizes, bias=rows[:, None, None]
        ),
        "uniform": lambda: vk.uniform(9, 4, device),
        "uniform_grid": lambda: vk.uniform_grid(4, 4, 5, device),
        "packed_attention": lambda: vk.packed_attention(
            *(heads[0].transpose(0, 1) for _ in range(3)), [3, 5], scale=0.5, bias=rows[0]
        ),
        "random": lambda: vk.random(9, 4, generator, device),
    }


def test_every_operator_is_called_and_public():
    assert set(vk.available()) <= set(calls())
    assert set(vk.available()) <= set(vk.__all__)
    assert sorted(vk.__all__) == vk.__all__
    assert all(hasattr(vk, name) for name in vk.__all__)
    assert all(getattr(vk, name).__doc__ for name in vk.__all__)


# These draw or count on the host by design, from host tensors; fake tensors cannot tell the two apart.
ON_HOST = {"bipartite_match", "random", "uniform", "uniform_grid"}


@pytest.mark.parametrize("name", sorted(set(calls()) - ON_HOST))
def test_no_operator_reads_a_value_on_the_host(name):
    # A fake tensor has no values: .item(), nonzero and boolean indexing raise on it.
    with FakeTensorMode():
        calls()[name]()


def test_matching_reads_no_scores_on_the_host():
    with FakeTensorMode():
        plan = vk.bipartite_match(torch.randn(2, 5, 4), 3, two_way=True)
        assert plan.dst.shape == (2, 9)
        assert plan.representative.shape == (2, 6)


@pytest.mark.parametrize("name", ["topk", "farthest_first", "merge_mean", "attention_rows"])
def test_operators_trace_in_one_graph(name):
    call = calls()[name]
    torch.testing.assert_close(torch.compile(call, backend="eager", fullgraph=True)(), call())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", sorted(calls()))
def test_cuda_gives_the_same_without_synchronising(name):
    expected, call = calls()[name](), calls("cuda")[name]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, check_device=False)
