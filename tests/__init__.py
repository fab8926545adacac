"""Tests. Without a CUDA device Triton kernels run in its interpreter, which must be asked for before any import."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
