"""Pictures as the exported vision graph takes them: all of one layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vtok.errors import VtokError
from vtok.export.runtime.settings import Settings


def batch(settings: Settings, inputs: Mapping[str, Any]) -> np.ndarray:
    """The pictures of a processor's output.

    Parameters
    ----------
    settings : Settings
        Of the folder.
    inputs : mapping
        ``pixel_values`` and, where the family has them, ``image_sizes`` or ``image_grid_thw``; tensors or arrays.

    Returns
    -------
    ndarray
        (pictures, ...) fp32, of the plan's ``pixel_shape``.

    Raises
    ------
    VtokError
        A video, or a picture of another layout than the graph's.
    """
    shape = settings.plan.pixel_shape
    if inputs.get("pixel_values_videos") is not None:
        raise VtokError("an export knows pictures and no videos; run the model in transformers, under vtok.compress")
    if inputs.get("pixel_values") is None:
        return np.zeros((0, *shape), np.float32)
    pixels = np.asarray(inputs["pixel_values"], np.float32)
    if settings.multimodal:
        _same(settings, "grid_thw", np.asarray(inputs["image_grid_thw"]), "patches (time, height, width)")
        return pixels.reshape(-1, *shape)
    if settings.plan.family == "llava_next":
        _same(settings, "image_sizes", np.asarray(inputs["image_sizes"]), "pixels (height, width)")
        pixels = pixels[:, : shape[0]]
    if pixels.shape[1:] != shape:
        raise VtokError(
            f"this export takes pictures of shape {shape}, and got {pixels.shape[1:]}; use the folder's own processor"
        )
    return pixels


def _same(settings: Settings, key: str, given: np.ndarray, unit: str) -> None:
    fixed = settings.plan.layout[key]
    wrong = next((row for row in given.reshape(-1, len(fixed)).tolist() if tuple(row) != tuple(fixed)), None)
    if wrong is not None:
        raise VtokError(
            f"this export was made for pictures of {tuple(fixed)} {unit}, and one has {tuple(wrong)}; open the folder "
            "with resize=True, which stretches pictures to that layout, or export for this size"
        )


def resized(settings: Settings, picture: Image.Image) -> Image.Image:
    """A picture stretched to the layout of the export; as it is where the processor brings all to one size."""
    if settings.multimodal:
        _, height, width = (int(side) * settings.patch for side in settings.plan.layout["grid_thw"])
    elif settings.plan.family == "llava_next":
        height, width = (int(side) for side in settings.plan.layout["image_sizes"])
    else:
        return picture
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BICUBIC)


def by_prompt(images: Any, prompts: int) -> list[list[Image.Image]]:
    """Pictures of each prompt, from one picture, one a prompt, or a list a prompt; ``None`` stands for no picture.

    Raises
    ------
    VtokError
        As many lists as prompts are not there.
    """
    if images is None:
        return [[] for _ in range(prompts)]
    if isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, Sequence) or isinstance(images, str):
        raise VtokError(f"images are PIL pictures, one a prompt or a list a prompt, not {type(images).__name__}")
    if prompts == 1 and all(isinstance(item, Image.Image) for item in images):
        return [list(images)]
    if len(images) != prompts:
        raise VtokError(f"there are {len(images)} pictures or lists of them for {prompts} prompts; give one for each")
    return [[item] if isinstance(item, Image.Image) else list(item or ()) for item in images]
