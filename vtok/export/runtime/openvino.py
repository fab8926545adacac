"""Answers by OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vtok.export.onnx import packages
from vtok.export.openvino import FILES
from vtok.export.runtime.base import ExportedVLM


class OpenVinoVLM(ExportedVLM):
    """A folder of ``vtok export --to openvino``.

    Parameters
    ----------
    folder, resize, processor
        As for ``ExportedVLM``.
    threads : int, optional
        By default one a core.
    device : str
        Of OpenVINO.
    precision : str
        What is computed in (``INFERENCE_PRECISION_HINT``): by default fp32, in which the export was checked. ``"bf16"``
        or ``"f16"`` are faster where the hardware has them, and may keep other tokens.
    """

    target: ClassVar[str] = "openvino"

    def __init__(
        self,
        folder: str | Path,
        *,
        resize: bool = False,
        processor: Any = None,
        threads: int | None = None,
        device: str = "CPU",
        precision: str = "f32",
    ) -> None:
        super().__init__(folder, resize=resize, processor=processor)
        packages("openvino")
        import openvino

        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        self._graphs = {name: core.compile_model(self.folder / file, device, config) for name, file in FILES.items()}
        decoder = self._graphs["decoder"]
        self._inputs = [value.get_any_name() for value in decoder.inputs]

    def vision(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._graphs["vision"]({"pixel_values": pixels})
        return found["features"], found["kept"]

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self._graphs["embed"]({"input_ids": ids})["inputs_embeds"]

    def decode(
        self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any | None
    ) -> tuple[np.ndarray, Any]:
        if cache is None:
            shape = (len(embeds), self.settings.heads, 0, self.settings.width)
            cache = {name: np.zeros(shape, np.float32) for name in self._inputs if name.startswith("past_key_values")}
        found = self._graphs["decoder"](
            {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, **cache}
        )
        present = {name: found[name.replace("past_key_values", "present")] for name in cache}
        return found["logits"][:, -1], present
