"""Answers by programs of ``torch.export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.export import ExportedProgram

from vtok.export.pt2 import FILES
from vtok.export.runtime.base import ExportedVLM


def module_of(program: ExportedProgram) -> torch.nn.Module:
    """The module of a program, without guards: they hold what is true of the traced sizes (a cache of two columns and
    two new ones make four), and a prompt of two words is fine."""
    return program.module(check_guards=False)


class Pt2VLM(ExportedVLM):
    """A folder of ``vtok export --to pt2``. Threads are torch's (``torch.set_num_threads``).

    Parameters
    ----------
    folder, resize, processor
        As for ``ExportedVLM``.
    """

    target: ClassVar[str] = "pt2"

    def __init__(self, folder: str | Path, *, resize: bool = False, processor: Any = None) -> None:
        super().__init__(folder, resize=resize, processor=processor)
        self._graphs = {name: module_of(torch.export.load(self.folder / file)) for name, file in FILES.items()}

    def vision(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            features, kept = self._graphs["vision"](torch.from_numpy(np.ascontiguousarray(pixels)))
        return features.numpy(), kept.numpy()

    def embed(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._graphs["embed"](torch.from_numpy(ids)).numpy()

    def decode(
        self, embeds: np.ndarray, mask: np.ndarray, positions: np.ndarray, cache: Any | None
    ) -> tuple[np.ndarray, Any]:
        if cache is None:
            shape = (len(embeds), self.settings.heads, 0, self.settings.width)
            cache = [torch.zeros(shape) for _ in range(2 * self.settings.layers)]
        with torch.no_grad():
            given = (torch.from_numpy(array) for array in (embeds, mask, positions))
            logits, present = self._graphs["decoder"](*given, cache)
        return logits[:, -1].numpy(), present
