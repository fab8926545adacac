"""What the Triton files share: where they run, at what priority, and block sizes."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Triton runs its kernels as numpy programs on the CPU. Read where Triton reads it: when kernels are defined."""


def devices() -> tuple[str, ...]:
    """Device types that take a Triton kernel."""
    return ("cuda", "cpu") if INTERPRETED else ("cuda",)


def priority() -> int:
    """Rank for `register`: below the reference, so Triton serves on request only (VTOK_KERNELS=triton).

    The kernels are proved in the interpreter, on CPUs. With their tests and times on a GPU, this becomes 2 there.
    """
    return -1


def next_power(n: int) -> int:
    """The least power of two that is >= n; 1 for n <= 1. Triton's block sizes are powers of two."""
    return 1 << max(n - 1, 0).bit_length()
