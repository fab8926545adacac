"""A model and its processor by name: embedded, a folder, a geometry with random weights, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtok.errors import VtokError
from vtok_eval.harness.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def place(device: str | None, ranks: Ranks) -> torch.device:
    """Where this process's model goes.

    Raises
    ------
    VtokError
        A device that this machine does not have.
    """
    if device is None:
        if ranks.state is not None:
            return torch.device(ranks.state.device)
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise VtokError(f"there is no device {device!r}; take cpu, cuda, or cuda:1") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        raise VtokError(f"there is no {device} on this machine; leave --device out")
    if found.type == "cuda" and found.index is None and ranks.state is not None:
        return torch.device("cuda", ranks.state.local_process_index % torch.cuda.device_count())
    return found


def load(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """(model, processor) in eval mode.

    Raises
    ------
    VtokError
        Nothing of that name, or nothing that transformers can load.
    """
    from vtok.geometry import geometries, geometry
    from vtok_eval import models

    if Path(name).is_dir():
        return _from_folder(name, dtype, device)
    if name in models.MODELS:
        return models.load(name, dtype=dtype, device=device)
    if name in geometries():
        from vtok_eval.harness.letters import processor_of

        model = geometry(name, dtype, device)
        return model, processor_of(model)
    if "/" not in name:
        raise VtokError(
            f"{name!r} is no folder, no embedded model ({', '.join(models.MODELS)}), no geometry "
            f"({', '.join(geometries())}) and no hub id, which has the form owner/name"
        )
    return _from_hub(name, dtype, device)


def _from_folder(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    from vtok.io import plain

    return plain(name, dtype=dtype).to(device), _processor(name)


def _from_hub(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    import transformers

    try:
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VtokError(f"transformers cannot load {name}: {_first_line(error)}") from error
    return model.to(device).eval(), _processor(name)


def _processor(name: str) -> Any:
    import transformers

    try:
        found: Any = transformers.AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise VtokError(f"transformers cannot load the processor of {name}: {_first_line(error)}") from error
    if not hasattr(found, "tokenizer"):
        raise VtokError(f"{name} holds no processor with a tokenizer; save the model's own with save_pretrained")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
