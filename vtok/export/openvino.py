"""OpenVINO's representation of the same graphs, under the file names that optimum-intel uses."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from vtok.errors import VtokError
from vtok.export import onnx
from vtok.export.trace import Program

FILES = {
    "vision": "openvino_vision_embeddings_model.xml",
    "embed": "openvino_text_embeddings_model.xml",
    "decoder": "openvino_language_model.xml",
}
PRECISIONS = ("fp32", "fp16")


def write(programs: Sequence[Program], folder: str | Path, precision: str = "fp32") -> list[Path]:
    """An ``.xml`` and a ``.bin`` file a program, converted from its ONNX graph; as ``vtok.export.onnx.write``.

    ``precision`` is ``"fp32"``, or ``"fp16"``: weights are stored in half precision, and what is computed in is chosen
    when a file is loaded.
    """
    if precision not in PRECISIONS:
        raise VtokError(
            f"files of OpenVINO are written in {' or '.join(PRECISIONS)}, not in {precision}: it unpacks what ONNX "
            "Runtime quantises, so int8 files are no smaller; take fp16, or export to onnx in int8"
        )
    onnx.packages("openvino")
    import openvino

    paths = []
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for program in programs:
            source, *_ = onnx.write([program], scratch)
            path = Path(folder) / FILES[program.name]
            converted = openvino.convert_model(source)
            openvino.save_model(converted, path, compress_to_fp16=precision == "fp16")
            paths += [path, path.with_suffix(".bin")]
    return paths
