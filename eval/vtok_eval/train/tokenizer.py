"""Recipe of the nano tokenizer: preset ``nano`` on scenes, measured on scenes and photographs that it has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vtok.tokenizers import preset
from vtok.tokenizers.data import find
from vtok.tokenizers.train import Recipe, assess, train

#: 0.48 s a step on one core of its own (two views of each scene: drawing is a quarter of it), so an hour
RECIPE = Recipe(steps=7000, batch=32, rate=1e-3, warmup=200, views=2)
MEASURED = ("scenes", "photographs")


def run(
    out: Path, *, seed: int = 0, scale: float = 1.0, device: str = "cpu", workers: int = 0, resume: bool = True
) -> Path:
    """Train the tokenizer and measure it.

    Parameters
    ----------
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
    held_out = [find(name, "held-out", seed=seed) for name in MEASURED]
    held_out[1].picture(0)  # a missing scikit-image is told now, not in an hour
    recipe = replace(RECIPE, steps=max(1, round(RECIPE.steps * scale)), seed=seed)
    pictures = find("scenes", "train", seed=seed)
    tokenizer = train(preset("nano"), pictures, out, recipe, device=device, workers=workers, resume=resume)
    assess(tokenizer, held_out, out, limit=512)
    return out / "tokenizer"
