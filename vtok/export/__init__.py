"""Compressed models that leave the library: Hugging Face folders, ONNX, OpenVINO, programs of torch.export.

    model = vtok.compress(model, "flowcut", keep=64)
    vtok.export.export(model, "out", to="onnx", processor=processor)
    vtok.OnnxVLM("out").generate(images=[image], prompts=[prompt])

A folder is written beside its place, loaded again by a fresh process and asked; it gets its name only when it answers
as the model does.
"""

from vtok.export.manifest import TARGETS, Manifest, Parity, read, verify
from vtok.export.probes import Probe
from vtok.export.writing import export

__all__ = ["TARGETS", "Manifest", "Parity", "Probe", "export", "read", "verify"]
