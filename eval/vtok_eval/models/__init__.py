"""Embedded models: small vision-language models that really see, loaded by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtok.errors import VtokError

#: name -> what it is
MODELS = {
    "nano-llava": "LLaVA, 336 px, 576 visual tokens, 12.5 M parameters, trained on the bundled scenes",
    "nano-qwen": "Qwen2.5-VL, any size, 324 visual tokens and more, 13.1 M parameters, trained on the bundled scenes",
    "small-llava": "LLaVA of DINOv2-small and SmolLM2-135M-Instruct, assembled at first use from two packages",
}

_DATA = Path(__file__).parent.parent / "data" / "models"


def folder(name: str) -> Path:
    """A folder that plain ``from_pretrained`` loads.

    Raises
    ------
    VtokError
        Unknown name, or weights that this copy of vtok lacks.
    """
    if name not in MODELS:
        raise VtokError(f"there is no embedded model {name!r}; known are {', '.join(MODELS)}")
    if name == "small-llava":
        from vtok_eval.models.small import assemble

        return assemble()
    if not (_DATA / name / "model.safetensors").is_file():
        raise VtokError(
            f"this copy of vtok came without the weights of {name}; train them: python -m vtok_eval.train {name}"
        )
    return _DATA / name


def load(name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> tuple[Any, Any]:
    """(model, processor) of an embedded model, in eval mode.

    Raises
    ------
    VtokError
        As ``folder`` does.
    """
    import transformers

    path = folder(name)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
    return model.to(device).eval(), transformers.AutoProcessor.from_pretrained(path)
