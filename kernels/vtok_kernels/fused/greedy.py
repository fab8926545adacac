"""Greedy selection in Triton."""
