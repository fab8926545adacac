"""ONNX files of the traced graphs, in fp32, fp16 or int8."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtok.errors import VtokError
from vtok.export.trace import Program

FILES = {"vision": "vision_compress.onnx", "embed": "embed_tokens.onnx", "decoder": "decoder.onnx"}
PRECISIONS = ("fp32", "fp16", "int8")
OPSET = 20
OPTIMISED = 5000
"""Nodes of a traced graph up to which onnxscript's optimiser looks through it. ToMe on nano-qwen, which merges windows
of 30 kinds, has 10,000 nodes, and kept it busy longer than all the rest; ONNX Runtime optimises whatever it loads."""
LARGEST = 1_500_000_000
"""Bytes of weights above which they lie in a file of their own (``.onnx.data``): a protobuf ends at 2 GiB."""


def write(programs: Sequence[Program], folder: str | Path, precision: str = "fp32") -> list[Path]:
    """One ``.onnx`` file a program, of opset 20; large weights lie beside it in ``.onnx.data``.

    Parameters
    ----------
    programs : sequence of Program
        Of ``vtok.export.trace.trace_all``.
    folder : str or Path
        Exists.
    precision : str
        ``"fp32"``; ``"fp16"``: matrices and tables are stored in half precision and computed with in fp32;
        ``"int8"``: ONNX Runtime's dynamic quantisation of the decoder, weights of matrix products in 8 bits, a scale a
        column, activations as they come; vision side and embeddings are as in fp16, so that the same tokens are kept.
        Inputs and outputs are fp32 in each.

    Returns
    -------
    list of Path
        All files that were written.

    Raises
    ------
    VtokError
        Another precision, or a package is missing.
    """
    if precision not in PRECISIONS:
        raise VtokError(f"there is no precision {precision!r} for ONNX; known are {', '.join(PRECISIONS)}")
    packages("onnx", "onnxscript", *(("onnxruntime",) if precision == "int8" else ()))
    from vtok.export import shrink

    paths = []
    for program in programs:
        path = Path(folder) / FILES[program.name]
        graph = translate(program)
        quantised = precision == "int8" and program.name == "decoder"
        if precision != "fp32" and not quantised:
            shrink.halve(graph)
        if quantised:
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                plain = Path(scratch) / path.name
                save(graph, plain)
                shrink.quantise(plain, path, external=plain.with_name(plain.name + ".data").exists())
        else:
            save(graph, path)
        paths += [path, *(data for data in [path.with_name(path.name + ".data")] if data.exists())]
    return paths


def packages(*names: str) -> None:
    """Check that optional packages are there.

    Raises
    ------
    VtokError
        Names the extra that brings them.
    """
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise VtokError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: pip install vtok[export]"
        )


def translate(program: Program) -> Any:
    """The ``onnx_ir.Model`` of a program."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found = torch.onnx.export(
                program.exported,
                dynamo=True,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                opset_version=OPSET,
                optimize=len(program.exported.graph.nodes) <= OPTIMISED,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert found is not None
    _strip(found.model)
    return found.model


def _strip(graph: Any) -> None:
    """Take the exporter's notes off: half of a small file, and paths of the machine that it was written on."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


def save(graph: Any, path: Path) -> None:
    """Write a graph, its weights beside it where a protobuf cannot hold them."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)
    ir.save(graph, path, external_data=f"{path.name}.data" if size > LARGEST else None)
