"""Triton versions of the operators: registered on import, where Triton is installed."""

import importlib.util

if importlib.util.find_spec("triton") is not None:
    from . import attention, compact, greedy, match, merge, transition  # noqa: F401
