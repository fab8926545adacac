"""PSNR and SSIM against other people's, and the curve over k."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers.metrics import BEST, Curve, curve, psnr, ssim


def pairs(size: tuple[int, int] = (40, 33)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(3, 3, 6, 6, generator=generator), size, mode="bicubic")
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1), images.clamp(0, 1)


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    wanted = torch.full((2, 3, 8, 8), 0.5)
    found = wanted + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(found, wanted).tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    assert psnr(wanted, wanted).tolist() == [BEST, BEST]


def test_ssim_is_scikit_images() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    found, wanted = pairs()
    theirs = [
        metrics.structural_similarity(
            a.numpy(),
            b.numpy(),
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(found, wanted, strict=True)
    ]
    assert ssim(found, wanted).tolist() == pytest.approx(theirs, abs=1e-5)


def test_ssim_has_the_values_that_it_must_have() -> None:
    found, wanted = pairs()
    assert ssim(wanted, wanted).tolist() == pytest.approx([1.0] * 3)
    assert (ssim(found, wanted) == ssim(wanted, found)).all()
    grey = torch.full((1, 3, 16, 16), 0.5)
    # no structure: the first factor alone, (2ab + c1) / (a^2 + b^2 + c1)
    assert ssim(grey, grey / 2).item() == pytest.approx((0.25 + 1e-4) / (0.3125 + 1e-4), abs=1e-6)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(VtokError, match="cannot be compared"):
        psnr(torch.rand(1, 3, 8, 8), torch.rand(2, 3, 8, 8))
    with pytest.raises(VtokError, match="too short"):
        ssim(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))


class Halves(torch.nn.Module):
    """A tokenizer of four tokens, each of which halves the error."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"tokens": 4, "ordered": True})

    def encode(self, images: Tensor) -> Tensor:
        self.images = images
        return torch.zeros(len(images), 4, dtype=torch.long)

    def decode(self, tokens: Tensor) -> Tensor:
        return self.images + 0.5 ** tokens.shape[1]


def test_the_curve_over_k() -> None:
    found = curve(Halves(), [torch.rand(2, 3, 16, 16), torch.rand(1, 3, 16, 16)])
    assert found.ks == (1, 2, 4) and found.rises()
    rows = found.as_dict()["rows"]
    assert [row["psnr"] for row in rows] == pytest.approx([6.0206, 12.0412, 24.0824], abs=1e-3)
    assert rows[1]["rise"] == pytest.approx(6.0206, abs=1e-3) and rows[1]["rise_error"] < 1e-3
    assert found.as_dict()["pictures"] == 3
    assert not Curve((1, 2), ((3.0, 3.0), (3.0, 2.0)), ((0.1, 0.1), (0.1, 0.1))).rises()
    with pytest.raises(VtokError, match="no picture"):
        curve(Halves(), [])
