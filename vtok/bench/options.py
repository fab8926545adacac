"""What the commands of the bench have in common: how their options are read, and what is built from them."""

from __future__ import annotations

import os
from typing import Any

import torch
from PIL import Image

from vtok.api import adapter_of, methods
from vtok.errors import VtokError
from vtok.io import is_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(text: str) -> torch.dtype:
    """``--dtype``."""
    if text not in DTYPES:
        raise VtokError(f"dtype {text!r} is unknown; take {', '.join(DTYPES)}")
    return DTYPES[text]


def device_of(text: str) -> str:
    """``--device``, where there is one."""
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise VtokError(f"there is no {text} on this machine; leave --device out")
    return text


def load() -> float | None:
    """How many processes want a processor, over the last minute."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def names_of(text: str, model: Any) -> list[str | list[str]]:
    """``--methods``: "all", or names with commas between; + composes."""
    if text == "all":
        return list(methods(adapter_of(model).family))
    parts = [part.strip().split("+") for part in text.split(",") if part.strip()]
    return [part[0] if len(part) == 1 else list(part) for part in parts]


def budget_of(text: str) -> int | float:
    """``--keep``: tokens or a share."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise VtokError(f"--keep {text} is no number; give tokens (64) or a share (0.25)") from None


def model_of(name: str, dtype: torch.dtype, device: str) -> Any:
    """A folder's model, or a geometry with random weights."""
    from vtok.geometry import geometries, geometry

    if is_folder(name, geometries()):
        from transformers import AutoModelForImageTextToText

        loaded: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        return loaded.to(device).eval()
    return geometry(name, dtype, device)


def noise(size: str) -> Image.Image:
    """A picture of smooth noise: neighbouring patches are alike, as in a photo."""
    try:
        width, height = (int(side) for side in size.split("x"))
    except ValueError:
        raise VtokError(f"--picture {size} is no size; give width and height, such as 672x504") from None
    coarse = torch.randint(0, 256, (24, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)
