"""vtok: make vision-language models fast by pruning, merging and re-tokenizing their visual tokens.

>>> import vtok
>>> model = vtok.compress(model, "flowcut", keep=64)  # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

import vtok.methods  # noqa: F401  (before the function of the same name, which takes its place as an attribute)
from vtok.api import (
    budget,
    compress,
    compressed,
    families,
    methods,
    register_adapter,
    report,
    restore,
)
from vtok.errors import VtokError
from vtok.information import Information, calibrate, information
from vtok.io import load, save
from vtok.method import Method, get, register
from vtok.protocol import Adapter
from vtok.report import Report
from vtok.show import show
from vtok.view import DecoderView, Fusion, Selection, Shape, Stage, TowerView, View

if TYPE_CHECKING:
    from vtok.export.runtime import OnnxVLM, OpenVinoVLM, Pt2VLM

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "DecoderView",
    "Fusion",
    "Information",
    "Method",
    "OnnxVLM",
    "OpenVinoVLM",
    "Pt2VLM",
    "Report",
    "Selection",
    "Shape",
    "Stage",
    "TowerView",
    "View",
    "VtokError",
    "__version__",
    "budget",
    "calibrate",
    "compress",
    "compressed",
    "families",
    "get",
    "information",
    "load",
    "methods",
    "register",
    "register_adapter",
    "report",
    "restore",
    "save",
    "show",
]

#: names that bring more modules along, imported when they are asked for
_LATER = {
    "OnnxVLM": "vtok.export.runtime",
    "OpenVinoVLM": "vtok.export.runtime",
    "Pt2VLM": "vtok.export.runtime",
}


def __getattr__(name: str) -> Any:
    if name == "export":
        return importlib.import_module("vtok.export")
    if name not in _LATER:
        raise AttributeError(f"module 'vtok' has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
