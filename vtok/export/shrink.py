"""Smaller ONNX graphs: weights in half precision, or in 8 bits with activations quantised as they come."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

SMALLEST = 1024
"""Elements below which a weight stays in fp32: norms, biases and constants are no size worth an error."""


def halve(graph: Any) -> None:
    """Store the large fp32 weights of an ``onnx_ir.Model`` in half precision, each behind a cast back to fp32.

    ONNX Runtime folds the casts when it loads the file, so it computes in fp32, and what is lost is lost by rounding
    the weights alone. Weights above fp16's range are left as they are.
    """
    import onnx_ir as ir

    inner = graph.graph
    for name, value in list(inner.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < SMALLEST:
            continue
        array = tensor.numpy()
        if np.abs(array).max() > np.finfo(np.float16).max:
            continue
        half = ir.Value(
            name=f"{name}.fp16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(array.astype(np.float16), name=f"{name}.fp16"),
        )
        cast = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.cast")
        whole = cast.outputs[0]
        whole.name, whole.shape, whole.type = f"{name}.fp32", value.shape, value.type
        ir.convenience.replace_all_uses_with(value, whole)
        del inner.initializers[name]
        inner.initializers[half.name] = half
        inner.insert_before(inner[0], cast)


def quantise(plain: Path, path: Path, *, external: bool) -> None:
    """ONNX Runtime's dynamic quantisation of a file's matrix products.

    Weights are symmetric in 7 of 8 bits a column: with 8, sums of two products overflow 16 bits on processors without
    VNNI, silently.

    Parameters
    ----------
    plain : Path
        The fp32 file.
    path : Path
        The file to write.
    external : bool
        Weights lie beside it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it advises, on the root logger, to pre-process what the exporter has optimised
    try:
        quantize_dynamic(
            plain,
            path,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
        )
    finally:
        logger.setLevel(level)
