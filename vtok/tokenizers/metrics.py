"""How close a reconstruction is, picture by picture: PSNR and SSIM, over the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtok.errors import VtokError
from vtok.tokenizers.nested import powers_of_two

#: a window of 11 pixels with a spread of 1.5, and the two constants of Wang et al. 2004, section III.B
WINDOW, SPREAD, K1, K2 = 11, 1.5, 0.01, 0.03
#: identical pictures would have an infinite PSNR; eight bits tell no more than this apart
BEST = 100.0


def psnr(found: Tensor, wanted: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture, dB.

    Parameters
    ----------
    found, wanted : Tensor
        (B, 3, H, W) in [0, 1].

    Returns
    -------
    Tensor
        (B,), at most ``BEST``.
    """
    _alike(found, wanted)
    error = (found.float() - wanted.float()).square().flatten(1).mean(1)
    return (-10 * error.log10()).clamp(max=BEST)


def ssim(found: Tensor, wanted: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004), averaged over its channels.

    Gaussian window, population covariance, windows inside the picture only: what scikit-image computes with
    ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``. It is written here because scikit-image comes
    with an extra alone, takes one picture at a time and runs on the CPU.

    Parameters
    ----------
    found, wanted : Tensor
        (B, C, H, W) in [0, 1], 11 pixels a side at least.

    Returns
    -------
    Tensor
        (B,), 1 where they are equal.
    """
    _alike(found, wanted)
    if min(found.shape[-2:]) < WINDOW:
        raise VtokError(
            f"SSIM looks through a window of {WINDOW} pixels; a side of {min(found.shape[-2:])} is too short"
        )
    x, y = found.double(), wanted.double()  # variances are small differences of squares
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x = _blurred(x * x) - mean_x.square()
    var_y = _blurred(y * y) - mean_y.square()
    both = _blurred(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    light = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (light * (2 * both + c2) / (var_x + var_y + c2)).flatten(1).mean(1).float()


def _blurred(x: Tensor) -> Tensor:
    """Means under the Gaussian window, wherever all of it is inside."""
    place = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-0.5 * (place / SPREAD).square())
    weights = weights / weights.sum()
    channels = x.shape[1]
    rows = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)


def _alike(found: Tensor, wanted: Tensor) -> None:
    if found.shape != wanted.shape or found.ndim != 4:
        shapes = f"{tuple(found.shape)} and {tuple(wanted.shape)}"
        raise VtokError(f"pictures of shapes {shapes} cannot be compared; both must be (B, C, H, W), and the same")


@dataclass(frozen=True)
class Curve:
    """Quality over the number of tokens.

    Attributes
    ----------
    ks : tuple of int
        Numbers of tokens.
    psnr, ssim : tuple of tuple of float
        For each of them, every picture's.
    """

    ks: tuple[int, ...]
    psnr: tuple[tuple[float, ...], ...]
    ssim: tuple[tuple[float, ...], ...]

    def rows(self) -> list[dict[str, float]]:
        """For each k the means, and how much PSNR rose since the k before, with its standard error over pictures."""
        rows = []
        for place, k in enumerate(self.ks):
            row = {"k": k, "psnr": fmean(self.psnr[place]), "ssim": fmean(self.ssim[place])}
            if place:
                risen = [b - a for a, b in zip(self.psnr[place - 1], self.psnr[place], strict=True)]
                row |= {"rise": fmean(risen), "rise_error": stdev(risen) / len(risen) ** 0.5 if len(risen) > 1 else 0.0}
            rows.append(row)
        return rows

    def rises(self) -> bool:
        """Whether mean PSNR rises with every k."""
        return all(row["rise"] > 0 for row in self.rows()[1:])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"pictures": len(self.psnr[0]), "rises": self.rises(), "rows": self.rows()}


@torch.no_grad()
def curve(
    tokenizer: Any,
    batches: Sequence[Tensor],
    ks: Sequence[int] | None = None,
    *,
    advance: Callable[[int], None] = lambda _: None,
    **decoding: Any,
) -> Curve:
    """Encode once, decode with the first k tokens for each k, and compare.

    Parameters
    ----------
    tokenizer : FlexTok
        As it is; the caller puts it on its device and into evaluation.
    batches : sequence of Tensor
        Pictures (B, 3, H, W) in [0, 1].
    ks : sequence of int, optional
        Numbers of tokens; 1, 2, 4, ... and all of them by default (all alone where they are not ordered).
    advance : callable
        Called with the number of pictures just done, once a batch.
    **decoding
        To ``tokenizer.decode``.

    Raises
    ------
    VtokError
        No picture.
    """
    if not batches:
        raise VtokError("there is no picture to measure with; give some")
    config = tokenizer.config
    chosen = tuple(ks or (powers_of_two(config.tokens) if config.ordered else (config.tokens,)))
    near: list[list[float]] = [[] for _ in chosen]
    alike: list[list[float]] = [[] for _ in chosen]
    device = next(tokenizer.parameters()).device
    for images in batches:
        images = images.to(device)
        tokens = tokenizer.encode(images)
        for place, k in enumerate(chosen):
            found = tokenizer.decode(tokens[:, :k], **decoding)
            near[place] += psnr(found, images).tolist()
            alike[place] += ssim(found, images).tolist()
        advance(len(images))
    return Curve(chosen, tuple(map(tuple, near)), tuple(map(tuple, alike)))
