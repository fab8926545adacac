"""A model and its processor by name: embedded, a folder, a geometry with random weights, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vtok.errors import VtokError
from vtok.geometry import geometries, geometry
from vtok.io import is_folder
from vtok_eval import models
from vtok_eval.harness.ranks import Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAILURES = (OSError, ValueError, TypeError, KeyError)
"""What ``from_pretrained`` raises where files are missing, damaged, or of something else."""


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
    if name in geometries() and not is_folder(name, geometries()):
        from vtok_eval.harness.letters import processor_of

        model = geometry(name, dtype, device)
        return model, processor_of(model)
    return model_of(name, dtype=dtype).to(device), processor(name)


def folder_of(name: str) -> Path | None:
    """The folder of a local or embedded model; ``None`` for one of the hub.

    Raises
    ------
    VtokError
        Nothing of that name.
    """
    if is_folder(name, models.MODELS):
        return Path(name)
    if name in models.MODELS:
        return models.folder(name)
    if "/" in name:
        return None
    raise VtokError(
        f"{name!r} is no folder, no embedded model ({', '.join(models.MODELS)}), no geometry "
        f"({', '.join(geometries())}) and no hub id, which has the form owner/name"
    )


def model_of(name: str, **kw: Any) -> Any:
    """A plain model in eval mode, where ``from_pretrained`` puts it.

    Parameters
    ----------
    name : str
        A folder, an embedded model or a hub id.
    **kw
        To ``from_pretrained``.

    Raises
    ------
    VtokError
        Nothing of that name, or nothing that transformers can load.
    """
    import transformers

    from vtok.io import plain

    folder = folder_of(name)
    if folder is not None:
        return plain(folder, **kw)
    try:
        return transformers.AutoModelForImageTextToText.from_pretrained(name, **kw).eval()
    except FAILURES as error:
        raise VtokError(f"transformers cannot load {name}: {_first_line(error)}") from error


def processor(name: str) -> Any:
    """The processor beside a model.

    Raises
    ------
    VtokError
        Nothing of that name, or nothing with a tokenizer that transformers can load.
    """
    import transformers

    try:
        found: Any = transformers.AutoProcessor.from_pretrained(folder_of(name) or name)
    except FAILURES as error:
        raise VtokError(
            f"transformers cannot load the processor of {name}: {_first_line(error)}; a folder needs it beside the "
            "model: processor.save_pretrained"
        ) from error
    if not hasattr(found, "tokenizer"):
        raise VtokError(f"{name} holds no processor with a tokenizer; save the model's own with save_pretrained")
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
