"""The model to export, by name: a folder, an embedded model, a hub id, or a geometry with random weights."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from vtok.errors import VtokError
from vtok.geometry import geometries, geometry
from vtok.io import is_folder, plain

#: installed packages register models by name: name -> folder
GROUP = "vtok.models"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")


def load(name: str) -> tuple[Any, Any]:
    """(model, processor) of a name, in fp32 and eval mode.

    Parameters
    ----------
    name : str
        A folder that ``save_pretrained`` or ``vtok.save`` wrote, an embedded model, a hub id (``owner/name``), or one
        of ``vtok.geometry.geometries()``.

    Returns
    -------
    tuple of (PreTrainedModel, ProcessorMixin or None)
        No processor where the folder has none, and for geometries.

    Raises
    ------
    VtokError
        Nothing of that name, or nothing that transformers can load.
    """
    import transformers

    folder = _folder(name)
    if folder is None and name in geometries():
        return geometry(name), None
    library: Any = transformers
    try:
        if folder is not None:
            model = plain(folder, dtype=torch.float32)
            has = any((folder / file).is_file() for file in PROCESSORS)
            return model, library.AutoProcessor.from_pretrained(folder) if has else None
        model = library.AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).eval()
        return model, library.AutoProcessor.from_pretrained(name)
    except VtokError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VtokError(f"transformers cannot load {name}: {reason}") from error


def _folder(name: str) -> Path | None:
    """The folder of a name; ``None`` where it is a geometry or a hub id."""
    named = {entry.name: entry for entry in entry_points(group=GROUP)}
    if is_folder(name, {*named, *geometries()}):
        return Path(name)
    if name in named:
        return Path(named[name].load()(name))
    if name in geometries() or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    raise VtokError(
        f"{name!r} is no folder, no embedded model ({', '.join(sorted(named)) or 'none is installed'}), no geometry "
        f"({', '.join(geometries())}) and no hub id, which has the form owner/name"
    )


def file_dtype(name: str) -> str | None:
    """``"fp32"``, ``"fp16"`` or ``"bf16"``: of the weights in a model's files, where its config says so."""
    import transformers

    if _folder(name) is None and name in geometries():
        return None
    config: Any = transformers.AutoConfig.from_pretrained(_folder(name) or name)
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    return names.get(getattr(config, "dtype", None) or torch.float32)
