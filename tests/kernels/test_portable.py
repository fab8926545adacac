"""The forms that exported graphs hold give what the operators give."""

import pytest
import torch

import vtok_kernels as vk


def features(seed: int = 0, batch: int = 3, n: int = 23, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("k", [0, 1, 7, 23])
@pytest.mark.parametrize("given", [False, True])
def test_farthest_first(k, given):
    x = features()
    weights = torch.rand(3, 23, generator=torch.Generator().manual_seed(1)) if given else None
    first = torch.tensor([4, 0, 22]) if given else None
    for sort in (True, False):
        expected = vk.farthest_first(x, k, weights=weights, first=first, sort=sort)
        with vk.portable():
            assert torch.equal(vk.farthest_first(x, k, weights=weights, first=first, sort=sort), expected)


@pytest.mark.parametrize("k", [0, 1, 7, 23])
@pytest.mark.parametrize("objective", ["sum", "min"])
def test_max_sum(k, objective):
    x, pivot = features(1), torch.tensor([4, 0, 22])
    expected = vk.max_sum(x, k, pivot, objective=objective, sort=False)
    with vk.portable():
        assert torch.equal(vk.max_sum(x, k, pivot, objective=objective, sort=False), expected)


def test_equal_tokens_are_taken_in_order():
    x = features(2).repeat_interleave(2, 1)
    expected = vk.farthest_first(x, 30)
    with vk.portable():
        found = vk.farthest_first(x, 30)
    assert torch.equal(found[:, :1], expected[:, :1]) and all(len(set(row)) == 30 for row in found.tolist())


def test_errors_are_the_operators():
    with vk.portable():
        with pytest.raises(ValueError, match="cannot be chosen"):
            vk.farthest_first(features(), 24)
        with pytest.raises(ValueError, match="objective"):
            vk.max_sum(features(), 3, torch.zeros(3, dtype=torch.long), objective="most")


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.long])
def test_merge_sum(shape, dtype):
    x = torch.randint(-9, 9, (3, 11, *shape), generator=torch.Generator().manual_seed(3)).to(dtype)
    dst = torch.randint(-1, 5, (3, 11), generator=torch.Generator().manual_seed(4))
    expected = vk.merge_sum(x, dst, 5)
    with vk.portable():
        found = vk.merge_sum(x, dst, 5)
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_gather_tokens():
    x, index = features(), torch.tensor([[3, 1], [0, 22], [7, 7]])
    with vk.portable():
        found = vk.gather_tokens(x, index)
    assert torch.equal(found, vk.gather_tokens(x, index))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_ranking_takes_the_lower_index_first(dtype):
    scores = torch.tensor([[1, 3, 1, 3, 0, 2], [2, 2, 2, 2, 2, 2]]).to(dtype)
    expected = torch.tensor([[1, 3, 5, 0, 2, 4], [0, 1, 2, 3, 4, 5]])
    assert torch.equal(vk.ranking(scores), expected)
    many = torch.randint(0, 5, (2, 300), generator=torch.Generator().manual_seed(5)).to(dtype)
    order = vk.ranking(many)
    with vk.portable():
        assert torch.equal(vk.ranking(scores), expected) and torch.equal(vk.ranking(many), order)


def test_the_context_ends():
    with pytest.raises(RuntimeError), vk.portable():
        raise RuntimeError
    assert not vk.backend.portable_asked()


@pytest.mark.parametrize("name", ["cosine_scores", "match_tokens", "farthest_first", "topk"])
def test_gradients_are_not_switched_where_they_are_off(name):
    """torch.export cuts its graph at every switch."""
    switches = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch._C._set_grad_enabled:
                switches.append(args)
            return function(*args, **(kwargs or {}))

    def call():
        x = torch.rand(2, 9) if name == "topk" else torch.rand(2, 9, 4)
        x.requires_grad_(torch.is_grad_enabled())
        return getattr(vk, name)(x, *(() if name == "cosine_scores" else (3,)))

    with vk.portable(), Watching():
        with torch.no_grad():
            switches.clear()
            call()
            assert not switches
        found = call()
        assert switches
    assert not getattr(found, "dst", found).requires_grad
