"""vtok: make vision-language models fast by pruning, merging and re-tokenizing their visual tokens.

>>> import vtok
>>> model = vtok.compress(model, "flowcut", keep=64)  # doctest: +SKIP
"""

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
from vtok.method import Method, get, register
from vtok.protocol import Adapter
from vtok.report import Report
from vtok.view import DecoderView, Fusion, Selection, Shape, Stage, TowerView, View

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "DecoderView",
    "Fusion",
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
    "compress",
    "compressed",
    "families",
    "get",
    "methods",
    "register",
    "register_adapter",
    "report",
    "restore",
]
