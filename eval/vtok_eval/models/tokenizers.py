"""Trained image tokenizers by name: ``vtok tokenizer show nano photo.jpg``."""

from __future__ import annotations

from pathlib import Path

from vtok.errors import VtokError

DATA = Path(__file__).parent.parent / "data" / "tokenizers"


def folder(name: str) -> Path:
    """Where a shipped tokenizer is. Entry point of the group ``vtok.tokenizers``.

    Raises
    ------
    VtokError
        This copy of vtok lacks its weights.
    """
    if not (DATA / name / "model.safetensors").is_file():
        raise VtokError(
            f"this copy of vtok came without the weights of the tokenizer {name}; train them: "
            f"python -m vtok_eval.train {name}-tokenizer"
        )
    return DATA / name
