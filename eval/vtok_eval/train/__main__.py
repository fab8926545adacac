"""``python -m vtok_eval.train nano-llava``: train an embedded model, from scratch or from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vtok.cli import alone
from vtok.errors import VtokError

MODELS = ("nano-llava", "nano-qwen", "small-llava")
RESAMPLERS = ("nano-llava-resampler", "nano-qwen-resampler")
TOKENIZERS = ("nano-tokenizer", "nano-flow-tokenizer")
KNOWN = ", ".join((*MODELS, *RESAMPLERS, *TOKENIZERS))


def command(
    model: Annotated[str, typer.Argument(help=f"One of {KNOWN}.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints, log and model; runs/MODEL by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and scenes.")] = 0,
    scale: Annotated[float, typer.Option(help="Multiply the recipe's steps by this.", min=0.0)] = 1.0,
    device: Annotated[str, typer.Option(help="cpu or cuda; cuda where there is one by default.")] = "",
    workers: Annotated[int, typer.Option(help="Processes that draw scenes.", min=0)] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints in the folder.")] = True,
    source: Annotated[
        Path | None, typer.Option("--model", help="Folder of the model that a resampler is for; the embedded one else.")
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="small-llava: a finished delta.safetensors to go on from; resamplers: one that gets a head."),
    ] = None,
) -> None:
    """Train an embedded model; interrupted, the same command goes on."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = out or Path("runs") / model
    if start is not None and model not in ("small-llava", *RESAMPLERS):
        raise VtokError(f"--start is not for {model}; a run of it goes on from the checkpoints in {folder}")
    if model in MODELS[:2]:
        from vtok_eval.train import nano

        nano.run(model, folder, seed=seed, scale=scale, device=place, workers=workers, resume=resume)
    elif model == "small-llava":
        from vtok_eval.train import small

        small.train(folder, scale=scale, seed=seed, device=place, workers=workers, resume=resume, start=start)
    elif model in RESAMPLERS:
        from vtok_eval.train import resampler

        name = model.removesuffix("-resampler")
        steps: dict[str, Any] = {"seed": seed, "scale": scale, "workers": workers, "resume": resume}
        resampler.run(name, folder, source=source, device=place, start=start, **steps)
    elif model in TOKENIZERS:
        from vtok_eval.train import tokenizer

        name = model.removesuffix("-tokenizer")
        tokenizer.run(name, folder, seed=seed, scale=scale, device=place, workers=workers, resume=resume)
    else:
        raise VtokError(f"there is no recipe for {model!r}; known are {KNOWN}")
    typer.echo(f"wrote {folder}")


if __name__ == "__main__":
    alone(command)
