"""Programs of ``torch.export`` as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vtok.errors import VtokError
from vtok.export.trace import Program

FILES = {"vision": "vision_compress.pt2", "embed": "embed_tokens.pt2", "decoder": "decoder.pt2"}
PRECISIONS = ("fp32",)


def write(programs: Sequence[Program], folder: str | Path, precision: str = "fp32") -> list[Path]:
    """One ``.pt2`` file a program; as ``vtok.export.onnx.write``, in fp32 only."""
    if precision not in PRECISIONS:
        raise VtokError(
            f"torch.export programs are written in fp32, not in {precision}; export to onnx or openvino for smaller "
            "files"
        )
    paths = []
    for program in programs:
        path = Path(folder) / FILES[program.name]
        _strip(program)
        torch.export.save(program.exported, path)
        paths.append(path)
    return paths


def _strip(program: Program) -> None:
    """Take the tracer's notes off, which hold paths of the machine that it ran on."""
    for node in program.exported.graph.nodes:
        for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(note, None)
