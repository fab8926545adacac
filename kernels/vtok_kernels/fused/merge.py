"""Weighted scatter in Triton."""
