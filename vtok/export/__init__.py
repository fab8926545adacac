"""Compressed models that leave the library: graphs, folders, and what proves that they answer alike."""
