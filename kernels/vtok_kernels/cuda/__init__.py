"""CUDA C++ versions of operators: registered where a compiler for them is found, and never needed."""

import importlib.util

from . import loader

if loader.compiler() is not None and importlib.util.find_spec("triton") is not None:
    from . import greedy  # noqa: F401
