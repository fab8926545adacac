"""Attention statistics in Triton."""
