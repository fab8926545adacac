"""Compressed models in inference servers."""
