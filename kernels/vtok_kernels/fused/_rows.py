"""How Triton kernels see tensors (B, N, ...) of any strides: rows of channels, in at most two groups of strides."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ._launch import next_power


class Rows(NamedTuple):
    """Tensors as kernels take them, and tuples with one entry for each: channel c lies at
    ``(c // inner) * outer_stride + (c % inner) * inner_stride``."""

    tensors: tuple[Tensor, ...]
    batch_strides: tuple[int, ...]
    row_strides: tuple[int, ...]
    widths: tuple[int, ...]
    inner: tuple[int, ...]
    outer_strides: tuple[int, ...]
    inner_strides: tuple[int, ...]

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """What a kernel needs besides the tensors, less the widths."""
        return self.batch_strides, self.row_strides, self.inner, self.outer_strides, self.inner_strides


def rows(tensors: Sequence[Tensor]) -> Rows:
    """Describe `tensors`; one whose channels need more than two strides is copied."""
    found = []
    for x in tensors:
        axes = _channel_axes(x)
        if len(axes) > 2:
            x = x.contiguous()
            axes = _channel_axes(x)
        (outer, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(axes)) + axes
        found.append((x, x.stride(0), x.stride(1), outer * inner, max(inner, 1), outer_stride, inner_stride))
    return Rows(*(tuple(column) for column in zip(*found, strict=True)))


def writable(tensors: Sequence[Tensor]) -> bool:
    """Whether `rows` describes each of them without a copy."""
    return all(len(_channel_axes(x)) <= 2 for x in tensors)


def _channel_axes(x: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the trailing axes of x (B, N, ...), joined where they lie one behind the other."""
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[2:], x.stride()[2:], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    return axes


def tile(widths: Sequence[int]) -> tuple[int, int, int]:
    """Rows and channels of a program, and its warps.

    A row of 4096 half-precision channels is 16 elements a thread: two loads of 16 bytes each. Narrow rows share a
    program, so that positions and sizes do not need one each.
    """
    channels = min(next_power(max(widths)), 4096)
    return max(1, 512 // channels), channels, 8 if channels == 4096 else 4
