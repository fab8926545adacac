"""A picture file through a model folder: what ``vtok show`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vtok.api import compress, report, session_of
from vtok.budget import check_keep
from vtok.errors import VtokError
from vtok.geometry import geometries, geometry, inputs_of
from vtok.io import CONFIG, is_folder, load, plain
from vtok.method import resolve
from vtok.progress import progress
from vtok.report import Report
from vtok.show import show


def of_file(
    photo: str | Path,
    out: str | Path,
    *,
    model: str = "tiny-llava",
    methods: Sequence[str] | None = None,
    keep: int | float | None = None,
    options: Mapping[str, Any] | None = None,
    prompt: str = "Describe the picture.",
    stages: bool = False,
    fit: str = "auto",
    bar: bool = True,
) -> tuple[Report, bool]:
    """Prefill a photo and draw what was kept.

    Parameters
    ----------
    photo, out : str or Path
        Picture files to read and to write.
    model : str
        A folder that ``save_pretrained`` or ``vtok.save`` wrote, or one of ``vtok.geometry.geometries()``.
    methods, keep, options
        As for ``vtok.compress``; without methods the folder's own settings hold, else ``divprune`` at 64.
    prompt : str
        The question, where the folder holds a processor; else random words stand around the picture.
    stages, fit
        As for ``vtok.show``.
    bar : bool
        Show a progress bar.

    Returns
    -------
    tuple of (Report, bool)
        What happened, and whether the weights were random.

    Raises
    ------
    VtokError
        No such file, folder or geometry; anything ``vtok.compress`` refuses.
    """
    picture = opened(photo)
    with progress("load, run, draw", 3, bar) as advance:
        network, random = _network(model, methods, keep, options or {})
        advance(1)
        inputs = None if random else _processed(model, picture, prompt)
        given = inputs_of(network, picture) if inputs is None else inputs.to(network.device, network.dtype)
        with torch.no_grad():
            network(**given, logits_to_keep=1)
        made = report(network)
        advance(1)
        drawn = show(picture, made, stages=stages, fit=fit)
    try:
        drawn.save(out)
    except (OSError, ValueError) as error:
        raise VtokError(f"cannot write the picture {out}: {error}; give a name such as out.png") from error
    return made, random


def _network(
    model: str, methods: Sequence[str] | None, keep: int | float | None, options: Mapping[str, Any]
) -> tuple[Any, bool]:
    """The compressed model, and whether its weights are random."""
    random = not is_folder(model, geometries())
    if random and model not in geometries():
        raise VtokError(f"{model} is neither a folder nor one of the geometries {', '.join(geometries())}")
    saved = methods is None and not random and (Path(model) / CONFIG).is_file()
    if saved:
        if options:
            raise VtokError(f"options {', '.join(options)} need a method; name it with --method")
        network = load(model)
        if keep is not None:
            session_of(network).keep = check_keep(keep)
        return network, random
    names = methods or ["divprune"]
    chain = resolve(names[0] if len(names) == 1 else names, options)  # a wrong name need not wait for the weights
    network = geometry(model) if random else plain(model)
    return compress(network, chain, keep=64 if keep is None else keep), random


def opened(path: str | Path) -> Image.Image:
    """A picture file, upright and in RGB.

    Raises
    ------
    VtokError
        No such file, or no picture in it.
    """
    from PIL import ImageOps

    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError:
        raise VtokError(f"there is no file {path}; give a picture, such as photo.jpg") from None
    except (OSError, ValueError) as error:
        raise VtokError(f"{path} cannot be read as a picture: {error}") from error


def _processed(folder: str, picture: Image.Image, prompt: str) -> Any:
    """Inputs by the folder's own processor, or ``None`` where it has none."""
    import transformers

    if not any((Path(folder) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        return None
    try:
        processor: Any = transformers.AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VtokError(f"transformers cannot load the processor in {folder}: {reason}") from error
    if not hasattr(processor, "tokenizer"):
        return None
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        text = f"{processor.image_token}\n{prompt}"
    return processor(images=picture, text=text, return_tensors="pt")
