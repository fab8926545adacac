"""Token transitions: the formula, and Triton's version of it."""

import pytest
import torch

import vtok_kernels as vk


def expected(x, y, mask=None):
    x, y = x.double(), y.double()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=0)
    cosine = cosine.where((x.norm(dim=-1) > 0) & (y.norm(dim=-1) > 0), 0)
    direction = torch.exp(1 - cosine)
    return y.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12), direction if mask is None else direction * mask


def tokens(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.fixture(params=["reference", "triton"])
def place(request):
    """The device of tensors, with each backend asked for."""
    where = request.getfixturevalue("device") if request.param == "triton" else "cpu"
    with vk.use(request.param):
        yield where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 37), (1, 3, 128)])
@pytest.mark.parametrize("masked", [False, True])
def test_transition(place, dtype, shape, masked):
    x, y = tokens(*shape, dtype=dtype, device=place), tokens(*shape, dtype=dtype, device=place, seed=1)
    mask = tokens(*shape[:2], device=place, seed=2) > 0 if masked else None
    found = vk.transition(x, y, mask)
    for part, truth in zip(found, expected(x, y, mask), strict=True):
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(part.double(), truth, atol=1e-5, rtol=1e-5)


def test_wide_rows_loop_and_strides_are_followed(place):
    x = tokens(5000, 3, 2, device=place).permute(2, 1, 0)[:, ::2]
    y = tokens(2, 2, 10000, device=place, seed=1)[..., ::2]
    mask = (tokens(2, 2, device=place, seed=2) > 0).t()
    for part, truth in zip(vk.transition(x, y, mask), expected(x, y, mask), strict=True):
        torch.testing.assert_close(part.double(), truth, atol=1e-5, rtol=1e-5)


def test_zero_rows_stay_finite(place):
    x, y = tokens(1, 3, 8, device=place), tokens(1, 3, 8, device=place, seed=1)
    x[0, 0], y[0, 1] = 0, 0
    magnitude, direction = vk.transition(x, y)
    assert torch.isfinite(magnitude).all()
    assert magnitude[0, 1] == 0
    torch.testing.assert_close(direction[0, :2], torch.full((2,), torch.e, device=place))


def test_empty_and_repeated(place):
    assert vk.transition(torch.zeros(1, 0, 4, device=place), torch.zeros(1, 0, 4, device=place))[0].shape == (1, 0)
    x, y = tokens(2, 4, 600, device=place), tokens(2, 4, 600, device=place, seed=1)
    assert torch.equal(torch.stack(vk.transition(x, y)), torch.stack(vk.transition(x, y)))
    assert not vk.transition(x.requires_grad_(), y)[0].requires_grad


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: vk.transition(x[0], x[0]), r"\(B, N, D\) is needed"),
        (lambda x: vk.transition(x, x[:, :1]), "y has shape"),
        (lambda x: vk.transition(x, x, torch.ones(1, 3, device=x.device)), "bool mask"),
        (lambda x: vk.transition(x, x, torch.ones(2, 3, dtype=torch.bool, device=x.device)), "mask has shape"),
    ],
)
def test_bad_arguments_are_explained(place, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tokens(1, 3, 4, device=place))
