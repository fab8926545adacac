"""Trained resamplers of the embedded models: ``vtok.compress(model, "flextok", weights="nano-llava", keep=17)``."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent.parent / "data" / "resamplers"


def folder(name: str) -> Path:
    """Where the resampler of an embedded model is, or would be. Entry point of the group ``vtok.resamplers``."""
    return DATA / name
