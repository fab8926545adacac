"""Rectified flow: noised signals, the loss on velocities, Euler steps, guidance (FlexTok section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import VtokError


def sample_times(batch: int, generator: torch.Generator | None = None, shift: float = 0.0) -> Tensor:
    """(batch,) times in (0, 1) on the CPU: the sigmoid of a normal (arXiv 2403.03206); 1 is pure noise.

    Args:
        batch: how many.
        generator: on the CPU.
        shift: mean of the normal; its variance is 1.
    """
    return (torch.randn(batch, generator=generator) + shift).sigmoid()


def noised(signal: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = t n + (1 - t) x for signals and noise (B, ...) and times (B,)."""
    time = time.view(-1, *[1] * (signal.ndim - 1))
    return time * noise + (1 - time) * signal


def flow_loss(velocity: Tensor, signal: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error to the straight path's velocity n - x."""
    return (velocity.float() - (noise - signal).float()).square().mean()


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Signals from noise (B, ...): ``steps`` steps x <- x - v / steps from time 1 to 0.

    Args:
        velocity: x (B, ...), time -> (B, ...).
        noise: where to start.
        steps: number of steps.

    Raises:
        VtokError: fewer than one step.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise VtokError(f"steps={steps!r} must be a whole number from 1 on")
    x = noise
    for step in range(steps, 0, -1):
        x = x - velocity(x, step / steps) / steps
    return x


@dataclass(frozen=True)
class Guidance:
    """How far a conditional velocity is pushed away from the unconditional one.

    Args:
        scale: 1 takes the conditional one as it is.
        adaptive: adaptive projected guidance (APG, arXiv 2410.02416), which keeps high scales from oversaturating.
            ``False``: classifier-free guidance, v0 + scale (v - v0).
        momentum: of the running difference (APG).
        parallel: share of its part along the conditional velocity that stays (APG's eta).
        threshold: longest norm of a sample's difference (APG); 0 for no bound.
    """

    scale: float = 7.5
    adaptive: bool = True
    momentum: float = -0.5
    parallel: float = 0.0
    threshold: float = 2.5

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise VtokError(f"a guidance scale of {self.scale} is not possible; 1 is none, published models take 7.5")


class Guide:
    """One sampling run under a ``Guidance``: it remembers the running difference."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self.running: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """(B, ...) guided velocity of a step."""
        options = self.guidance
        difference = conditional - unconditional
        if not options.adaptive:
            return unconditional + options.scale * difference
        self.running = difference + options.momentum * self.running
        step = self.running
        if options.threshold > 0:
            norm = step.flatten(1).norm(dim=1).view(-1, *[1] * (step.ndim - 1))
            step = step * (options.threshold / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1.0)
        along = parallel_part(step, conditional)
        return conditional + (options.scale - 1) * (step - along + options.parallel * along)


def parallel_part(x: Tensor, onto: Tensor) -> Tensor:
    """Each sample's projection of x (B, ...) on ``onto`` (B, ...), in fp64."""
    flat, axis = x.double().flatten(1), onto.double().flatten(1)
    axis = axis / axis.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return ((flat * axis).sum(1, keepdim=True) * axis).view_as(x).to(x.dtype)
