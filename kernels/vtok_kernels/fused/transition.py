"""Transitions in Triton."""
