"""Answers by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vtok.export.onnx import FILES, packages
from vtok.export.runtime.base import ExportedVLM


class OnnxVLM(ExportedVLM):
    """A folder of ``vtok export --to onnx``.

    >>> model = OnnxVLM("llava-divprune-64-onnx")  # doctest: +SKIP
    >>> model.generate(picture, "What is in the picture?")  # doctest: +SKIP

    Parameters
    ----------
    folder, resize, processor
        As for ``ExportedVLM``.
    threads : int, optional
        Within an operator; by default one a core.
    providers : sequence of str
        Of ONNX Runtime, in order of preference.
    """

    target: ClassVar[str] = "onnx"

    def __init__(
        self,
        folder: str | Path,
        *,
        resize: bool = False,
        processor: Any = None,
        threads: int | None = None,
        providers: tuple[str, ...] = ("CPUExecutionProvider",),
    ) -> None:
        super().__init__(folder, resize=resize, processor=processor)
        packages("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self._runtime = onnxruntime
        self._sessions = {
            name: onnxruntime.InferenceSession(self.folder / file, options, providers=list(providers))
            for name, file in FILES.items()
        }
        decoder = self._sessions["decoder"]
        self._inputs = [value.name for value in decoder.get_inputs()]
        self._outputs = [value.name for value in decoder.get_outputs()]

    def vision(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, kept = self._sessions["vision"].run(None, {"pixel_values": pixels})
        return features, kept

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._sessions["embed"].run(None, {"input_ids": ids})[0]

    def decode(
        self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any | None
    ) -> tuple[np.ndarray, Any]:
        # the cache stays in ONNX Runtime's own values from step to step and is never copied to the caller
        value = self._runtime.OrtValue.ortvalue_from_numpy
        if cache is None:
            shape = (len(embeds), self.settings.heads, 0, self.settings.width)
            cache = [value(np.zeros(shape, np.float32)) for _ in range(2 * self.settings.layers)]
        given = [value(np.ascontiguousarray(array)) for array in (embeds, mask, positions)]
        feeds = dict(zip(self._inputs, [*given, *cache], strict=True))
        logits, *present = self._sessions["decoder"].run_with_ort_values(self._outputs, feeds)
        return logits.numpy()[:, -1], present
