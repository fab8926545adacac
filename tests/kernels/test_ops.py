"""Operators in graphs: torch.compile and torch.export see one node each, with the right shapes and derivatives."""

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels import backend

from .test_backend import calls

TRACED = sorted(backend._TRACED)
PLANS = {"bipartite_match", "match_tokens"}


def tensors(found):
    """Tensors of any result, in order."""
    if isinstance(found, vk.MergePlan):
        return [found.dst, found.representative]
    if isinstance(found, list | tuple):
        return [tensor for part in found for tensor in tensors(part)]
    return [found]


def test_every_operator_has_a_node_or_is_traced_as_it_is():
    assert set(vk.available()) - set(TRACED) == {"packed_attention"}
    assert all(hasattr(torch.ops.vtok, name) for name in TRACED)


@pytest.mark.parametrize("name", sorted(set(TRACED) - PLANS))
def test_compiled_in_one_graph_with_one_node(name):
    graphs = []

    def look(module, inputs):
        graphs.append(module)
        return module.forward

    call = calls()[name]
    found = torch.compile(call, backend=look, fullgraph=True)()
    torch.testing.assert_close(tensors(found), tensors(call()), equal_nan=True)
    assert any(f"vtok.{name}" in str(node.target) for node in graphs[0].graph.nodes)


@pytest.mark.parametrize("protected", [None, 1])
@pytest.mark.parametrize("two_way", [False, True])
def test_plans_cross_a_graph(protected, two_way):
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))

    def merged(x):
        plan = vk.match_tokens(x, 3, protected=protected, two_way=two_way)
        again = vk.bipartite_match(vk.cosine_scores(x), 3, protected=protected, two_way=two_way)
        return plan.merge(x), plan.sum(x), plan.unmerge(plan.merge(x)), again.dst

    found = torch.compile(merged, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(found, merged(x))


def test_a_mask_of_protected_places_leaves_the_length_open():
    x, mask = torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) < 3

    def places(x, mask):
        return vk.match_tokens(x, 4, protected=mask).representative

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(places, backend="eager", fullgraph=True)(x, mask)
    assert torch.equal(found, places(x, mask))


def test_the_reference_is_traced_as_plain_torch_on_request():
    nodes = []

    def look(module, inputs):
        nodes.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    x = torch.randn(1, 6)
    with vk.use("reference"):
        torch.compile(lambda x: vk.topk(x, 2), backend=look, fullgraph=True)(x)
    assert not any("vtok" in node for node in nodes)


class Prune(torch.nn.Module):
    """What a method does between two layers: score, choose, gather; and the way back."""

    def forward(self, q, k, x):
        received = vk.received_attention(q, k, scale=0.5)
        kept = vk.topk(received, 3)
        (moved,) = vk.compact([x], kept)
        return vk.scatter_tokens(moved, kept, x.shape[1])


def test_export_sees_through():
    q, k, x = torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 4), torch.randn(2, 8, 5)
    exported = torch.export.export(Prune(), (q, k, x))
    torch.testing.assert_close(exported.module()(q, k, x), Prune()(q, k, x))
    targets = [str(node.target) for node in exported.graph.nodes]
    for name in ("received_attention", "topk", "compact", "scatter_tokens"):
        assert any(f"vtok.{name}" in target for target in targets)


DST = torch.tensor([[0, 1, 0, -1, 2], [2, 2, 1, 0, 0]])
INDEX = torch.tensor([[0, 3, 3], [1, 2, 4]])
DIFFERENTIABLE = {
    "gather_tokens": lambda x, w: vk.gather_tokens(x, INDEX),
    "compact": lambda x, w: vk.compact([x, w, x[:1]], INDEX)[0] + vk.compact([x[:1]], INDEX)[0],
    "scatter_tokens": lambda x, w: vk.scatter_tokens(x, torch.arange(5).expand(2, 5), 7, DST >= 0),
    "merge_sum": lambda x, w: vk.merge_sum(x, DST, 3),
    "merge_mean": lambda x, w: vk.merge_mean(x, DST, 3, w),
    "merge_mean of weights that vanish": lambda x, w: vk.merge_mean(x, DST, 3, w * (DST != 2)),
    "merge_tokens": lambda x, w: torch.cat(tensors(vk.merge_tokens(DST, 3, [x, x * x], [x], [None, w])), -1),
}


@pytest.mark.parametrize("name", sorted(DIFFERENTIABLE))
def test_gradients_in_graphs(name):
    """The derivatives that are written out agree with those of plain torch, and with differences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).requires_grad_()
    w = (torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
    call = DIFFERENTIABLE[name]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    grad = torch.randn(call(x, w).shape, generator=generator, dtype=torch.float64)
    expected = torch.autograd.grad(call(x, w), (x, w), grad, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(compiled(x, w), (x, w), grad, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, expected)
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):  # gradcheck runs a backward twice
        assert torch.autograd.gradcheck(torch.compile(call, backend="aot_eager", fullgraph=True), (x, w))


def test_half_precision_gradients_keep_their_dtype():
    x = torch.randn(2, 5, 3, dtype=torch.bfloat16).requires_grad_()
    compiled = torch.compile(lambda x: vk.merge_mean(x, DST, 3), backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16


def test_statistics_take_no_gradient_in_graphs():
    q = torch.randn(1, 2, 3, 4).requires_grad_()
    rows = torch.compile(lambda q: vk.attention_rows(q, q, scale=0.5), backend="aot_eager", fullgraph=True)(q)
    assert not rows.requires_grad


def test_compact_into_a_cache_in_a_graph():
    x, cache = torch.randn(2, 5, 3), torch.zeros(2, 6, 3)

    def fill(x, cache):
        vk.compact([x], INDEX, out=[cache[:, :3]])
        return cache + 0

    expected = fill(x, cache.clone())
    torch.testing.assert_close(torch.compile(fill, backend="aot_eager", fullgraph=True)(x, cache), expected)
    torch.testing.assert_close(cache, expected)


@pytest.mark.parametrize("name", TRACED)
def test_schemas_and_fakes_hold(name):
    """torch's own checks: the schema, shapes and strides of the fake, the registration of gradients."""
    torch.library.opcheck(getattr(torch.ops.vtok, name).default, samples()[name], test_utils=CHECKS)


CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def samples():
    """Arguments of every node."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    x, heads, sizes = randn(2, 5, 4), randn(2, 2, 5, 4), randn(2, 5).abs()
    on = DST >= 0
    return {
        "attention_rows": (heads, heads, 0.5, on[:, None]),
        "received_attention": (heads, heads, 0.5, on, on, DST, 2),
        "value_similarity": (heads, heads[:, :, 0], 0.5, on),
        "transition": (x, x.flip(1), on),
        "topk": (sizes, 2),
        "keep_mask": (INDEX, 6),
        "left_compact": (on, 4),
        "farthest_first": (x, 3, sizes),
        "max_sum": (x, 3, INDEX[:, 0]),
        "dpp_map": (x, 3, sizes),
        "cosine_scores": (x,),
        "mctf_scores": (x, sizes, sizes, [1.0, 20.0, 40.0]),
        "strided_merge": (x, 3),
        "bipartite_match": (randn(2, 3, 2), 1, None, 1, True),
        "match_tokens": (x, 2, None, 0, False, sizes, 1.0),
        "gather_tokens": (x.clone().requires_grad_(), INDEX),
        "compact": ([x.clone().requires_grad_(), sizes, x[:1]], INDEX),
        "scatter_tokens": (x.clone().requires_grad_(), torch.arange(5).repeat(2, 1), 7, on),
        "merge_sum": (x.clone().requires_grad_(), DST, 3),
        "merge_mean": (x.clone().requires_grad_(), DST, 3, sizes),
        "merge_tokens": (DST, 3, [x.clone().requires_grad_(), x], [sizes], [sizes], [-1, 0]),
    }
