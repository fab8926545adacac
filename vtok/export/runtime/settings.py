"""What a runtime reads of an exported folder besides its graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok.errors import VtokError
from vtok.export import manifest
from vtok.export.fixed import FixedPlan

QWEN = ("qwen2_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Settings:
    """Token ids, sizes and layout.

    Attributes
    ----------
    plan : FixedPlan
        What is fixed of the vision side.
    image_token : int
        Id of a picture's placeholders.
    ends : frozenset of int
        Ids that end an answer.
    padding : int
        Id behind an answer that has ended.
    layers, heads, width : int
        Of the decoder: layers, key heads of each, channels of a head.
    merge : int
        Patches along a side of a visual token (Qwen), else 1.
    patch : int
        Pixels along a side of a patch.
    """

    plan: FixedPlan
    image_token: int
    ends: frozenset[int]
    padding: int
    layers: int
    heads: int
    width: int
    merge: int = 1
    patch: int = 14

    @property
    def multimodal(self) -> bool:
        """Position ids have three axes."""
        return self.plan.family in QWEN

    @classmethod
    def read(cls, folder: str | Path, target: str) -> Settings:
        """Of a folder that ``vtok export`` wrote.

        Parameters
        ----------
        folder : str or Path
            With ``manifest.json``, ``config.json`` and, where the model has one, ``generation_config.json``.
        target : str
            ``"onnx"``, ``"openvino"`` or ``"pt2"``.

        Raises
        ------
        VtokError
            A file is missing or damaged, or the folder was written for another target.
        """
        folder = Path(folder)
        note = manifest.read(folder)
        if note.target != target or note.plan is None:
            raise VtokError(
                f"{folder} was exported to {note.target}, not to {target}; open it with "
                f"{_OPENERS.get(note.target, 'the runtime of that format')}"
            )
        return cls.of(FixedPlan.from_json(note.plan), _config(folder), _generation(folder))

    @classmethod
    def of(cls, plan: FixedPlan, config: Mapping[str, Any], generation: Mapping[str, Any]) -> Settings:
        """From the plan, and the model's whole config and its generation config as dictionaries."""
        text, vision = config["text_config"], config["vision_config"]
        ends = (generation or text).get("eos_token_id")
        ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        padding = (generation or text).get("pad_token_id")
        if padding is None:
            padding = min(ends, default=0)
        heads = int(text.get("num_key_value_heads") or text["num_attention_heads"])
        token = config.get("image_token_id", config.get("image_token_index"))
        if token is None:
            raise VtokError("config.json names no image_token_id, so no prompt could say where a picture stands")
        return cls(
            plan=plan,
            image_token=int(token),
            ends=ends,
            padding=int(padding),
            layers=int(text["num_hidden_layers"]),
            heads=heads,
            width=int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]),
            merge=int(vision.get("spatial_merge_size", 1)) if plan.family in QWEN else 1,
            patch=int(vision["patch_size"]),
        )


_OPENERS = {
    "hf": "vtok.load",
    "onnx": "vtok.OnnxVLM",
    "openvino": "vtok.export.runtime.OpenVinoVLM",
    "pt2": "vtok.export.runtime.Pt2VLM",
}


def _config(folder: Path) -> dict[str, Any]:
    """The model's config with its defaults, which ``config.json`` leaves out."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise VtokError(f"{folder / 'config.json'} cannot be read ({error}); export the model again") from error


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise VtokError(f"{path} cannot be read ({error}); export the model again") from error
