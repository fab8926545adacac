"""Rectified flow on problems with known answers; guidance against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from vtok.errors import VtokError
from vtok.tokenizers import Guidance, flow
from vtok.tokenizers.decoders import time_waves


def test_one_picture_is_reached_in_any_number_of_steps() -> None:
    """Where all data is one point c, the velocity (x - c) / t leads straight to it."""
    target, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for steps in (1, 2, 7):
        found = flow.euler(lambda x, time: (x - target) / time, noise, steps)
        torch.testing.assert_close(found, target, atol=1e-5, rtol=0)


def test_a_normal_comes_out_as_wide_as_it_is() -> None:
    """For data N(m, s^2) the velocity E[n - x | x_t] is linear in x_t, and many steps carry N(0, 1) to the data."""
    m, s = 1.5, 0.4

    def velocity(x: Tensor, time: float) -> Tensor:
        variance = time**2 + (1 - time) ** 2 * s**2
        covariance = time - (1 - time) * s**2
        return -m + covariance / variance * (x - (1 - time) * m)

    noise = torch.randn(20000, 1, generator=torch.Generator().manual_seed(0))
    found = flow.euler(velocity, noise, 200)
    assert found.mean().item() == pytest.approx(m, abs=0.02)
    assert found.std().item() == pytest.approx(s, rel=0.03)


def test_the_loss_is_least_at_the_mean_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(5, 3, 4, 4, generator=generator), torch.randn(5, 3, 4, 4, generator=generator)
    assert flow.flow_loss(noise - signal, signal, noise) == 0
    assert flow.flow_loss(noise - signal + 2, signal, noise).item() == pytest.approx(4, rel=1e-5)
    time = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75])
    x = flow.noised(signal, noise, time)
    assert torch.equal(x[0], signal[0]) and torch.equal(x[1], noise[1])
    torch.testing.assert_close(x[2], 0.25 * noise[2] + 0.75 * signal[2])


@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_times_are_logit_normal(shift: float) -> None:
    time = flow.sample_times(50000, torch.Generator().manual_seed(0), shift)
    assert time.logit().mean().item() == pytest.approx(shift, abs=0.02)
    assert time.logit().std().item() == pytest.approx(1, abs=0.02)


def test_classifier_free_guidance() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    guide = flow.Guide(Guidance(3.0, adaptive=False))
    torch.testing.assert_close(guide(a, b), b + 3 * (a - b))
    torch.testing.assert_close(flow.Guide(Guidance(1.0))(a, b), a)


def test_adaptive_projected_guidance() -> None:
    """Two steps of one sample, in numpy, as section 3 of arXiv 2410.02416 has it."""
    rng = np.random.default_rng(0)
    options = Guidance(7.5, momentum=-0.5, parallel=0.25, threshold=2.5)
    guide, running = flow.Guide(options), np.zeros(48)
    for size in (0.1, 3.0):  # one difference within the bound, one beyond
        conditional, unconditional = rng.normal(size=48), rng.normal(size=48)
        unconditional = conditional + size * (unconditional - conditional)
        running = (conditional - unconditional) + options.momentum * running
        length = math.sqrt((running**2).sum())
        bounded = running * min(1.0, options.threshold / length)
        axis = conditional / math.sqrt((conditional**2).sum())
        parallel = (bounded @ axis) * axis
        expected = conditional + 6.5 * ((bounded - parallel) + 0.25 * parallel)
        given = [torch.tensor(v, dtype=torch.float32).view(1, 3, 4, 4) for v in (conditional, unconditional)]
        found = guide(given[0], given[1])
        torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float32), atol=1e-4, rtol=0)


def test_guidance_of_a_sample_is_its_own() -> None:
    a, b = torch.randn(3, 3, 4, 4), 5 * torch.randn(3, 3, 4, 4)
    together = flow.Guide(Guidance())(a, b)
    for row in range(3):
        torch.testing.assert_close(flow.Guide(Guidance())(a[row : row + 1], b[row : row + 1])[0], together[row])


def test_time_waves() -> None:
    waves = time_waves(torch.tensor([0.0, 0.3]))
    assert waves.shape == (2, 256)
    assert torch.equal(waves[0], torch.cat([torch.ones(128), torch.zeros(128)]))
    rate = 1000 * 256 ** (-5 / 128)
    assert waves[1, 5].item() == pytest.approx(math.cos(0.3 * rate), abs=1e-4)
    assert waves[1, 133].item() == pytest.approx(math.sin(0.3 * rate), abs=1e-4)


def test_errors() -> None:
    with pytest.raises(VtokError, match="steps"):
        flow.euler(lambda x, time: x, torch.zeros(1), 0)
    with pytest.raises(VtokError, match="scale"):
        Guidance(-1.0)
