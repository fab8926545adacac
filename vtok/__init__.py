"""vtok: make vision-language models fast by pruning, merging and re-tokenizing their visual tokens.

>>> import vtok
>>> model = vtok.compress(model, "flowcut", keep=64)  # doctest: +SKIP
"""

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

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "DecoderView",
    "Fusion",
    "Information",
    "Method",
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
