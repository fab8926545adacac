"""Recipes of the nano tokenizers on scenes, measured on scenes and photographs that they have not seen: ``nano``, and
``nano-flow``, a flow decoder for the same tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from vtok.errors import VtokError
from vtok.tokenizers import FlexTok, preset
from vtok.tokenizers.config import TokenizerConfig
from vtok.tokenizers.data import find
from vtok.tokenizers.flextok import WEIGHTS
from vtok.tokenizers.train import FINISHED, Recipe, assess, train
from vtok_eval.models.tokenizers import folder

RECIPES = {
    #: by its card's log 0.6 s a step on a core with other load (two views of each scene: drawing is a quarter of it)
    "nano": Recipe(steps=7000, batch=32, rate=1e-3, warmup=200, views=2),
    #: by its card's log 0.45 s a step on a core of its own
    "nano-flow": Recipe(steps=5000, batch=32, rate=1e-3, views=2),
}
MEASURED = ("scenes", "photographs")


def run(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    scale: float = 1.0,
    device: str = "cpu",
    workers: int = 0,
    resume: bool = True,
) -> Path:
    """Train a tokenizer and measure it.

    Parameters
    ----------
    name : str
        One of ``RECIPES``.
    out : Path
        For checkpoint, log, ``report.json``, pictures of reconstructions, and the finished ``tokenizer/``.
    seed : int
        Of weights and scenes.
    scale : float
        The step count times this; 1 is the whole recipe.
    device : str
        ``"cpu"`` or ``"cuda"``.
    workers : int
        Processes that draw scenes; 0 draws them in this one.
    resume : bool
        Go on from a checkpoint in ``out``.

    Returns
    -------
    Path
        The folder of the finished tokenizer.
    """
    held_out = [find(data, "held-out", seed=seed) for data in MEASURED]
    held_out[1].picture(0)  # a missing scikit-image is told now, not in an hour
    own = RECIPES[name]
    recipe = dataclasses.replace(own, steps=max(1, round(own.steps * scale)), seed=seed)
    config, start = preset("nano"), None
    if name == "nano-flow":
        start = FlexTok.from_pretrained(folder("nano")).to(device)
        config = TokenizerConfig.of(dataclasses.asdict(start.config) | {"decoder": "flow"})
    pictures = find("scenes", "train", seed=seed)
    train(config, pictures, out, recipe, device=device, workers=workers, resume=resume, start=start)
    if start is not None:
        halve_decoder(out / FINISHED)
    assess(FlexTok.from_pretrained(out / FINISHED).to(device), held_out, out, limit=512)
    return out / FINISHED


def halve_decoder(tokenizer: Path) -> None:
    """Store a tokenizer's decoder in half precision: what decides on tokens stays to the bit.

    Raises
    ------
    VtokError
        A weight does not fit half precision.
    """
    weights = load_file(tokenizer / WEIGHTS)
    for key, value in weights.items():
        if key.startswith("decoder.") and value.dtype == torch.float32:
            weights[key] = value.half()
            if not bool(weights[key].isfinite().all()):
                raise VtokError(f"{key} goes up to {value.abs().max():g}, which half precision cannot hold")
    save_file(weights, tokenizer / WEIGHTS)
