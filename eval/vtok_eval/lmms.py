"""lmms-eval's entry point: ``lmms-eval --model vtok --model_args pretrained=...,method=flowcut,keep=64 --tasks ...``.

lmms-eval loads this module at every start, whatever model is asked for, so nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

#: folder for ``--include_path``: the bundled tasks as YAML
TASKS = Path(__file__).parent / "lmms_tasks"


def manifest() -> Any:
    """What the entry-point group ``lmms_eval.models`` wants: names of classes, imported when asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vtok",
        simple_class_path="vtok_eval.lmms_model.Vtok",
        chat_class_path="vtok_eval.lmms_model.VtokChat",
    )
