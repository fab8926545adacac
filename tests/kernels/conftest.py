"""Operators are tested with gradients on, as they are used in training; Triton's on a GPU, else in its interpreter."""

import importlib.util

import pytest
import torch

import vtok_kernels as vk
from vtok_kernels.fused import _launch


@pytest.fixture(autouse=True)
def _no_grad():
    """Replaces the fixture of the whole suite that turns gradients off."""


@pytest.fixture
def device():
    """Where Triton kernels run: a CUDA device, else the CPU in the interpreter (`tests/__init__.py` asks for it)."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if torch.cuda.is_available():
        return "cuda"
    if not _launch.INTERPRETED:
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    return "cpu"


@pytest.fixture
def triton(device):
    """Within the test, Triton serves every operator that it implements. Gives the device to put tensors on."""
    with vk.use("triton"):
        yield device
