"""Bipartite matching in Triton."""
