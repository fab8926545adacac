"""Exported models that answer: the same calls on ONNX Runtime, OpenVINO and torch.export programs.

from vtok.export.runtime import open_exported

model = open_exported(folder)  # OnnxVLM, OpenVinoVLM or Pt2VLM, by the folder's manifest
model.generate(picture, "What is in the picture?")  # str
found = model.generate_ids(processor_output, 16)  # tokens (B, T), kept[sample][image], logits (B, V)
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok.export import manifest
from vtok.export.runtime.base import ExportedVLM, Generated

_CLASSES = {"OnnxVLM": "onnx", "OpenVinoVLM": "openvino", "Pt2VLM": "pt2"}

__all__ = ["ExportedVLM", "Generated", "OnnxVLM", "OpenVinoVLM", "Pt2VLM", "open_exported"]


def open_exported(folder: str | Path, **options: Any) -> ExportedVLM:
    """The runtime of an exported folder, by its manifest.

    Parameters
    ----------
    folder : str or Path
        That ``vtok export`` wrote to onnx, openvino or pt2.
    **options
        Of the class: ``resize``, ``processor``, and ``threads`` where it has them.

    Raises
    ------
    VtokError
        No such folder, or one of Hugging Face format, which ``vtok.load`` opens.
    """
    target = manifest.read(folder).target
    name = next((name for name, own in _CLASSES.items() if own == target), None)
    if name is None:
        raise VtokError(f"{folder} was exported to {target} and has no graphs to run; open it with vtok.load")
    return __getattr__(name)(folder, **options)


def __getattr__(name: str) -> Any:
    """The classes, imported when they are asked for."""
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)
